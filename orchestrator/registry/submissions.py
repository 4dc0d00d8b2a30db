"""Which submission of a run is the newest, and whether the sidecar speaks about it, from the run's own files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.states import JobState

SHOWN_LATE_S = 5.0
"""A shared disk may show the agent's last word seconds after the scheduler has let go of the job."""


@dataclass(frozen=True)
class Submission:
    """The newest submission. `job_id` is None while (or after) a submitter died between queueing and noting the id."""

    token: str
    backend: str
    attempt_base: int
    time: float
    job_id: str | None
    host: str | None = None  # where it was submitted: the only machine that can see a local run


def newest_submission(events: Iterable[Mapping[str, Any]]) -> Submission | None:
    """The newest intent to submit, with the job id once it is known; a failed one gives way to the one before it."""
    made: list[Submission] = []
    for event in events:
        if event.get("event") == "action" and event.get("action") == "submitting":
            made.append(_from_event(event))
        elif event.get("event") == "action" and event.get("action") == "submission_failed":
            made = [known for known in made if known.token != event.get("token")]
        elif event.get("event") == "submitted":
            submission = _from_event(event)
            made = [*(known for known in made if known.token != submission.token), submission]
    return made[-1] if made else None


def _from_event(event: Mapping[str, Any]) -> Submission:
    job_id = event.get("job_id")
    return Submission(
        token=str(event.get("token", "")),
        backend=str(event.get("backend", "")),
        attempt_base=int(event.get("attempt_base") or 0),
        time=float(event.get("time") or 0.0),
        job_id=None if job_id is None else str(job_id),
        host=event.get("host"),
    )


def stated(sidecar: Mapping[str, Any], submission: Submission | None) -> JobState | None:
    """The state that the agent of node 0 wrote about this submission; None while it has written nothing."""
    if not is_current(sidecar, submission):
        return None
    value = sidecar.get("status")
    return next((state for state in JobState if state == value), None)


def is_current(sidecar: Mapping[str, Any], submission: Submission | None) -> bool:
    """True when the sidecar speaks about this submission, not about one before it."""
    if not sidecar:
        return False
    if submission is not None and submission.job_id is not None and sidecar.get("job_id") == submission.job_id:
        return True  # an end without any attempt, too: what the run waited for has failed
    base = 0 if submission is None else submission.attempt_base
    numbers = [int(row["attempt"]) for row in sidecar.get("attempts") or () if row.get("attempt") is not None]
    return max(numbers, default=-1) >= base

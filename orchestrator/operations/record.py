"""What a run directory says about its run, read once: submission, sidecar, events, progress, heartbeat."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.backends.base import JobHandle
from orchestrator.errors import RegistryError
from orchestrator.files import read_json
from orchestrator.paths import RunPaths
from orchestrator.registry import load_run, read_events

HEARTBEAT_FRESH_S = 60.0  # four beats of 15 s: one lost write does not declare a run dead


@dataclass(frozen=True)
class Submission:
    """The newest submission. `job_id` is None while (or after) a submitter died between queueing and noting the id."""

    token: str
    backend: str
    attempt_base: int
    time: float
    job_id: str | None

    @property
    def handle(self) -> JobHandle | None:
        """The job, once its id is known."""
        return None if self.job_id is None else JobHandle(self.backend, self.job_id)


@dataclass(frozen=True)
class Record:
    """A snapshot of the files of one run; plain data, nothing is asked of a scheduler here."""

    paths: RunPaths
    sidecar: Mapping[str, Any]
    events: tuple[dict[str, Any], ...]
    progress: Mapping[str, Any]
    verdict: Mapping[str, Any]
    submission: Submission | None
    tombstone: bool
    heartbeat_age_s: float | None
    logged_attempts: tuple[int, ...] = ()  # from the log directories: an attempt's earliest trace
    problems: tuple[str, ...] = ()  # files that could not be read, in words

    @property
    def run_id(self) -> str:
        return self.paths.run_dir.name

    @property
    def handle(self) -> JobHandle | None:
        """The job of the newest submission; None while there is none, or its id is not known."""
        return None if self.submission is None else self.submission.handle

    @property
    def interrupted(self) -> bool:
        """True when a submitter died (or still waits) between its intent and the job id: the token may be queued."""
        return self.submission is not None and self.submission.job_id is None

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """Attempts as the agent of node 0 wrote them, oldest first."""
        return list(self.sidecar.get("attempts") or ())

    @property
    def last_attempt(self) -> int | None:
        """Number of the newest attempt that left any trace; None before the first one."""
        numbers = [int(row["attempt"]) for row in self.attempts if row.get("attempt") is not None]
        numbers += [int(event["attempt"]) for event in self._traces()]
        numbers += self.logged_attempts
        return max(numbers, default=None)

    def _traces(self) -> Iterable[dict[str, Any]]:
        kinds = ("attempt_started", "resumed", "verdict")
        return (event for event in self.events if event.get("event") in kinds and event.get("attempt") is not None)

    @property
    def sidecar_is_current(self) -> bool:
        """True when the sidecar speaks about the newest submission, not about one before it."""
        numbers = [int(row["attempt"]) for row in self.attempts if row.get("attempt") is not None]
        base = self.submission.attempt_base if self.submission else 0
        return bool(self.sidecar) and max(numbers, default=-1) >= base

    @property
    def elsewhere(self) -> str | None:
        """The machine a local run was started on, when it is not this one: its processes cannot be seen from here."""
        if self.submission is None or self.submission.backend != "local" or not self.attempts:
            return None
        nodes = self.attempts[-1].get("nodes") or ()
        names = [nodes] if isinstance(nodes, str) else list(nodes)
        return str(names[0]) if names and os.uname().nodename not in names else None

    @property
    def heartbeat_fresh(self) -> bool:
        """True while rank 0 has given a sign of life lately."""
        return self.heartbeat_age_s is not None and self.heartbeat_age_s < HEARTBEAT_FRESH_S

    def newest(self, kind: str) -> dict[str, Any] | None:
        """The newest event of a kind."""
        return next((event for event in reversed(self.events) if event.get("event") == kind), None)


def load_record(paths: RunPaths, *, now: float | None = None) -> Record:
    """Read one run directory. Raises RegistryError when a file is there and cannot be read."""
    now = time.time() if now is None else now
    try:
        view = load_run(paths)
        events = tuple(read_events(paths))
        return Record(
            paths=paths,
            sidecar=view.sidecar or {},
            events=events,
            progress=view.progress or {},
            verdict=_newest_verdict(paths),
            submission=_submission(events),
            tombstone=view.cancelled,
            heartbeat_age_s=None if view.heartbeat is None else max(0.0, now - view.heartbeat),
            logged_attempts=_logged_attempts(paths),
            problems=view.problems,
        )
    except OSError as error:
        raise RegistryError(f"cannot read {paths.run_dir}: {error}", hint="is the shared disk mounted here?") from error


def _newest_verdict(paths: RunPaths) -> Mapping[str, Any]:
    found = sorted(paths.run_dir.glob("verdict-[0-9]*[0-9].json"))
    if not found:
        return {}
    try:
        value = read_json(found[-1])
    except FileNotFoundError:
        return {}
    return value if isinstance(value, dict) else {}


def _logged_attempts(paths: RunPaths) -> tuple[int, ...]:
    names = (entry.name for entry in (paths.run_dir / "logs").glob("attempt-*"))
    return tuple(int(match[1]) for name in names if (match := re.fullmatch(r"attempt-(\d+)", name)))


def _submission(events: Iterable[Mapping[str, Any]]) -> Submission | None:
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
    )

"""The runs this one waits for (`after`): where they stand by their own files, and what that means for this run.

Slurm's dependencies only keep a job from starting in vain. They cannot say whether a run is completed: a requeued job
keeps its id, a resumed run has another one.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.paths import RunPaths
from orchestrator.registry import EventLog, load_run, read_events
from orchestrator.registry.submissions import SHOWN_LATE_S, newest_submission, stated
from orchestrator.states import JobState
from orchestrator.worker.scheduler import Scheduler

_LOOK_AGAIN_S = 0.5
_POLL_S = 1.0


@dataclass(frozen=True)
class Upstream:
    """Where a run that is waited for stands. `job_id`: of a run that goes on; `words`: of one that does not."""

    run_id: str
    completed: bool
    job_id: str | None = None
    words: str = ""


def look(
    run_ids: Iterable[str], runs: Path, scheduler: Scheduler, *, sleep: Callable[[float], None] = time.sleep
) -> list[Upstream]:
    """Where each run below the directory `runs` stands. Blocks a few seconds for one that ended without a word."""
    return [_look_twice(RunPaths(runs / run_id), scheduler, sleep) for run_id in run_ids]


def _look_twice(paths: RunPaths, scheduler: Scheduler, sleep: Callable[[float], None]) -> Upstream:
    found = _look(paths, scheduler)
    for _ in range(round(SHOWN_LATE_S / _LOOK_AGAIN_S)):
        if found.words != _LOST:
            break
        sleep(_LOOK_AGAIN_S)
        found = _look(paths, scheduler)
    return found


ENDED = {
    JobState.FAILED: "has failed",
    JobState.CANCELLED: "was cancelled",
    JobState.NEEDS_RESUME: "needs to be resumed",
    JobState.LOST: "is lost",
}
"""What is said of a run that another one waits for in vain."""

_LOST = "ended without a word: see `orch status`, then resume it"


def _look(paths: RunPaths, scheduler: Scheduler) -> Upstream:
    run_id = paths.run_dir.name
    if not paths.run_dir.is_dir():
        return Upstream(run_id, False, words="is not there any more; without it: --set after=[]")
    submission = newest_submission(read_events(paths))
    view = load_run(paths)
    state = stated(view.sidecar or {}, submission)
    if state is JobState.COMPLETED:
        return Upstream(run_id, True)
    if state in (JobState.FAILED, JobState.CANCELLED):
        return _ended(run_id, state)
    if submission is None or submission.job_id is None:  # somebody may be submitting it right now
        return Upstream(run_id, False, words=_LOST)
    held = scheduler.holds(submission.job_id)
    if held is None:
        return Upstream(run_id, False, words="may still run, but the scheduler gave no answer")
    if held:  # one that says needs_resume, too: Slurm may have requeued it by itself
        return Upstream(run_id, False, job_id=submission.job_id)
    if view.cancelled:
        return _ended(run_id, JobState.CANCELLED)
    if state in (JobState.NEEDS_RESUME, JobState.PREEMPTED):
        return _ended(run_id, JobState.NEEDS_RESUME)
    return Upstream(run_id, False, words=_LOST)


def _ended(run_id: str, state: JobState) -> Upstream:
    return Upstream(run_id, False, words=f"{ENDED[state]}; first:  orch resume {run_id}")


def blocked_by(found: Sequence[Upstream]) -> str | None:
    """Why this run cannot start any more; None while it can."""
    return next((f"it waits for {up.run_id}, which {up.words}" for up in found if up.words), None)


def note_waiting(events: EventLog, run_ids: Sequence[str], job_id: str) -> None:
    """Tell `orch status` whom this run waits for."""
    events.append("action", action="waiting_for", runs=list(run_ids), job_id=job_id)


def times_waited(events: Iterable[Mapping[str, Any]], job_id: str) -> int:
    """How often this job went back into the queue without an attempt: restarts that are no attempts."""
    return sum(1 for event in events if event.get("action") == "back_to_wait" and event.get("job_id") == job_id)


def wait_here(
    run_ids: Sequence[str], paths: RunPaths, scheduler: Scheduler, stop_signals: Iterable[signal.Signals]
) -> str | None:
    """The local backend: return when all are completed, or with the reason why this run does not start.

    No deadline: a run may take days. A cancellation, or being told to stop, ends it at once; `stop_signals` are blocked
    by the caller, so that the wait itself takes them.
    """
    while True:
        found = look(run_ids, paths.run_dir.parent, scheduler)
        if all(up.completed for up in found):
            return None
        if (words := blocked_by(found)) is not None:
            return words
        told = signal.sigtimedwait(stop_signals, _POLL_S)
        if paths.tombstone.exists() or told is not None:
            return "it was told to stop while it waited"

"""Where a run is (`JobState`), why an attempt ended (`ExitReason`), and the exit codes that carry it (PROTOCOLS 3)."""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import NamedTuple


class ExitCode(IntEnum):
    """Exit codes of a job; every other value means failure."""

    DONE = 0
    SAVED = 75  # EX_TEMPFAIL: state is saved, may be requeued
    NEVER_RESTART = 93


class JobState(StrEnum):
    """Where a run is. A run that was preempted and waits in the queue is `preempted`, not `failed`."""

    QUEUED = "queued"
    RUNNING = "running"
    PREEMPTED = "preempted"
    NEEDS_RESUME = "needs_resume"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"

    @property
    def terminal(self) -> bool:
        """True when no process of ours will change the state again without a person asking."""
        return self not in (JobState.QUEUED, JobState.RUNNING, JobState.PREEMPTED)


class _Consequence(NamedTuple):
    state: JobState  # the run's state when no further attempt follows
    retry: str | None  # field of `retry:`/`preemption:` in the spec that caps requeues; None = never requeue
    message: str


class ExitReason(StrEnum):
    """Why an attempt ended; each member knows the final state, the cap on requeues, and what to tell people."""

    COMPLETED = "completed"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time_limit"
    NODE_FAILURE = "node_failure"
    REQUEUED_BY_ADMIN = "requeued_by_admin"
    CANCELLED = "cancelled"
    OUT_OF_MEMORY = "out_of_memory"
    FAILURE = "failure"
    HUNG = "hung"
    NO_PROGRESS = "no_progress"
    REQUEUE_LIMIT = "requeue_limit"
    FENCED = "fenced"
    LAUNCH_FAILURE = "launch_failure"
    CONTAINER_FAILURE = "container_failure"
    CHECKPOINT_FAILURE = "checkpoint_failure"
    DEADLINE_MISSED = "deadline_missed"
    DEPENDENCY_FAILED = "dependency_failed"

    @property
    def state(self) -> JobState:
        """The run's state when this was the last attempt."""
        return _CONSEQUENCES[self].state

    @property
    def retry(self) -> str | None:
        """Name of the cap that limits automatic requeues after this reason; None = never."""
        return _CONSEQUENCES[self].retry

    @property
    def message(self) -> str:
        """One sentence for people: what happened and what it means for the work."""
        return _CONSEQUENCES[self].message


_CONSEQUENCES: dict[ExitReason, _Consequence] = {
    ExitReason.COMPLETED: _Consequence(JobState.COMPLETED, None, "finished"),
    ExitReason.PREEMPTED: _Consequence(JobState.NEEDS_RESUME, "max_requeues", "preempted"),
    ExitReason.TIME_LIMIT: _Consequence(JobState.NEEDS_RESUME, "time_limit", "reached its time limit"),
    ExitReason.NODE_FAILURE: _Consequence(JobState.NEEDS_RESUME, "node_failure", "lost a node"),
    ExitReason.REQUEUED_BY_ADMIN: _Consequence(JobState.NEEDS_RESUME, "max_requeues", "requeued by an administrator"),
    ExitReason.CANCELLED: _Consequence(JobState.CANCELLED, None, "cancelled"),
    ExitReason.OUT_OF_MEMORY: _Consequence(JobState.FAILED, "out_of_memory", "ran out of memory"),
    ExitReason.FAILURE: _Consequence(JobState.FAILED, "failure", "the program failed"),
    ExitReason.HUNG: _Consequence(JobState.FAILED, "hung", "made no step within the watchdog's time"),
    ExitReason.NO_PROGRESS: _Consequence(JobState.FAILED, None, "three attempts in a row made no new step"),
    ExitReason.REQUEUE_LIMIT: _Consequence(JobState.NEEDS_RESUME, None, "used up its automatic requeues"),
    ExitReason.FENCED: _Consequence(JobState.FAILED, None, "a newer attempt has taken over this run"),
    ExitReason.LAUNCH_FAILURE: _Consequence(JobState.FAILED, "failure", "the launcher could not start the program"),
    ExitReason.CONTAINER_FAILURE: _Consequence(JobState.FAILED, "failure", "the container could not be started"),
    ExitReason.CHECKPOINT_FAILURE: _Consequence(JobState.FAILED, "failure", "could not write or read a checkpoint"),
    ExitReason.DEADLINE_MISSED: _Consequence(
        JobState.NEEDS_RESUME, "max_requeues", "was stopped before a save was complete; the previous checkpoint stands"
    ),
    ExitReason.DEPENDENCY_FAILED: _Consequence(
        JobState.NEEDS_RESUME, None, "a run it waits for ended without completing"
    ),
}

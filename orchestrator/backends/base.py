"""What `operations` needs of a backend: five hooks, one batched poll, no state of its own between calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from orchestrator.plan import Plan


class SchedulerState(StrEnum):
    """Where the scheduler believes a job is; what became of the *run* is written in its run directory."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETING = "completing"
    ENDED = "ended"
    UNKNOWN = "unknown"  # the scheduler answered and does not know the job (no answer raises SchedulerUnavailable)

    @property
    def alive(self) -> bool:
        """True while the scheduler still holds the job: another attempt would be a second writer."""
        return self in (SchedulerState.PENDING, SchedulerState.RUNNING, SchedulerState.COMPLETING)


@dataclass(frozen=True)
class JobHandle:
    """Names one submitted job; written into the `submitted` event, so any later process can build it again."""

    backend: str
    job_id: str


@dataclass(frozen=True)
class JobStatus:
    """One answer of `Backend.poll`. `reason` is in the scheduler's own words; times are unix seconds."""

    state: SchedulerState
    reason: str = ""
    nodes: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None  # true deadline of a running job, where the scheduler tells


@dataclass(frozen=True)
class Command:
    """A command line and the environment to start it with."""

    argv: tuple[str, ...]
    environ: Mapping[str, str]


class Backend(Protocol):
    """A way to run a `Plan`. Every call is bounded by a deadline and raises only `BackendError`."""

    @property
    def name(self) -> str: ...

    def submit(self, plan: Plan, *, environ: Mapping[str, str]) -> JobHandle:
        """Start or queue the plan whose files already lie in its run directory; exactly once per `plan.token`."""
        ...

    def find(self, token: str) -> JobHandle | None:
        """The live job that was submitted with this token, if the scheduler holds one."""
        ...

    def poll(self, handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        """One question for all handles. Raises SchedulerUnavailable when nobody answers in time."""
        ...

    def cancel(self, handle: JobHandle) -> None:
        """Stop the job for good; cancelling a job that has already ended is not an error."""
        ...

    def signal(self, handle: JobHandle, signal: str) -> None:
        """Deliver a signal ("USR1") to the agents of a running job. Raises BackendError if it is not running."""
        ...

    def beside(
        self,
        handle: JobHandle,
        argv: Sequence[str],
        *,
        nodes: Sequence[str],
        environ: Mapping[str, str],
        terminal: bool = False,
    ) -> Command:
        """What runs `argv` once on each of `nodes` beside a running job: takes nothing from it and never ends it.

        `terminal`: standard streams are a person's terminal, to be handed through.
        """
        ...

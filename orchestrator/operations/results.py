"""What the operations return: frozen dataclasses; `as_json()` is the document that `--json` prints (docs/cli.md)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.states import ExitReason, JobState

STRAGGLER_FACTOR = 1.5
STRAGGLER_LEAST_S = 0.005


@dataclass(frozen=True)
class Submitted:
    """Outcome of submit and resume. `action` says whether anything was queued."""

    run_id: str
    run_dir: Path
    backend: str
    job_id: str | None
    action: str  # submitted | resumed | already_queued | already_running | already_completed
    step: int | None = None
    summary: str = ""  # "preempt, 2 nodes × 4 GPUs, 4 h"
    warnings: tuple[str, ...] = ()

    @property
    def queued_now(self) -> bool:
        """True when this call put a job in the queue."""
        return self.action in ("submitted", "resumed")

    def as_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "run_dir": str(self.run_dir),
            "backend": self.backend,
            "job_id": self.job_id,
            "action": self.action,
        }


@dataclass(frozen=True)
class Progress:
    """Rank 0's last word on the current attempt; None where it has not said anything yet."""

    step: int | None = None
    epoch: int | None = None
    max_steps: int | None = None
    throughput: float | None = None
    rank_seconds: tuple[float, ...] = ()  # of a step, by rank: what each does before it may wait for others
    attempt: int | None = None
    time: float | None = None

    @property
    def straggler(self) -> tuple[int, float, float] | None:
        """(rank, its seconds, the others' median) where one rank makes all others wait; None where none stands out."""
        if len(self.rank_seconds) < 2:
            return None
        from statistics import median  # 3 ms that a status of one rank need not pay

        slowest = max(range(len(self.rank_seconds)), key=self.rank_seconds.__getitem__)
        others = median([s for rank, s in enumerate(self.rank_seconds) if rank != slowest])
        mine = self.rank_seconds[slowest]
        stands_out = mine > STRAGGLER_FACTOR * others and mine - others > STRAGGLER_LEAST_S
        return (slowest, mine, others) if stands_out else None

    def as_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "max_steps": self.max_steps,
            "rank_seconds": list(self.rank_seconds),
        }


@dataclass(frozen=True)
class CheckpointRef:
    """The newest committed checkpoint as the events tell it."""

    step: int
    path: str | None
    time: float | None = None
    size_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {"step": self.step, "path": self.path}


@dataclass(frozen=True)
class Attempt:
    """One scheduler execution of the run. Times are unix seconds; steps count optimizer steps."""

    number: int
    job_id: str | None = None
    nodes: tuple[str, ...] = ()
    started: float | None = None
    ended: float | None = None
    outcome: str | None = None
    exit_reason: ExitReason | None = None
    step_start: int | None = None
    step_end: int | None = None
    saved_in_s: float | None = None
    steps_lost: int | None = None
    resumed_step: int | None = None
    start_from: str | None = None  # the checkpoint of somebody else's training that it began with
    exit_code: int | None = None


@dataclass(frozen=True)
class RunStatus:
    """Everything `orch status` shows of one run."""

    run_id: str
    run_dir: Path
    name: str
    state: JobState
    exit_reason: ExitReason | None
    message: str
    attempt: int | None
    backend: str
    job_id: str | None
    nodes: tuple[str, ...]
    alive: bool
    deadline: float | None
    progress: Progress
    last_checkpoint: CheckpointRef | None
    resumed_from: dict[str, Any] | None
    attempts: tuple[Attempt, ...]
    events: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...] = ()
    drill: dict[str, Any] | None = None  # the certificate of the newest drill
    lost_step: int | None = None  # of a checkpoint newer than the last one, that is gone or damaged

    @property
    def succeeded(self) -> bool:
        """True only for a run that is done: what `wait` and `--follow` make their exit code of."""
        return self.state is JobState.COMPLETED

    def as_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "run_dir": str(self.run_dir),
            "state": self.state.value,
            "exit_reason": None if self.exit_reason is None else self.exit_reason.value,
            "attempt": self.attempt,
            "job_id": self.job_id,
            "alive": self.alive,
            "progress": self.progress.as_json(),
            "last_checkpoint": None if self.last_checkpoint is None else self.last_checkpoint.as_json(),
            "resumed_from": self.resumed_from,
            "drill": self.drill,
            "events": list(self.events),
        }


@dataclass(frozen=True)
class RunRow:
    """One line of `orch ps`."""

    run_id: str
    run_dir: Path
    state: JobState
    attempt: int | None
    job_id: str | None
    backend: str
    step: int | None
    max_steps: int | None
    submitted: float | None
    message: str = ""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "run_dir": str(self.run_dir), "state": self.state.value}


@dataclass(frozen=True)
class Waited:
    """Outcome of `wait`: the last status, and whether the time was up before the run ended."""

    status: RunStatus
    timed_out: bool

    def as_json(self) -> dict[str, Any]:
        return {**self.status.as_json(), "timed_out": self.timed_out}


@dataclass(frozen=True)
class Cancelled:
    """Outcome of `cancel`: cancelled | cancelling | already_cancelled | already_completed."""

    run_id: str
    run_dir: Path
    job_id: str | None
    action: str
    step: int | None = None
    lost_step: int | None = None  # as in RunStatus

    def as_json(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "run_dir": str(self.run_dir), "job_id": self.job_id, "action": self.action}


@dataclass(frozen=True)
class Signalled:
    """Outcome of `preempt`: the drill's signal has been sent to a running job."""

    run_id: str
    run_dir: Path
    job_id: str
    signal: str
    attempt: int | None
    lead_time_s: int
    time: float

    def as_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "run_dir": str(self.run_dir),
            "job_id": self.job_id,
            "signal": self.signal,
            "attempt": self.attempt,
        }


@dataclass(frozen=True)
class Told:
    """One node's agent, as it was told to stop. `at` and `deadline` are unix seconds on that node's clock."""

    node: str
    signals: tuple[str, ...]
    cause: str | None
    at: float
    deadline: float


@dataclass(frozen=True)
class Certificate:
    """What a drill has shown about one job on one cluster. Seconds and bytes; None where it was not seen."""

    run_id: str
    run_dir: Path
    job_id: str
    signal: str
    time: float
    attempt: int
    reasons: tuple[str, ...]  # why it failed, in words; empty when it passed
    told: tuple[Told, ...]
    grace_used_s: float | None = None
    grace_s: float | None = None
    save_s: float | None = None
    size_bytes: int | None = None
    step_saved: int | None = None
    next_attempt: int | None = None
    requeue_wait_s: float | None = None
    startup_s: float | None = None
    step_resumed: int | None = None
    step_made: int | None = None
    steps_lost: int | None = None
    checkpoint: str | None = None
    verified: bool = False
    verify_s: float | None = None

    @property
    def passed(self) -> bool:
        return not self.reasons

    @property
    def exact(self) -> bool:
        """True when the next attempt went on at the very step at which this one had stopped."""
        return self.step_resumed is not None and self.step_resumed == self.step_saved

    def as_json(self) -> dict[str, Any]:
        fields = {**asdict(self), "run_dir": str(self.run_dir), "exact": self.exact}
        return {"version": 1, "verdict": "PASS" if self.passed else "FAIL", **fields}


@dataclass(frozen=True)
class Validated:
    """Outcome of `validate`: a spec that loads, with what was noticed about it."""

    name: str
    run_id: str
    code_hash: str
    code_files: int
    code_bytes: int
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "valid": True,
            "name": self.name,
            "run_id": self.run_id,
            "code": {"hash": self.code_hash, "files": self.code_files, "bytes": self.code_bytes},
            "warnings": list(self.warnings),
            "problems": [],
        }


@dataclass(frozen=True)
class GpuUse:
    """What one rank uses of one GPU; `percent` is the whole GPU's."""

    index: int
    percent: int | None
    bytes: int


@dataclass(frozen=True)
class RankUse:
    """What one rank uses, with everything it has started. CPU in percent of one core; memory in bytes."""

    rank: int
    node: str
    pid: int
    processes: int
    cpu_percent: float
    rss_bytes: int
    gpus: tuple[GpuUse, ...] = ()


@dataclass(frozen=True)
class Usage:
    """One look at all ranks. `limit_bytes` is a node's (and its container's) share of memory; None without a limit."""

    run_id: str
    attempt: int | None
    step: int | None
    time: float
    limit_bytes: int | None
    ranks: tuple[RankUse, ...]
    silent: tuple[str, ...] = ()  # nodes that have not answered

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

"""A backend in memory, and an agent that writes what a real one would."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.backends.base import Backend, Command, JobHandle, JobStatus, SchedulerState
from orchestrator.errors import BackendError, SchedulerUnavailable
from orchestrator.files import write_json
from orchestrator.paths import RunPaths
from orchestrator.plan import Plan
from orchestrator.registry import EventLog


@dataclass
class FakeBackend:
    """Jobs are states in a dictionary; `down` and `refuse` are the faults."""

    name: str = "slurm"
    states: dict[str, JobStatus] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)
    signals: list[tuple[str, str]] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    down: bool = False
    refuse: str = ""
    lose_answer: bool = False  # the job is queued, and nobody learns its id
    interrupt: bool = False  # the same, because of Ctrl-C
    secrets_seen: list[str] = field(default_factory=list)
    polls: int = 0
    step: tuple[str, ...] = ()  # what is run instead of a command beside the job
    steps: list[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=list)

    def open(self, name: str) -> Backend:
        return self

    def submit(self, plan: Plan, *, environ: Mapping[str, str]) -> JobHandle:
        if self.down:
            raise SchedulerUnavailable("no answer")
        if self.refuse:
            raise BackendError(self.refuse, hint="a fix")
        secrets = RunPaths(plan.run_dir).secrets
        self.secrets_seen.append(secrets.read_text() if secrets.exists() else "")
        self.plans.append(plan)
        job_id = str(100 + len(self.plans))
        self.tokens[plan.token] = job_id
        self.set(job_id, SchedulerState.PENDING, "Resources")
        if self.interrupt:
            raise KeyboardInterrupt
        if self.lose_answer:
            raise SchedulerUnavailable("sbatch gave no answer; whether the job was queued is not known")
        return JobHandle(self.name, job_id)

    def set(self, job_id: str, state: SchedulerState, reason: str = "") -> None:
        self.states[job_id] = JobStatus(state, reason, ("n1",))

    def find(self, token: str) -> JobHandle | None:
        if self.down:
            raise SchedulerUnavailable("no answer")
        job_id = self.tokens.get(token)
        return None if job_id is None else JobHandle(self.name, job_id)

    def poll(self, handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        self.polls += 1
        if self.down:
            raise SchedulerUnavailable("no answer")
        return {handle: self.states.get(handle.job_id, JobStatus(SchedulerState.UNKNOWN)) for handle in handles}

    def cancel(self, handle: JobHandle) -> None:
        if self.down:
            raise SchedulerUnavailable("no answer")
        if handle.job_id in self.states:
            self.set(handle.job_id, SchedulerState.ENDED, "CANCELLED")

    def signal(self, handle: JobHandle, signal: str) -> None:
        self.signals.append((handle.job_id, signal))

    def beside(
        self,
        handle: JobHandle,
        argv: Sequence[str],
        *,
        nodes: Sequence[str],
        environ: Mapping[str, str],
        terminal: bool = False,
    ) -> Command:
        self.steps.append((tuple(nodes), tuple(argv)))
        return Command(tuple(self.step or argv), environ)


class FakeAgent:
    """Writes the sidecar and the events of attempts, as node 0's agent and rank 0 do."""

    def __init__(self, paths: RunPaths) -> None:
        self.paths = paths
        self.rows: list[dict[str, Any]] = []

    def begin(self, attempt: int, *, resumed: int | None = None, job_id: str = "101") -> None:
        self.rows.append({"attempt": attempt, "job_id": job_id, "nodes": ["n1"], "started": time.time() - 60})
        self.paths.logs(attempt).mkdir(parents=True, exist_ok=True)
        self._write("running", None, None)
        log = EventLog(self.paths, f"rank0-{attempt}")
        log.append("attempt_started", attempt=attempt)
        if resumed is not None:
            log.append("resumed", attempt=attempt, step=resumed, from_attempt=attempt - 1, checkpoint="/c", skipped=[])

    def commit(self, attempt: int, step: int) -> None:
        EventLog(self.paths, f"rank0-{attempt}").append(
            "checkpoint_committed", attempt=attempt, step=step, epoch=0, path=f"/ckpt/step-{step}", seconds=0.1
        )

    def stop(self, attempt: int, step: int) -> None:
        """Rank 0's verdict after the save of a stop."""
        EventLog(self.paths, f"rank0-{attempt}").append("verdict", attempt=attempt, outcome="saved", step=step)

    def end(
        self, status: str, reason: str, *, step: int | None = None, saved_in_s: float | None = None, message: str = ""
    ) -> None:
        self.rows[-1].update(
            ended=time.time(), exit_reason=reason, step_end=step, saved_in_s=saved_in_s, step_start=0, message=message
        )
        self.paths.secrets.unlink(missing_ok=True)
        self._write(status, reason, message)

    def _write(self, status: str, reason: str | None, message: str | None) -> None:
        self.paths.run_dir.mkdir(parents=True, exist_ok=True)
        document = {
            "version": 1,
            "run_id": self.paths.run_dir.name,
            "name": "job",
            "backend": "slurm",
            "job_id": self.rows[-1]["job_id"],
            "status": status,
            "exit_reason": reason,
            "message": message,
            "attempts": self.rows,
            "requeues": {},
            "hparams": {},
            "summary": {},
            "best_checkpoint": None,
        }
        write_json(self.paths.sidecar, document)

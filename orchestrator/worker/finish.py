"""The run's book of attempts: opened and closed on node 0, written to the sidecar; carries out what `decision` says."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import RegistryError
from orchestrator.files import read_json
from orchestrator.paths import RunPaths
from orchestrator.registry import EventLog, SidecarWriter, load_sidecar, read_events
from orchestrator.states import ExitReason, JobState
from orchestrator.worker import decision as decisions
from orchestrator.worker.decision import Decision, Evidence, Outcome, decide, judge
from orchestrator.worker.scheduler import Scheduler, SlurmScheduler


class AttemptBook:
    """Opens and closes attempts in sidecar.json. One owner at a time: the agent of node 0, then the batch script."""

    def __init__(self, paths: RunPaths, orders: Mapping[str, Any]) -> None:
        self.paths = paths
        self.orders = orders
        self.events = EventLog(paths, "agent-n0")

    # --- opening
    def open(self, attempt: int, job_id: str, nodes: str) -> None:
        """Record that an attempt starts; close what a killed node left open."""
        sidecar = self._load()
        for earlier in sidecar["attempts"]:
            if earlier["ended"] is None:
                self._close_abandoned(earlier)
        sidecar["attempts"].append(
            {
                "attempt": attempt,
                "job_id": job_id,
                "nodes": nodes,
                "started": time.time(),
                "ended": None,
                "exit_reason": None,
                "message": None,
                "step_start": None,
                "step_end": None,
                "saved_in_s": None,
                "resumed_from": None,
                "exit_code": None,
            }
        )
        sidecar.update(status=JobState.RUNNING.value, job_id=job_id, exit_reason=None, message=None)
        SidecarWriter(self.paths).write(sidecar)
        self.events.append("attempt_started", attempt=attempt, job_id=job_id, nodes=nodes)

    def _load(self) -> dict[str, Any]:
        orders = self.orders
        return load_sidecar(self.paths) or {
            "version": 1,
            "run_id": orders["run_id"],
            "name": orders["name"],
            "backend": orders["backend"],
            "job_id": None,
            "status": JobState.QUEUED.value,
            "exit_reason": None,
            "message": None,
            "attempts": [],
            "hparams": {},
            "summary": {},
            "best_checkpoint": None,
        }

    def _close_abandoned(self, record: dict[str, Any]) -> None:
        """An attempt whose node-0 agent never came to its end: Slurm requeued it over our heads."""
        verdict = read_verdict(self.paths, record["attempt"])
        saved = verdict is not None and verdict["outcome"] == "saved"
        reason = ExitReason.PREEMPTED if saved else ExitReason.NODE_FAILURE
        self._fill(record, Outcome(reason, reason.message, None, saved), verdict)

    # --- closing
    def close(self, attempt: int, scheduler: Scheduler, *, srun_status: int | None = None) -> Decision:
        """Judge the attempt, write what follows, and carry it out. The requeue comes last: it may end this process."""
        sidecar = self._load()
        record = next(item for item in reversed(sidecar["attempts"]) if item["attempt"] == attempt)
        evidence = self._evidence(attempt, scheduler)
        outcome = judge(evidence)
        self._fill(record, outcome, read_verdict(self.paths, attempt), srun_status)
        decision = decide(
            outcome, attempts=sidecar["attempts"], caps=self.orders["caps"], silent=evidence.scheduler_silent
        )
        if outcome.reason is ExitReason.FENCED:
            # The run belongs to the newer attempt: its sidecar must not hear of our end.
            self.events.append("finished", attempt=attempt, exit_reason=outcome.reason.value, message=outcome.message)
            return decision
        self._write(sidecar, decision, attempt)
        if decision.requeue:
            answer = scheduler.requeue()
            if answer.ok:
                self.events.append("requeued", attempt=attempt, exit_reason=outcome.reason.value)
            else:
                message = f"{outcome.message}; the scheduler refused to requeue it: {answer.message}"
                decision = Decision(False, JobState.NEEDS_RESUME, outcome.reason, message)
                self._write(sidecar, decision, attempt)
        return decision

    def _write(self, sidecar: dict[str, Any], decision: Decision, attempt: int) -> None:
        if decision.state.terminal:
            # Before the terminal state is visible: whoever sees `completed` may rely on the secrets being gone.
            self.paths.secrets.unlink(missing_ok=True)
        sidecar.update(status=decision.state.value, exit_reason=decision.reason.value, message=decision.message)
        SidecarWriter(self.paths).write(sidecar)
        if not decision.requeue:
            kind = "cancelled" if decision.state is JobState.CANCELLED else "finished"
            self.events.append(
                kind,
                attempt=attempt,
                state=decision.state.value,
                exit_reason=decision.reason.value,
                message=decision.message,
            )

    def _fill(
        self,
        record: dict[str, Any],
        outcome: Outcome,
        verdict: Mapping[str, Any] | None,
        srun_status: int | None = None,
    ) -> None:
        progress = self._progress(record["attempt"])
        resumed = next(
            (
                e
                for e in reversed(read_events(self.paths))
                if e["event"] == "resumed" and e["attempt"] == record["attempt"]
            ),
            None,
        )
        record.update(
            ended=time.time(),
            exit_reason=outcome.reason.value,
            message=outcome.message,
            step_start=resumed.get("step") if resumed is not None else record["step_start"] or 0,
            step_end=outcome.step if outcome.step is not None else progress,
            saved_in_s=verdict.get("saved_in_s") if verdict is not None else None,
            resumed_from=resumed,
            exit_code=srun_status,
        )

    def _progress(self, attempt: int) -> int | None:
        with contextlib.suppress(FileNotFoundError):  # it made no step
            progress = read_json(self.paths.progress)
            if progress["attempt"] == attempt:
                return int(progress["step"])
        return None

    # --- what was found
    def _evidence(self, attempt: int, scheduler: Scheduler) -> Evidence:
        events = [e for e in read_events(self.paths) if e.get("attempt") == attempt]
        codes = {int(e["node"]): int(e["exit_code"]) for e in events if e["event"] == "verdict" and "node" in e}
        notices = [e for e in events if e["event"] == "signalled" and e.get("cause") is not None]
        signalled = any(e["event"] == "signalled" for e in events)
        cause = ExitReason(notices[-1]["cause"]) if notices else None
        ended_well = len(codes) == self.orders["nodes"] and not any(codes.values())
        silent = False
        if cause is None and not ended_well and isinstance(scheduler, SlurmScheduler):
            job = scheduler.show_job()
            if job is not None and job.get("JobState") != "RUNNING":
                cause = scheduler.why(float(self.orders["lead_time_s"])).cause
            silent = signalled and job is None
        failures = [*self.paths.rank_verdicts(attempt), *self.paths.node_verdicts(attempt)]
        return Evidence(
            tombstone=self.paths.tombstone.exists(),
            verdict=read_verdict(self.paths, attempt),
            failures=[read_json(path) for path in failures],
            node_codes=codes,
            nodes=self.orders["nodes"],
            cause=cause,
            scheduler_silent=silent,
        )

    @staticmethod
    def exit_code(decision: Decision) -> int:
        """Exit code of the batch script."""
        return decisions.exit_code(decision)


def read_verdict(paths: RunPaths, attempt: int) -> dict[str, Any] | None:
    try:
        verdict: dict[str, Any] = read_json(paths.verdict(attempt))
        return verdict
    except FileNotFoundError:
        return None
    except RegistryError as error:
        raise RegistryError(f"the verdict of attempt {attempt} cannot be read: {error}") from error

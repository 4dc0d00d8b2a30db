"""The run's book of attempts: opened and closed on node 0, written to the sidecar; carries out what `decision` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.errors import RegistryError
from orchestrator.files import read_json
from orchestrator.paths import RunPaths
from orchestrator.registry import EventLog, SidecarWriter, read_events
from orchestrator.states import ExitReason, JobState
from orchestrator.worker.decision import Decision, Evidence, Outcome, decide, judge
from orchestrator.worker.scheduler import Requeued, Scheduler


class AttemptBook:
    """Opens and closes attempts in sidecar.json. One owner at a time: the agent of node 0, then the batch script."""

    def __init__(self, paths: RunPaths, orders: Mapping[str, Any]) -> None:
        self.paths = paths
        self.orders = orders
        self.events = EventLog(paths, "agent-n0")

    # --- opening
    def open(self, attempt: int, job_id: str, nodes: Sequence[str]) -> None:
        """Record that an attempt starts; close what a killed node left open."""
        sidecar = SidecarWriter(self.paths)
        # Together: an attempt that is open beside a state that has ended would read as an end of that attempt.
        with sidecar.one_write():
            for earlier in sidecar.data["attempts"]:
                if earlier["ended"] is None and earlier["attempt"] != attempt:
                    self._end(sidecar, earlier["attempt"], self._judge_abandoned(earlier["attempt"]))
            sidecar.begin_attempt(attempt, job_id=job_id, nodes=nodes)
            orders = self.orders
            sidecar.update(
                run_id=orders["run_id"],
                name=orders["name"],
                backend=orders["backend"],
                job_id=job_id,
                status=JobState.RUNNING.value,
                exit_reason=None,
                message=None,
            )
        self.events.append("attempt_started", attempt=attempt, job_id=job_id, nodes=list(nodes))

    def _judge_abandoned(self, attempt: int) -> Outcome:
        """An attempt whose node 0 never came to its end: Slurm requeued it over our heads, ended it before it could
        write down why (KillWait), or the node died. What it was told and what it said still count."""
        events = [e for e in read_events(self.paths) if e.get("attempt") == attempt]
        evidence = Evidence(
            tombstone=False,  # a later attempt begins: it has been lifted
            verdict=read_verdict(self.paths, attempt),
            failures=[],
            node_codes={},
            nodes=self.orders["nodes"],
            started=True,
            cause=_noticed_cause(events),
        )
        return judge(evidence)

    def refuse(self, job_id: str, reason: ExitReason, message: str) -> Decision:
        """End this submission before its first attempt: nothing is counted, nothing follows by itself."""
        sidecar, orders = SidecarWriter(self.paths), self.orders
        decision = Decision(False, reason.state, reason, message)
        with sidecar.one_write():
            sidecar.update(run_id=orders["run_id"], name=orders["name"], backend=orders["backend"], job_id=job_id)
            self._write(sidecar, decision)
        return self._announce(decision, None)

    # --- closing
    def close(self, attempt: int, scheduler: Scheduler, *, srun_status: int | None = None) -> Decision:
        """Judge the attempt, write what follows, and carry it out. The requeue comes last: it may end this process."""
        sidecar = SidecarWriter(self.paths)
        newest = max((int(entry["attempt"]) for entry in sidecar.data["attempts"]), default=attempt)
        if newest > attempt:
            # A node that was given up for dead is back: the run, its sidecar and its job belong to the next attempt.
            return self._fenced(attempt, Outcome(ExitReason.FENCED, f"attempt {newest} has taken over", None, False))
        if attempt not in {entry["attempt"] for entry in sidecar.data["attempts"]}:
            # srun never brought the agent up (no such interpreter, a node that refuses steps).
            sidecar.begin_attempt(attempt, job_id=scheduler.job_id)
        evidence = self._evidence(attempt, scheduler)
        outcome = judge(evidence)
        if outcome.reason is ExitReason.FENCED:
            return self._fenced(attempt, outcome)
        with sidecar.one_write():
            self._end(sidecar, attempt, outcome, srun_status)
            decision = decide(
                outcome,
                attempts=self._since_submitted(sidecar),
                caps=self.orders["caps"],
                silent=evidence.scheduler_silent,
                backoff_s=self.orders["backoff_s"],
            )
            if decision.requeue:
                sidecar.count_requeue(outcome.reason.value)
            self._write(sidecar, decision)
        if decision.requeue:
            return self._requeue(sidecar, decision, attempt, scheduler)
        return self._announce(decision, attempt)

    def _since_submitted(self, sidecar: SidecarWriter) -> list[dict[str, Any]]:
        """The attempts that count against the caps: a run whose cap was spent must not stop at every notice for ever
        after a person has resumed it."""
        base = self.orders["attempt_base"]
        return [entry for entry in sidecar.data["attempts"] if entry["attempt"] >= base]

    def _fenced(self, attempt: int, outcome: Outcome) -> Decision:
        """The run belongs to the newer attempt: its sidecar must not hear of our end."""
        self._finished("finished", attempt, outcome.reason.state, outcome.reason, outcome.message)
        return decide(outcome, attempts=(), caps=self.orders["caps"])

    def _requeue(self, sidecar: SidecarWriter, decision: Decision, attempt: int, scheduler: Scheduler) -> Decision:
        # The tombstone may have come since the evidence was read; a later one is seen by the next attempt.
        cancelled = self.paths.tombstone.exists()
        answer = Requeued(ok=False, cancelled=True)
        if not cancelled:
            answer = scheduler.requeue(decision.delay_s, self._grace_end(attempt))
        if answer.ok:
            reason = decision.reason.value
            self.events.append("requeued", attempt=attempt, exit_reason=reason, delay_s=decision.delay_s)
            return decision
        if answer.cancelled:
            reason = ExitReason.CANCELLED
            stopped = Decision(False, reason.state, reason, reason.message)
            self._write(sidecar, stopped)
            return self._announce(stopped, attempt)
        message = f"{decision.message}; the scheduler refused to requeue it: {answer.message}"
        refused = Decision(False, JobState.NEEDS_RESUME, decision.reason, message)
        self._write(sidecar, refused)
        return self._announce(refused, attempt)

    def _grace_end(self, attempt: int) -> float | None:
        """Until when a preempted job might go on, as its agents were told."""
        notices = (e for e in read_events(self.paths) if e["event"] == "signalled" and e.get("attempt") == attempt)
        return max((float(e["grace_end"]) for e in notices if e.get("grace_end") is not None), default=None)

    def _write(self, sidecar: SidecarWriter, decision: Decision) -> None:
        if decision.state.terminal:
            # Before the terminal state is visible: whoever sees `completed` may rely on the secrets being gone.
            self.paths.secrets.unlink(missing_ok=True)
        sidecar.update(status=decision.state.value, exit_reason=decision.reason.value, message=decision.message)

    def _announce(self, decision: Decision, attempt: int | None) -> Decision:
        """The end of the submission as an event, once the state is written."""
        kind = "cancelled" if decision.state is JobState.CANCELLED else "finished"
        self._finished(kind, attempt, decision.state, decision.reason, decision.message)
        return decision

    def _finished(self, event: str, attempt: int | None, state: JobState, reason: ExitReason, message: str) -> None:
        self.events.append(event, attempt=attempt, state=state.value, exit_reason=reason.value, message=message)

    def _end(self, sidecar: SidecarWriter, attempt: int, outcome: Outcome, srun_status: int | None = None) -> None:
        verdict = read_verdict(self.paths, attempt)
        resumed = next(
            (e for e in reversed(read_events(self.paths)) if e["event"] == "resumed" and e.get("attempt") == attempt),
            None,
        )
        sidecar.end_attempt(
            attempt,
            outcome=verdict["outcome"] if verdict is not None else None,
            exit_reason=outcome.reason.value,
            message=outcome.message,
            step_start=resumed["step"] if resumed is not None else 0,
            step_end=outcome.step if outcome.step is not None else self._progress(attempt),
            saved_in_s=verdict.get("saved_in_s") if verdict is not None else None,
            resumed_from=resumed,
            exit_code=srun_status,
        )

    def _progress(self, attempt: int) -> int | None:
        try:
            progress = read_json(self.paths.progress)
        except (OSError, RegistryError):  # it made no step; and progress is for people: no attempt stays open over it
            return None
        mine = isinstance(progress, dict) and progress.get("attempt") == attempt
        return progress["step"] if mine and isinstance(progress.get("step"), int) else None

    # --- what was found
    def _evidence(self, attempt: int, scheduler: Scheduler) -> Evidence:
        events = [e for e in read_events(self.paths) if e.get("attempt") == attempt]
        codes = {int(e["node"]): int(e["exit_code"]) for e in events if e["event"] == "verdict" and "node" in e}
        signalled = any(e["event"] == "signalled" for e in events)
        cause = _noticed_cause(events)
        ended_well = len(codes) == self.orders["nodes"] and not any(codes.values())
        if cause is None and not ended_well:
            cause = scheduler.why_ended(noticed=signalled, lead_time_s=float(self.orders["lead_time_s"]))
        failures = [*self.paths.rank_verdicts(attempt), *self.paths.node_verdicts(attempt)]
        return Evidence(
            tombstone=self.paths.tombstone.exists(),
            verdict=read_verdict(self.paths, attempt),
            failures=[read_json(path) for path in failures],
            node_codes=codes,
            nodes=self.orders["nodes"],
            started=any(e["event"] == "attempt_started" for e in events),
            cause=cause,
            scheduler_silent=signalled and cause is None and not ended_well,
        )


def _noticed_cause(events: Sequence[Mapping[str, Any]]) -> ExitReason | None:
    """What the scheduler last said about why the attempt is to stop."""
    causes = [e["cause"] for e in events if e["event"] == "signalled" and e.get("cause") is not None]
    return ExitReason(causes[-1]) if causes else None


def read_verdict(paths: RunPaths, attempt: int) -> dict[str, Any] | None:
    """Rank 0's verdict of an attempt, None when it left none. Raises RegistryError naming the attempt."""
    try:
        verdict: dict[str, Any] = read_json(paths.verdict(attempt))
        return verdict
    except FileNotFoundError:
        return None
    except RegistryError as error:
        raise RegistryError(f"the verdict of attempt {attempt} cannot be read: {error}") from error

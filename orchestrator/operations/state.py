"""Where a run is: the run directory's own word, corrected by what the scheduler knows (PROTOCOLS 2, "Alive")."""

from __future__ import annotations

import time
from dataclasses import dataclass

from orchestrator.backends.base import JobStatus, SchedulerState
from orchestrator.operations.record import Record
from orchestrator.registry.submissions import SHOWN_LATE_S
from orchestrator.states import ExitReason, JobState
from orchestrator.worker.decision import Evidence, judge


@dataclass(frozen=True)
class Standing:
    """The answer for people: `message` is empty when the state says it all."""

    state: JobState
    alive: bool
    exit_reason: ExitReason | None = None
    message: str = ""


def resolve(record: Record, job: JobStatus | None) -> Standing:
    """Combine both. `job` is None when the scheduler could not be asked (then the heartbeat decides what lives)."""
    alive = _alive(record, job)
    standing = _resolve_alive(record, job) if alive else _resolve_ended(record, job)
    if standing.exit_reason is None and standing.state not in (JobState.QUEUED, JobState.RUNNING):
        return Standing(standing.state, alive, _last_reason(record), standing.message)
    return standing


def is_settled(record: Record) -> bool:
    """True when the files alone say how the newest submission ended: nobody has to be asked.

    `needs_resume` is not settled: Slurm may have requeued the job by itself after the agent gave up asking.
    """
    if record.submission is None:
        return not record.heartbeat_fresh
    return record.stated in (JobState.COMPLETED, JobState.CANCELLED, JobState.FAILED)


def _alive(record: Record, job: JobStatus | None) -> bool:
    if job is not None and job.state is not SchedulerState.UNKNOWN:
        return job.state.alive
    if is_settled(record) or (
        job is not None and record.submission is not None and record.submission.backend == "local"
    ):
        # A local agent that is not among the processes has ended, whatever its orphans still write.
        return record.elsewhere is not None and (record.heartbeat_fresh or bool(record.waiting_for))
    # Nobody who could be asked knows: a fresh heartbeat means somebody is training (another cluster's queue, say).
    if job is None and record.submission is not None and record.submission.job_id is not None:
        # A program that does not use our library, or has not got that far, has no heartbeat to miss.
        silent = record.heartbeat_age_s is None and record.stated is JobState.RUNNING
        return record.heartbeat_fresh or silent or record.stated in (None, JobState.QUEUED, JobState.PREEMPTED)
    return record.heartbeat_fresh


def _last_reason(record: Record) -> ExitReason | None:
    value = record.sidecar.get("exit_reason") or record.verdict.get("reason")
    return reason_of(value)


def reason_of(value: object) -> ExitReason | None:
    """The member of that name; None for anything else (a newer version's word must not break an older reader)."""
    return next((reason for reason in ExitReason if reason == value), None)


def _resolve_alive(record: Record, job: JobStatus | None) -> Standing:
    stated = record.stated
    stopping = ["being cancelled"] if record.tombstone else []
    if job is not None and job.state is SchedulerState.PENDING:
        words = f"waiting: {job.reason}" if job.reason else "waiting in the queue"
        if record.waiting_for and job.reason in ("", "Dependency"):
            words = _waiting_for(record)
        state = JobState.QUEUED if record.last_attempt is None or stated is None else JobState.PREEMPTED
        return Standing(state, True, None, "; ".join([words + _held(job.reason), *stopping]))
    if stated is None and record.waiting_for and record.submission and record.submission.backend == "local":
        return Standing(JobState.QUEUED, True, None, "; ".join([_waiting_for(record), *stopping]))
    if stated is not None and stated is not JobState.LOST:
        said = [str(record.sidecar["message"])] if record.sidecar.get("message") else []
        return Standing(stated, True, None, "; ".join([*said, *stopping]))
    if job is None and not record.heartbeat_fresh:
        return Standing(JobState.QUEUED, True, None, "; ".join(["the scheduler gave no answer", *stopping]))
    return Standing(JobState.RUNNING, True, None, "; ".join(stopping))


def _waiting_for(record: Record) -> str:
    return f"waiting for {', '.join(record.waiting_for)}"


def _held(reason: str) -> str:
    """A job on hold stays there until somebody releases it: JobHeldAdmin, launch_failed_requeued_held, …: say so."""
    return " (`scontrol release` lets it go on)" if "held" in reason.lower() else ""


def _resolve_ended(record: Record, job: JobStatus | None) -> Standing:
    stated = record.stated
    words = str(record.sidecar.get("message") or "") if record.sidecar_is_current else ""
    if stated in (JobState.COMPLETED, JobState.FAILED, JobState.NEEDS_RESUME, JobState.CANCELLED):
        if record.tombstone and stated is JobState.NEEDS_RESUME:
            return Standing(JobState.CANCELLED, False, ExitReason.CANCELLED, words)
        return Standing(stated, False, None, words)
    if record.tombstone:
        return Standing(JobState.CANCELLED, False, ExitReason.CANCELLED, "cancelled")
    if record.submission is None:
        return _resolve_bare(record)
    if record.submission.job_id is None:
        return Standing(JobState.LOST, False, None, "its submission was interrupted; nothing is in the queue")
    scheduler = job.reason if job is not None else ""
    if scheduler.startswith("CANCELLED") and stated is None:
        return Standing(JobState.CANCELLED, False, ExitReason.CANCELLED, "cancelled in the queue before it started")
    if stated is JobState.PREEMPTED:
        return Standing(JobState.NEEDS_RESUME, False, None, "its work is saved, but it is no longer in the queue")
    ending = f" (scheduler: {scheduler})" if scheduler else ""
    if stated is JobState.RUNNING and (standing := _unwritten(record, job, ending)) is not None:
        return standing
    return Standing(JobState.LOST, False, None, f"the job ended without a word from its agent{ending}")


def _unwritten(record: Record, job: JobStatus | None, ending: str) -> Standing | None:
    """The end of an attempt that is open, as the next one would write it down; None where nobody has said a word.

    Slurm's KillWait may end the agent, or the script that judges, before the end is written.
    """
    if job is not None and job.end is not None and 0 <= time.time() - job.end < SHOWN_LATE_S:
        return Standing(JobState.RUNNING, True, None, "its job has just ended; how is not to be seen yet")
    mine = record.verdict.get("attempt") == record.last_attempt
    cause = _cause(record, job.reason if job is not None else "")
    evidence = Evidence(
        tombstone=False,
        verdict=record.verdict if mine else None,
        failures=(),
        node_codes={},
        nodes=1,
        started=True,
        cause=cause,
    )
    outcome = judge(evidence)
    if outcome.reason is ExitReason.NODE_FAILURE and cause is None:
        return None
    words = f"{outcome.message}; the job ended before its agent had written that down{ending}"
    return Standing(outcome.reason.state, False, outcome.reason, words)


def _cause(record: Record, scheduler: str) -> ExitReason | None:
    """Why the newest attempt was to stop."""
    # Measured on 22.05 and 24.11: a preempted job ends as PREEMPTED, unless somebody cancels it in its grace.
    if scheduler.startswith("CANCELLED"):
        return ExitReason.CANCELLED
    notices = (e for e in record.events if e["event"] == "signalled" and e.get("attempt") == record.last_attempt)
    return next((cause for e in reversed(list(notices)) if (cause := reason_of(e.get("cause"))) is not None), None)


def _resolve_bare(record: Record) -> Standing:
    """A run that nobody submitted (training code started by hand): only rank 0's verdict speaks."""
    outcome = record.verdict.get("outcome")
    states = {
        "completed": JobState.COMPLETED,
        "failed": JobState.FAILED,
        "fenced": JobState.FAILED,
        "saved": JobState.NEEDS_RESUME,
        "unsaved": JobState.NEEDS_RESUME,
    }
    message = str(record.verdict.get("message") or "")
    return Standing(states.get(str(outcome), JobState.LOST), False, None, message)

"""Why did this attempt end, and does another one follow? Pure functions over what was found on disk (PROTOCOLS 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.states import ExitCode, ExitReason, JobState

NO_PROGRESS_ATTEMPTS = 3
"""So many attempts in a row that failed or hung without a new step are a crash loop."""

BACKOFF_GROWTH = 4
"""Each further attempt of a crash loop waits so many times longer than the one before it."""

UNUSED = "unused"
"""Outcome in the verdict of a node that was told to stop before it had started the program."""

_FAILED = frozenset(
    {
        ExitReason.FAILURE,
        ExitReason.HUNG,
        ExitReason.OUT_OF_MEMORY,
        ExitReason.LAUNCH_FAILURE,
        ExitReason.CONTAINER_FAILURE,
        ExitReason.CHECKPOINT_FAILURE,
    }
)


@dataclass(frozen=True)
class Evidence:
    """What one attempt left behind."""

    tombstone: bool
    verdict: Mapping[str, Any] | None  # rank 0's
    failures: Sequence[Mapping[str, Any]]  # verdicts of failing ranks and nodes
    node_codes: Mapping[int, int]  # exit code of PID 1 by node, from the agents' own records
    nodes: int  # how many agents there should have been
    started: bool  # the agent of node 0 came up
    cause: ExitReason | None  # why the scheduler stopped it; None = it was not stopped
    scheduler_silent: bool = False  # it was stopped, and nobody could say why


@dataclass(frozen=True)
class Outcome:
    """Why an attempt ended, in one enum member and one sentence."""

    reason: ExitReason
    message: str
    step: int | None
    saved: bool
    final: bool = False  # the program asked never to be restarted


@dataclass(frozen=True)
class Decision:
    """What follows an attempt."""

    requeue: bool
    state: JobState
    reason: ExitReason
    message: str
    delay_s: float = 0.0  # the next attempt begins no earlier


def judge(evidence: Evidence) -> Outcome:
    """Name the reason. Fenced beats everything (a zombie must not restart), then success, a person, failure, a stop."""
    verdict = evidence.verdict
    said = verdict["outcome"] if verdict is not None else None
    step = verdict.get("step") if verdict is not None else None
    saved = said == "saved"

    def outcome(reason: ExitReason, detail: str = "") -> Outcome:
        return Outcome(reason, detail or reason.message, step, saved)

    if said == "fenced" or any(failure["outcome"] == "fenced" for failure in evidence.failures):
        return outcome(ExitReason.FENCED, _said([verdict, *evidence.failures], "fenced"))
    ended_well = len(evidence.node_codes) == evidence.nodes and not any(evidence.node_codes.values())
    if ended_well and said is None:
        return outcome(ExitReason.COMPLETED)
    if said == "completed" and not any("rank" in failure for failure in evidence.failures):
        # Rank 0 says so last of all: what is killed, or fails, while the interpreters end, undoes nothing.
        return outcome(ExitReason.COMPLETED)
    if evidence.tombstone or evidence.cause is ExitReason.CANCELLED:
        return outcome(ExitReason.CANCELLED)
    codes = set(evidence.node_codes.values())
    if ExitCode.NEVER_RESTART in codes:
        message = f"the program asked never to be restarted (exit code {ExitCode.NEVER_RESTART:d})"
        return Outcome(ExitReason.FAILURE, message, step, False, final=True)
    if evidence.cause is ExitReason.HUNG:
        return outcome(ExitReason.HUNG, _hung_words(saved, step))
    failure = _worst_failure(evidence)
    if failure is not None:
        return Outcome(_failure_reason(failure), str(failure.get("message") or "the program failed"), step, False)
    cause = evidence.cause or ExitReason.PREEMPTED
    if said == "saved":
        return outcome(cause)
    if said == "unsaved":
        return outcome(ExitReason.DEADLINE_MISSED, str(verdict.get("message") or "") if verdict is not None else "")
    if sum(failure["outcome"] == UNUSED for failure in evidence.failures) == evidence.nodes:
        return outcome(cause, f"{cause.message} before the program had been started")
    if evidence.cause is not None or evidence.scheduler_silent:
        return outcome(cause, f"{cause.message}; the program did not say that it has saved anything")
    if ExitCode.SAVED in codes and codes <= {ExitCode.DONE, ExitCode.SAVED}:
        return outcome(cause, f"the program asked to be started again (exit code {ExitCode.SAVED:d})")
    if not evidence.started:
        return outcome(ExitReason.LAUNCH_FAILURE, "the agent never came up; logs/batch.log says why")
    if len(evidence.node_codes) < evidence.nodes:
        return outcome(ExitReason.NODE_FAILURE, "an agent ended without a record: its node was lost, or it was killed")
    return outcome(ExitReason.FAILURE, f"the program ended with exit code {max(evidence.node_codes.values())}")


def _said(verdicts: Sequence[Mapping[str, Any] | None], outcome: str) -> str:
    return next((str(v.get("message") or "") for v in verdicts if v is not None and v["outcome"] == outcome), "")


def _hung_words(saved: bool, step: int | None) -> str:
    where = "every rank's stack is in stack-rank-*.txt beside the logs"
    after = f"it was only slow: step {step} is saved" if saved else "it reached no step boundary when told to stop"
    return f"{ExitReason.HUNG.message}; {after}; {where}"


def _worst_failure(evidence: Evidence) -> Mapping[str, Any] | None:
    """A rank's own words before a node's exit code; a node killed after everything was saved is no failure."""
    # A process killed for lack of memory says nothing itself; its peers complain about a lost connection.
    memory = [failure for failure in evidence.failures if failure.get("reason") == ExitReason.OUT_OF_MEMORY]
    if memory:
        return memory[0]
    ranks = [failure for failure in evidence.failures if "rank" in failure]
    if ranks:
        return min(ranks, key=lambda failure: float(failure.get("time", 0.0)))  # the others followed the first
    if evidence.verdict is not None and evidence.verdict["outcome"] == "failed":
        return evidence.verdict
    stopped = evidence.cause is not None or evidence.scheduler_silent
    saved = evidence.verdict is not None and evidence.verdict["outcome"] in ("saved", "unsaved")
    return None if stopped or saved or not evidence.failures else evidence.failures[0]


def _failure_reason(failure: Mapping[str, Any]) -> ExitReason:
    # The verdict may come from another version of our library (docs/decisions/0005), with words unknown here.
    return next((reason for reason in ExitReason if reason == failure.get("reason")), ExitReason.FAILURE)


def decide(
    outcome: Outcome,
    *,
    attempts: Sequence[Mapping[str, Any]],
    caps: Mapping[str, int],
    silent: bool = False,
    backoff_s: float = 0.0,
) -> Decision:
    """Whether another attempt follows. `attempts` are the sidecar's records since the run was last submitted or
    resumed, this one last and already judged.

    `silent`: the scheduler could not be asked why it stopped us; then nothing is requeued, because a user's scancel
    would be undone, and the run waits for `orch resume`.
    """
    reason = outcome.reason
    cap_name = reason.retry
    if cap_name is None or outcome.final:
        return Decision(False, reason.state, reason, outcome.message)
    if silent:
        message = f"{outcome.message}; the scheduler did not say why it stopped the job, so it was not requeued"
        return Decision(False, JobState.NEEDS_RESUME, reason, message)
    if _crash_loop(attempts):
        message = f"{ExitReason.NO_PROGRESS.message}; last: {outcome.message}"
        return Decision(False, ExitReason.NO_PROGRESS.state, ExitReason.NO_PROGRESS, message)
    earlier = sum(1 for attempt in attempts[:-1] if _cap_of(attempt) == cap_name)
    if earlier >= caps[cap_name]:
        if reason in _FAILED:
            return Decision(False, reason.state, reason, outcome.message)
        limit = ExitReason.REQUEUE_LIMIT
        return Decision(False, limit.state, limit, f"{outcome.message}; {cap_name}={caps[cap_name]} is used up")
    futile = _futile_attempts(attempts)
    delay_s = backoff_s * BACKOFF_GROWTH ** (futile - 1) if futile else 0.0
    return Decision(True, JobState.PREEMPTED, reason, outcome.message, delay_s)


def _cap_of(attempt: Mapping[str, Any]) -> str | None:
    reason = attempt.get("exit_reason")
    return ExitReason(reason).retry if reason else None


def _crash_loop(attempts: Sequence[Mapping[str, Any]]) -> bool:
    return _futile_attempts(attempts) >= NO_PROGRESS_ATTEMPTS


def _futile_attempts(attempts: Sequence[Mapping[str, Any]]) -> int:
    """How many attempts in a row, the last ones, failed or hung without a new step."""
    count = 0
    for attempt in reversed(attempts):
        progress = (attempt.get("step_end") or 0) - (attempt.get("step_start") or 0)
        if attempt.get("exit_reason") not in _FAILED or progress > 0:
            break
        count += 1
    return count


def exit_code(decision: Decision) -> int:
    """Exit code of the batch script (PROTOCOLS 3)."""
    if decision.reason is ExitReason.COMPLETED:
        return ExitCode.DONE
    if decision.reason is ExitReason.FENCED:
        return ExitCode.NEVER_RESTART
    if decision.requeue or decision.state is JobState.NEEDS_RESUME:
        return ExitCode.SAVED
    return 1

"""Why an attempt ended and what follows: the rules of PROTOCOLS 3, as a table."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.states import ExitCode, ExitReason, JobState
from orchestrator.worker.decision import UNUSED, Evidence, Outcome, decide, exit_code, judge

CAPS = {"max_requeues": 2, "time_limit": 2, "node_failure": 1, "out_of_memory": 0, "failure": 0, "hung": 1}


def evidence(**changes: Any) -> Evidence:
    base: dict[str, Any] = {
        "tombstone": False,
        "verdict": None,
        "failures": (),
        "node_codes": {0: 0},
        "nodes": 1,
        "started": True,
        "cause": None,
        "scheduler_silent": False,
    }
    return Evidence(**{**base, **changes})


def verdict(outcome: str, **changes: Any) -> dict[str, Any]:
    return {"outcome": outcome, "rank": 0, "step": 7, "reason": None, "message": outcome, "time": 1.0, **changes}


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (evidence(), ExitReason.COMPLETED),
        (evidence(verdict=verdict("completed")), ExitReason.COMPLETED),
        # A run that has finished is finished, also when somebody cancels or preempts it in its last second.
        (evidence(verdict=verdict("completed"), tombstone=True), ExitReason.COMPLETED),
        (evidence(verdict=verdict("completed"), cause=ExitReason.PREEMPTED), ExitReason.COMPLETED),
        # … or when its processes are killed while they end; but not when another rank says that it failed.
        (evidence(verdict=verdict("completed"), node_codes={0: 137}), ExitReason.COMPLETED),
        (evidence(verdict=verdict("completed"), node_codes={}, cause=ExitReason.PREEMPTED), ExitReason.COMPLETED),
        (
            evidence(verdict=verdict("completed"), failures=[verdict("failed", rank=3)], node_codes={0: 1}),
            ExitReason.FAILURE,
        ),
        (evidence(verdict=verdict("saved"), node_codes={0: 75}, cause=ExitReason.PREEMPTED), ExitReason.PREEMPTED),
        (evidence(verdict=verdict("saved"), node_codes={0: 75}, cause=ExitReason.TIME_LIMIT), ExitReason.TIME_LIMIT),
        (evidence(verdict=verdict("saved"), node_codes={0: 75}, cause=ExitReason.CANCELLED), ExitReason.CANCELLED),
        (evidence(verdict=verdict("saved"), node_codes={0: 75}, tombstone=True), ExitReason.CANCELLED),
        (
            evidence(verdict=verdict("unsaved"), node_codes={0: 75}, cause=ExitReason.PREEMPTED),
            ExitReason.DEADLINE_MISSED,
        ),
        (evidence(verdict=verdict("fenced"), node_codes={0: 93}, tombstone=True), ExitReason.FENCED),
        # Peers of a fenced rank 0 lose their connection and complain: that must not become a retried failure.
        (
            evidence(verdict=verdict("fenced"), failures=[verdict("failed", rank=3)], node_codes={0: 1}),
            ExitReason.FENCED,
        ),
        (evidence(failures=[verdict("failed", rank=3)], node_codes={0: 1}), ExitReason.FAILURE),
        # A process killed for lack of memory says nothing itself: its peers' complaints must not win.
        (
            evidence(
                failures=[verdict("failed", rank=3), {"outcome": "failed", "reason": "out_of_memory", "message": "m"}],
                node_codes={0: 1},
            ),
            ExitReason.OUT_OF_MEMORY,
        ),
        (evidence(verdict=verdict("unsaved"), node_codes={0: 75}, cause=ExitReason.HUNG), ExitReason.HUNG),
        (
            evidence(failures=[verdict("failed", rank=3)], node_codes={0: 1, 1: 137}, nodes=2, cause=ExitReason.HUNG),
            ExitReason.HUNG,
        ),
        (
            evidence(verdict=verdict("saved"), failures=[verdict("failed", rank=3)], node_codes={0: 75}),
            ExitReason.FAILURE,
        ),
        (evidence(node_codes={0: 1}), ExitReason.FAILURE),
        (evidence(node_codes={0: 137}, cause=ExitReason.PREEMPTED), ExitReason.PREEMPTED),
        (evidence(node_codes={}, nodes=1), ExitReason.NODE_FAILURE),
        (evidence(node_codes={}, nodes=1, started=False), ExitReason.LAUNCH_FAILURE),
        (evidence(node_codes={}, nodes=1, started=False, cause=ExitReason.PREEMPTED), ExitReason.PREEMPTED),
        # A program without our library speaks by its exit code.
        (evidence(node_codes={0: 75}), ExitReason.PREEMPTED),
        (evidence(node_codes={0: 75}, cause=ExitReason.TIME_LIMIT), ExitReason.TIME_LIMIT),
        (evidence(node_codes={0: 75, 1: 1}, nodes=2), ExitReason.FAILURE),
        (evidence(node_codes={0: 93}, cause=ExitReason.PREEMPTED), ExitReason.FAILURE),
        (evidence(node_codes={0: 0}, nodes=2), ExitReason.NODE_FAILURE),
        (
            evidence(verdict=verdict("failed", reason="checkpoint_failure"), node_codes={0: 1}),
            ExitReason.CHECKPOINT_FAILURE,
        ),
    ],
)
def test_judge_names_the_reason(found: Evidence, reason: ExitReason) -> None:
    assert judge(found).reason is reason


def test_the_first_failing_rank_is_quoted() -> None:
    late, early = (
        verdict("failed", rank=0, time=9.0, message="late"),
        verdict("failed", rank=1, time=2.0, message="early"),
    )
    assert judge(evidence(failures=[late, early], node_codes={0: 1})).message == "early"


def test_a_stop_while_an_image_was_on_its_way_is_no_failure() -> None:
    """The peers were ended for it; where nobody knows the cause, nothing is requeued, as ever."""
    unused, killed = {"outcome": UNUSED, "reason": None}, {"outcome": "failed", "reason": None, "message": "137"}
    found = evidence(failures=[killed, unused], node_codes={0: 137, 1: 75}, nodes=2, cause=ExitReason.PREEMPTED)
    assert judge(found).reason is ExitReason.PREEMPTED
    told = judge(evidence(failures=[unused, unused], node_codes={0: 75, 1: 75}, nodes=2, cause=ExitReason.PREEMPTED))
    assert told.message == "preempted before the program had been started"
    silent = judge(evidence(failures=[unused], node_codes={0: 75}, scheduler_silent=True))
    assert not decide(silent, attempts=[{"exit_reason": "preempted"}], caps=CAPS, silent=True).requeue
    assert judge(evidence(failures=[unused], node_codes={0: 75}, tombstone=True)).reason is ExitReason.CANCELLED


def test_an_unsaved_stop_says_so() -> None:
    assert "did not say that it has saved" in judge(evidence(node_codes={0: 137}, cause=ExitReason.PREEMPTED)).message


@pytest.mark.parametrize("reason", list(ExitReason))
def test_every_reason_leads_to_a_consistent_decision(reason: ExitReason) -> None:
    caps = {**CAPS, "out_of_memory": 2, "failure": 2}
    decision = decide(Outcome(reason, "m", 1, False), attempts=[{"exit_reason": reason.value}], caps=caps)
    assert decision.requeue == (reason.retry is not None)
    assert decision.requeue != decision.state.terminal
    assert exit_code(decision) in (ExitCode.DONE, ExitCode.SAVED, ExitCode.NEVER_RESTART, 1)


def attempts(*reasons: ExitReason, step: int = 5) -> list[dict[str, Any]]:
    return [{"exit_reason": r.value, "step_start": n * step, "step_end": (n + 1) * step} for n, r in enumerate(reasons)]


def test_preemptions_stop_at_their_cap_and_wait_for_resume() -> None:
    three = attempts(*[ExitReason.PREEMPTED] * 3)
    assert decide(Outcome(ExitReason.PREEMPTED, "m", 1, True), attempts=three[:2], caps=CAPS).requeue
    spent = decide(Outcome(ExitReason.PREEMPTED, "m", 1, True), attempts=three, caps=CAPS)
    assert (spent.requeue, spent.state, spent.reason) == (False, JobState.NEEDS_RESUME, ExitReason.REQUEUE_LIMIT)


def test_a_failure_with_its_cap_spent_stays_a_failure() -> None:
    decision = decide(Outcome(ExitReason.FAILURE, "boom", 1, False), attempts=attempts(ExitReason.FAILURE), caps=CAPS)
    assert (decision.state, decision.reason, decision.message) == (JobState.FAILED, ExitReason.FAILURE, "boom")


def test_a_crash_loop_ends_although_its_cap_is_not_spent() -> None:
    caps = {**CAPS, "failure": 10}
    stuck = attempts(*[ExitReason.FAILURE] * 3, step=0)
    moving = attempts(*[ExitReason.FAILURE] * 3)
    assert (
        decide(Outcome(ExitReason.FAILURE, "m", 0, False), attempts=stuck, caps=caps).reason is ExitReason.NO_PROGRESS
    )
    assert decide(Outcome(ExitReason.FAILURE, "m", 0, False), attempts=moving, caps=caps).requeue


def test_each_futile_attempt_waits_longer_and_progress_resets_it() -> None:
    caps = {**CAPS, "failure": 10, "hung": 10}

    def delay(*steps: int) -> float:
        """`steps`: new steps of each attempt, all of which failed."""
        made = [
            {"exit_reason": "failure" if number % 2 else "hung", "step_start": 5, "step_end": 5 + new}
            for number, new in enumerate(steps)
        ]
        return decide(Outcome(ExitReason.FAILURE, "m", 0, False), attempts=made, caps=caps, backoff_s=30).delay_s

    assert [delay(3), delay(0), delay(0, 0), delay(0, 0, 4), delay(0, 0, 4, 0)] == [0, 30, 120, 0, 30]


def test_a_program_that_asks_never_to_be_restarted_is_not() -> None:
    outcome = judge(evidence(node_codes={0: 93}))
    assert not decide(outcome, attempts=attempts(ExitReason.FAILURE), caps={**CAPS, "failure": 9}).requeue


def test_preemptions_never_count_as_a_crash_loop() -> None:
    stuck = attempts(*[ExitReason.PREEMPTED] * 3, step=0)
    assert decide(Outcome(ExitReason.PREEMPTED, "m", 0, True), attempts=stuck, caps={**CAPS, "max_requeues": 9}).requeue


def test_silence_of_the_scheduler_never_requeues_and_never_cancels() -> None:
    decision = decide(
        Outcome(ExitReason.PREEMPTED, "m", 1, True), attempts=attempts(ExitReason.PREEMPTED), caps=CAPS, silent=True
    )
    assert (decision.requeue, decision.state) == (False, JobState.NEEDS_RESUME)

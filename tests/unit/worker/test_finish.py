"""The book of attempts: what is written when an attempt ends, and whether another one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.containers.payload import Payload, PayloadRequest
from orchestrator.files import write_json
from orchestrator.paths import RunPaths
from orchestrator.registry import EventLog, load_sidecar
from orchestrator.states import ExitReason, JobState
from orchestrator.worker.finish import AttemptBook
from orchestrator.worker.node_agent import NodeAgent, Place, run_node
from orchestrator.worker.scheduler import LocalScheduler, Requeued, SlurmScheduler

CAPS = {"max_requeues": 9, "time_limit": 9, "node_failure": 9, "out_of_memory": 0, "failure": 0}


class Run:
    """A run directory on one node, with the traces of an attempt as agents and ranks leave them."""

    def __init__(self, directory: Path) -> None:
        self.paths = RunPaths(directory)
        self.paths.events_dir.mkdir(parents=True)
        self.orders: dict[str, Any] = {
            "run_id": "run-1",
            "name": "run",
            "run_dir": str(directory),
            "backend": "local",
            "attempt_base": 0,
            "nodes": 1,
            "lead_time_s": 20,
            "caps": CAPS,
            "backoff_s": 0,
            "watchdog": {"no_progress_s": None},
        }
        self.book = AttemptBook(self.paths, self.orders)
        self.scheduler = LocalScheduler("1.2", self.paths.tombstone)

    def ended(self, attempt: int = 0, *, code: int = 75, cause: str | None = "preempted", **verdict: Any) -> None:
        self.book.open(attempt, "1.2", ["n1"])
        log = EventLog(self.paths, "agent-n0")
        log.append("signalled", attempt=attempt, cause=cause)
        log.append("verdict", attempt=attempt, node=0, exit_code=code)
        if verdict:
            write_json(self.paths.verdict(attempt), verdict)

    @property
    def sidecar(self) -> dict[str, Any]:
        return load_sidecar(self.paths) or {}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def slurm(*lines: str) -> tuple[SlurmScheduler, list[str]]:
    """A scheduler that answers `show job` with each line in turn (the last one for ever), and what it was asked."""
    answers, asked = list(lines), []

    def command(argv: Sequence[str], timeout_s: float) -> tuple[int, str]:
        asked.append(argv[1])
        if argv[1:3] != ["show", "job"]:
            return 0, ""
        line = answers.pop(0) if len(answers) > 1 else answers[0]
        return (0, f"JobId=7 {line}") if line else (1, "no answer")

    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return SlurmScheduler({"SLURM_JOB_ID": "7"}, run=command, clock=lambda: now[0], sleep=sleep), asked


def test_a_saved_stop_is_requeued(run: Run) -> None:
    run.ended(outcome="saved", step=7, message="")
    assert run.book.close(0, run.scheduler).requeue
    assert run.sidecar["status"] == "preempted"
    assert run.sidecar["attempts"][0]["step_end"] == 7


def test_a_cancellation_after_the_evidence_was_read_is_not_undone(run: Run) -> None:
    run.paths.secrets.write_text("{}")
    run.ended(outcome="saved", step=7, message="")

    class CancelledMeanwhile(LocalScheduler):
        def requeue(self, delay_s: float = 0.0, grace_end: float | None = None) -> Requeued:
            return Requeued(ok=False, cancelled=True)

    decision = run.book.close(0, CancelledMeanwhile("1.2", run.paths.tombstone))
    assert (decision.requeue, decision.state) == (False, JobState.CANCELLED)
    assert run.sidecar["status"] == "cancelled"
    assert not run.paths.secrets.exists()


def test_scancel_after_the_notice_is_not_undone(run: Run) -> None:
    run.ended(outcome="saved", step=7, message="")
    scheduler, asked = slurm("JobState=COMPLETING Restarts=0 Reason=None")
    assert run.book.close(0, scheduler).state is JobState.CANCELLED
    assert "requeue" not in asked


def test_scancel_within_the_grace_of_a_preemption_is_not_undone(run: Run) -> None:
    run.ended(outcome="saved", step=7, message="")
    EventLog(run.paths, "agent-n1").append("signalled", attempt=0, cause="preempted", grace_end=2020.0)
    scheduler, asked = slurm("JobState=COMPLETING Restarts=0 Reason=None PreemptTime=2000 EndTime=2005")
    assert run.book.close(0, scheduler).state is JobState.CANCELLED
    assert "requeue" not in asked


def test_an_attempt_that_was_given_up_for_dead_touches_nothing_of_the_next_one(run: Run) -> None:
    run.ended(0, code=1)
    run.book.open(1, "1.2", ["n2"])
    before = run.paths.sidecar.read_bytes()
    scheduler, asked = slurm("JobState=RUNNING Restarts=1")
    decision = run.book.close(0, scheduler)
    assert (decision.requeue, decision.reason) == (False, ExitReason.FENCED)
    assert run.paths.sidecar.read_bytes() == before
    assert not asked


def test_a_stop_whose_cause_is_known_only_at_the_end_is_a_preemption(run: Run) -> None:
    run.ended(code=143, cause=None)
    scheduler, _ = slurm("JobState=RUNNING Restarts=0 PreemptTime=2030-01-01T12:00:00 EndTime=2030-01-01T12:00:20")
    decision = run.book.close(0, scheduler)
    assert (decision.requeue, decision.reason) == (True, ExitReason.PREEMPTED)


def test_resuming_a_run_whose_cap_was_spent_counts_anew(run: Run) -> None:
    run.orders["caps"] = {**CAPS, "max_requeues": 1}
    for attempt, requeued in ((0, True), (1, False)):
        run.ended(attempt, outcome="saved", step=7, message="")
        assert run.book.close(attempt, run.scheduler).requeue is requeued
    run.orders["attempt_base"] = 2
    run.ended(2, outcome="saved", step=8, message="")
    assert run.book.close(2, run.scheduler).requeue


def test_silence_to_the_end_waits_for_a_person(run: Run) -> None:
    run.ended(cause=None, outcome="saved", step=7, message="")
    scheduler, asked = slurm("")
    assert run.book.close(0, scheduler).state is JobState.NEEDS_RESUME
    assert "requeue" not in asked


def test_a_verdict_of_another_version_of_the_library_is_understood(run: Run) -> None:
    run.ended(code=1, cause=None, outcome="failed", reason="a_word_of_tomorrow")
    decision = run.book.close(0, run.scheduler)
    assert (decision.state, decision.reason) == (JobState.FAILED, ExitReason.FAILURE)


@pytest.mark.parametrize("damage", ["", "[]", '{"attempt": 0, "step": null}'])
def test_a_damaged_progress_file_keeps_no_attempt_open(run: Run, damage: str) -> None:
    run.ended(outcome="unsaved")
    run.paths.progress.write_text(damage)
    assert run.book.close(0, run.scheduler).requeue


class NoRuntime:
    """A node where nothing may start."""

    name = "none"

    def remove_leftovers(self, run_dir: str, node: str, before_attempt: int) -> Sequence[str]:
        raise AssertionError("an attempt of a cancelled run has begun")

    def prepare(self, request: PayloadRequest) -> None:
        raise AssertionError("an attempt of a cancelled run has begun")

    def start(self, request: PayloadRequest) -> Payload:
        raise AssertionError("an attempt of a cancelled run has begun")


def test_an_attempt_of_a_cancelled_run_does_not_begin(run: Run) -> None:
    run.book.open(0, "1.2", ["n1"])
    run.paths.tombstone.touch()
    agent = NodeAgent(run.orders, Place(0, 0, "n1", 1, "127.0.0.1", None), run.scheduler, NoRuntime(), {})
    assert run_node(agent) == 1
    assert run.book.close(0, run.scheduler).state is JobState.CANCELLED


@pytest.mark.parametrize(
    ("cause", "verdict", "reason"),
    [
        ("cancelled", {}, "cancelled"),
        ("requeued_by_admin", {"outcome": "saved", "step": 7}, "requeued_by_admin"),
        ("preempted", {"outcome": "unsaved", "step": 7}, "deadline_missed"),
        (None, {"outcome": "saved", "step": 7}, "preempted"),
        (None, {"outcome": "failed", "step": 7, "reason": "failure"}, "failure"),
        (None, {}, "node_failure"),
    ],
)
def test_an_attempt_that_nobody_closed_is_judged_by_what_it_was_told_and_said(
    run: Run, cause: str | None, verdict: dict[str, Any], reason: str
) -> None:
    """The batch script may be killed at the end of KillWait: that is no lost node."""
    run.book.open(0, "1.2", ["n1"])
    if cause is not None:
        EventLog(run.paths, "agent-n0").append("signalled", attempt=0, cause=cause)
    if verdict:
        write_json(run.paths.verdict(0), verdict)
    run.book.open(1, "1.2", ["n1"])
    assert run.sidecar["attempts"][0]["exit_reason"] == reason

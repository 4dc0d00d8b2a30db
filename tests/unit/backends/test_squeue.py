"""Reading squeue and sacct: exact lines seen on Slurm 22.05."""

from __future__ import annotations

import pytest

from orchestrator.backends import squeue
from orchestrator.backends.base import JobStatus, SchedulerState
from orchestrator.backends.process import Finished
from orchestrator.errors import SchedulerUnavailable
from tests.fakes.slurm import FakeSlurm


def test_rows_of_squeue() -> None:
    text = (
        "8|PENDING|1795339993|1795340593||Resources\n"
        "5|RUNNING|1795339393|1795339993|n[1-2]|None\n"
        "7_3|COMPLETED|1795339384|1795339393|n3|None\n"
        "9|COMPLETING|1795339384|N/A|n3|TimeLimit\n"
    )
    found = squeue.read_squeue(text)
    assert found["8"] == JobStatus(SchedulerState.PENDING, "Resources", (), 1795339993.0, 1795340593.0)
    assert found["5"] == JobStatus(SchedulerState.RUNNING, "RUNNING", ("n1", "n2"), 1795339393.0, 1795339993.0)
    assert found["7_3"].state is SchedulerState.ENDED
    assert found["9"].state is SchedulerState.COMPLETING
    assert found["9"].end is None


def test_rows_of_sacct_name_the_canceller_and_hold_steps() -> None:
    text = (
        "2|CANCELLED by 0|100|200|n[1-3]|None\n"
        "2.batch|CANCELLED|100|200|n1|\n"
        "1|CANCELLED by 0|100|200|None assigned|BeginTime\n"
    )
    found = squeue.read_squeue(text)
    assert set(found) == {"1", "2"}
    assert found["2"].reason == "CANCELLED"
    assert found["1"].nodes == ()


@pytest.mark.parametrize("state", ["REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "CONFIGURING", "STAGE_OUT"])
def test_states_that_still_hold_the_job(state: str) -> None:
    assert squeue.read_squeue(f"1|{state}|1|2|n1|x")["1"].state.alive


@pytest.mark.parametrize(
    "state",
    ["COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"],
)
def test_states_that_have_ended(state: str) -> None:
    status = squeue.read_squeue(f"1|{state}|1|2|n1|None")["1"]
    assert status.state is SchedulerState.ENDED
    assert status.reason == state


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7],gpu-a[08-10]", ["n1", "n2", "n3", "n7", "gpu-a08", "gpu-a09", "gpu-a10"]),
        ("a[1-2]-ib", ["a1-ib", "a2-ib"]),
        ("", []),
        ("(null)", []),
        ("None assigned", []),
    ],
)
def test_node_lists(text: str, nodes: list[str]) -> None:
    assert squeue.expand_nodes(text) == nodes


def test_a_job_squeue_forgot_is_looked_up_in_the_accounts() -> None:
    slurm = FakeSlurm()
    first, second = slurm.queue(), slurm.queue()
    slurm.jobs[first].state = "TIMEOUT"
    slurm.forget(first)
    found = squeue.ask(slurm, [first, second])
    assert found[first].state is SchedulerState.ENDED
    assert found[first].reason == "TIMEOUT"
    assert found[second].state is SchedulerState.RUNNING


def test_a_stale_account_never_makes_a_job_alive() -> None:
    slurm = FakeSlurm()
    job = slurm.queue()
    slurm.forget(job)  # its account still says RUNNING: slurmdbd missed the end
    assert squeue.ask(slurm, [job])[job].state is SchedulerState.ENDED


def test_without_accounting_a_forgotten_job_is_simply_missing() -> None:
    slurm = FakeSlurm(accounting=False)
    job = slurm.queue()
    slurm.forget(job)
    assert squeue.ask(slurm, [job]) == {}


def test_nothing_is_asked_about_nothing() -> None:
    slurm = FakeSlurm()
    assert squeue.ask(slurm, []) == {}
    assert slurm.commands == []


def test_a_failing_squeue_is_no_answer() -> None:
    def broken(argv: object, *, timeout_s: float, environ: object = None) -> Finished:
        return Finished(1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n")

    with pytest.raises(SchedulerUnavailable, match="Unable to contact"):
        squeue.ask(broken, ["1"])


def test_seen_then_missing_has_ended_and_never_seen_is_unknown() -> None:
    slurm = FakeSlurm(accounting=False)
    job = slurm.queue()
    book = squeue.StatusBook(slurm)
    book.update([job, "99999"])
    assert book.status(job).state is SchedulerState.RUNNING
    slurm.forget(job)
    book.update([job, "99999"])
    assert book.status(job).state is SchedulerState.ENDED
    assert book.status("99999").state is SchedulerState.UNKNOWN


def test_a_requeued_job_comes_back_to_life() -> None:
    slurm = FakeSlurm()
    job = slurm.queue()
    book = squeue.StatusBook(slurm)
    slurm.jobs[job].state = "COMPLETED"
    book.update([job])
    slurm.jobs[job].state = "PENDING"
    book.update([job])
    assert book.status(job).state is SchedulerState.PENDING

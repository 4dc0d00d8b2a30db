"""Where the run stands that another one waits for: by its own files first, then by the scheduler."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.files import write_json
from orchestrator.identity import AGENT_PLAN_VERSION
from orchestrator.paths import RunPaths
from orchestrator.registry import EventLog, load_sidecar
from orchestrator.worker import agent
from orchestrator.worker.scheduler import LocalScheduler, SlurmScheduler
from orchestrator.worker.upstream import Upstream, blocked_by, look, wait_here


class FakeScheduler(LocalScheduler):
    """Holds what it is told to hold."""

    def __init__(self, held: bool | None) -> None:
        super().__init__("1.2", Path("/nowhere"))
        self.held = held

    def holds(self, job_id: str) -> bool | None:
        return self.held


def upstream(directory: Path, status: str | None, *, cancelled: bool = False, submitted: bool = True) -> RunPaths:
    paths = RunPaths(directory / "first")
    paths.events_dir.mkdir(parents=True)
    if submitted:
        EventLog(paths, "login").append("submitted", job_id="41", backend="slurm", token="t", attempt_base=0)
    if status is not None:
        write_json(paths.sidecar, {"status": status, "job_id": "41", "attempts": [{"attempt": 0}]})
    if cancelled:
        paths.tombstone.touch()
    return paths


def found(directory: Path, held: bool | None) -> Upstream:
    waits: list[float] = []
    (one,) = look(["first"], directory, FakeScheduler(held), sleep=waits.append)
    assert sum(waits) <= 5
    return one


@pytest.mark.parametrize("held", [True, False, None])
def test_a_completed_run_is_completed_whatever_the_scheduler_says(tmp_path: Path, held: bool | None) -> None:
    upstream(tmp_path, "completed", cancelled=True)
    assert found(tmp_path, held) == Upstream("first", True)


@pytest.mark.parametrize("status", [None, "running", "preempted", "needs_resume"])
def test_a_run_whose_job_is_held_goes_on(tmp_path: Path, status: str | None) -> None:
    upstream(tmp_path, status)
    assert found(tmp_path, True) == Upstream("first", False, job_id="41")


@pytest.mark.parametrize(
    ("status", "cancelled", "words"),
    [
        ("failed", False, "has failed; first:  orch resume first"),
        ("cancelled", True, "was cancelled; first:  orch resume first"),
        (None, True, "was cancelled; first:  orch resume first"),
        ("needs_resume", False, "needs to be resumed; first:  orch resume first"),
        ("preempted", False, "needs to be resumed; first:  orch resume first"),
        ("running", False, "ended without a word: see `orch status`, then resume it"),
    ],
)
def test_a_run_that_has_ended_otherwise_says_how(
    tmp_path: Path, status: str | None, cancelled: bool, words: str
) -> None:
    upstream(tmp_path, status, cancelled=cancelled)
    assert blocked_by([found(tmp_path, False)]) == f"it waits for first, which {words}"


def test_a_failed_run_is_not_waited_for_while_its_job_still_tells_of_it(tmp_path: Path) -> None:
    upstream(tmp_path, "failed")
    assert "has failed" in found(tmp_path, True).words


def test_a_failure_of_an_earlier_submission_says_nothing_about_this_one(tmp_path: Path) -> None:
    paths = upstream(tmp_path, "failed")
    EventLog(paths, "login").append("submitted", job_id="42", backend="slurm", token="u", attempt_base=1)
    assert found(tmp_path, True) == Upstream("first", False, job_id="42")


def test_a_last_word_that_a_shared_disk_shows_late_is_waited_for(tmp_path: Path) -> None:
    paths = upstream(tmp_path, "running")

    def appear(_: float) -> None:
        write_json(paths.sidecar, {"status": "completed", "job_id": "41", "attempts": [{"attempt": 0}]})

    assert look(["first"], tmp_path, FakeScheduler(False), sleep=appear) == [Upstream("first", True)]


def test_a_run_that_was_removed_or_never_submitted(tmp_path: Path) -> None:
    assert "is not there any more" in found(tmp_path, False).words
    upstream(tmp_path, None, submitted=False)
    assert "ended without a word" in found(tmp_path, False).words


def test_a_silent_scheduler_is_no_end(tmp_path: Path) -> None:
    upstream(tmp_path, "running")
    assert found(tmp_path, None).words == "may still run, but the scheduler gave no answer"


# --- Slurm
def slurm(answers: dict[str, tuple[int, str]], asked: list[str]) -> SlurmScheduler:
    def command(argv: Sequence[str], timeout_s: float) -> tuple[int, str]:
        asked.append(" ".join(argv[1:]))
        return next((answer for key, answer in answers.items() if key in asked[-1]), (0, ""))

    ticks = iter(range(0, 10_000, 10))
    return SlurmScheduler({"SLURM_JOB_ID": "7"}, run=command, clock=lambda: float(next(ticks)), sleep=lambda _: None)


@pytest.mark.parametrize(
    ("answer", "held"),
    [
        ((0, "JobId=41 JobState=RUNNING"), True),
        ((0, "JobId=41 JobState=PENDING Reason=BeginTime"), True),
        ((0, "JobId=41 JobState=COMPLETING"), True),
        ((0, "JobId=41 JobState=COMPLETED"), False),
        ((1, "slurm_load_jobs error: Invalid job id specified"), False),
        ((1, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"), None),
        ((124, "scontrol gave no answer within 5 s"), None),
    ],
)
def test_what_slurm_still_holds(answer: tuple[int, str], held: bool | None) -> None:
    assert slurm({"show job": answer}, []).holds("41") is held


def test_back_to_wait_requeues_before_it_sets_the_dependency() -> None:
    asked: list[str] = []
    scheduler = slurm({"show job": (0, "JobId=7 JobState=RUNNING Restarts=0")}, asked)
    assert scheduler.wait_for(["41", "42"]).ok
    assert asked[1:] == ["requeue 7", "update jobid=7 dependency=afterany:41:42"]


def ready(directory: Path, scheduler: SlurmScheduler) -> tuple[int, RunPaths]:
    paths = RunPaths(directory / "second")
    paths.events_dir.mkdir(parents=True, exist_ok=True)
    paths.plan_dir.mkdir(exist_ok=True)
    orders: dict[str, Any] = {
        "version": AGENT_PLAN_VERSION, "run_id": "second", "name": "second", "backend": "slurm",
        "run_dir": str(paths.run_dir), "attempt_base": 4, "after": ["first"], "notify": None, "secrets": [],
    }  # fmt: skip
    paths.agent_plan.write_text(json.dumps(orders))
    kept = {number: signal.getsignal(number) for number in agent.STOP_SIGNALS}
    try:
        return agent.ready_main(paths.run_dir, {"ORCH_ATTEMPT_BASE": "4"}, scheduler), paths
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_ready_goes_back_to_wait_and_later_counts_no_attempt_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = upstream(tmp_path, "running")
    scheduler = slurm(
        {"show job -o 41": (0, "JobId=41 JobState=RUNNING"), "show job -o 7": (0, "JobId=7 JobState=RUNNING")}, []
    )
    code, paths = ready(tmp_path, scheduler)
    assert (code, capsys.readouterr().out) == (75, "")
    assert load_sidecar(paths) is None
    write_json(first.sidecar, {"status": "completed", "job_id": "41", "attempts": [{"attempt": 0}]})
    code, _ = ready(tmp_path, scheduler)
    assert (code, capsys.readouterr().out) == (0, "3\n")  # restart 1 of the job is attempt 4


def test_ready_ends_a_run_that_cannot_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upstream(tmp_path, "failed")
    code, paths = ready(tmp_path, slurm({}, []))
    assert (code, capsys.readouterr().out) == (75, "")
    sidecar = load_sidecar(paths)
    assert sidecar is not None
    assert (sidecar["status"], sidecar["exit_reason"]) == ("needs_resume", "dependency_failed")
    assert (sidecar["attempts"], sidecar["requeues"], sidecar["job_id"]) == ([], {}, "7")
    assert "orch resume first" in sidecar["message"]


def test_ready_says_when_slurm_refuses_to_take_it_back(tmp_path: Path) -> None:
    upstream(tmp_path, "running")
    refused = (1, "Requested operation is presently disabled")
    answers = {"show job": (0, "JobId=41 JobState=RUNNING"), "requeue": refused}
    _, paths = ready(tmp_path, slurm(answers, []))
    message = (load_sidecar(paths) or {})["message"]
    assert message == f"first goes on, and this job could not be put back into the queue: {refused[1]}"


def test_ready_looks_no_further_once_an_attempt_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "second").mkdir()
    write_json(RunPaths(tmp_path / "second").sidecar, {"status": "preempted", "attempts": [{"attempt": 4}]})
    code, _ = ready(tmp_path, slurm({}, []))
    assert (code, capsys.readouterr().out) == (0, "4\n")


# --- the local backend
def test_the_local_agent_waits_until_all_are_completed(tmp_path: Path) -> None:
    first = upstream(tmp_path, "running")
    done = {"status": "completed", "job_id": "41", "attempts": [{"attempt": 0}]}
    later = threading.Timer(0.3, write_json, (first.sidecar, done))
    later.start()
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, agent.STOP_SIGNALS)
    try:
        assert wait_here(["first"], RunPaths(tmp_path / "second"), FakeScheduler(True), agent.STOP_SIGNALS) is None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, kept)
        later.join()


def test_a_waiting_local_agent_can_be_told_to_stop(tmp_path: Path) -> None:
    upstream(tmp_path, "running")
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, agent.STOP_SIGNALS)
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # the test runner has threads of its own
        words = wait_here(["first"], RunPaths(tmp_path / "second"), FakeScheduler(True), agent.STOP_SIGNALS)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, kept)
    assert words == "it was told to stop while it waited"


def test_this_process_is_held_and_another_of_its_pid_is_not(tmp_path: Path) -> None:
    from orchestrator.worker.scheduler import local_job_id, process_identity

    scheduler = LocalScheduler("1.2", tmp_path)
    mine = local_job_id(process_identity(os.getpid()))
    assert scheduler.holds(mine) is True
    assert scheduler.holds(f"{os.getpid()}.1") is False

"""What scontrol's words mean (FACTS 2), and that every question comes back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest

from orchestrator.states import ExitReason
from orchestrator.worker.scheduler import LocalScheduler, SlurmScheduler, parse_fields, read_notice, run_command

NOW = datetime(2030, 1, 1, 12, 0, 0).timestamp()


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(NOW + seconds).isoformat()


@pytest.mark.parametrize(
    ("job", "cause", "deadline"),
    [
        ({"JobState": "RUNNING", "PreemptTime": stamp(0), "EndTime": stamp(20)}, ExitReason.PREEMPTED, 20),
        ({"JobState": "SIGNALING", "PreemptTime": stamp(0), "EndTime": stamp(20)}, ExitReason.PREEMPTED, 20),
        ({"JobState": "SUSPENDED", "PreemptTime": "None", "EndTime": stamp(9999)}, ExitReason.PREEMPTED, 120),
        ({"JobState": "STOPPED", "PreemptTime": stamp(0), "EndTime": stamp(20)}, ExitReason.PREEMPTED, 20),
        ({"JobState": "RUNNING", "PreemptTime": "None", "EndTime": stamp(110)}, ExitReason.TIME_LIMIT, 110),
        ({"JobState": "RUNNING", "PreemptTime": "None", "EndTime": stamp(9999)}, ExitReason.PREEMPTED, 120),
        ({"JobState": "RUNNING", "PreemptTime": "None", "EndTime": "Unknown"}, ExitReason.PREEMPTED, 120),
        ({"JobState": "COMPLETING", "Restarts": "2"}, ExitReason.REQUEUED_BY_ADMIN, 3),
        ({"JobState": "COMPLETING", "Restarts": "2", "PreemptTime": stamp(0)}, ExitReason.PREEMPTED, 3),
        ({"JobState": "COMPLETING", "Restarts": "1", "Reason": "TimeLimit"}, ExitReason.TIME_LIMIT, 3),
        ({"JobState": "COMPLETING", "Restarts": "1", "Reason": "None"}, ExitReason.CANCELLED, 3),
        ({"JobState": "NODE_FAIL", "Restarts": "1"}, ExitReason.NODE_FAILURE, 3),
    ],
)
def test_causes_are_told_apart(job: dict[str, str], cause: ExitReason, deadline: float) -> None:
    notice = read_notice(job, now=NOW, lead_time_s=120, restarts=1, kill_wait_s=lambda: 5.0)
    assert notice.cause is cause
    assert notice.deadline == pytest.approx(NOW + deadline)


@pytest.mark.parametrize(("preempt", "cause"), [("None", ExitReason.TIME_LIMIT), ("0", ExitReason.PREEMPTED)])
def test_an_end_that_has_passed_leaves_kill_wait(preempt: str, cause: ExitReason) -> None:
    """The clock of slurmctld may lag, and OverTimeLimit lets a job run on: it must still be able to save."""
    job = {"JobState": "RUNNING", "PreemptTime": preempt if preempt == "None" else stamp(-20), "EndTime": stamp(-10)}
    notice = read_notice(job, now=NOW, lead_time_s=120, restarts=1, kill_wait_s=lambda: 30.0)
    assert (notice.cause, notice.deadline) == (cause, NOW + 28)


def test_times_are_asked_for_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever format the user likes, and whatever the clocks on the wall do in autumn."""
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert run_command(["sh", "-c", 'echo "$SLURM_TIME_FORMAT"'], 5) == (0, "%s\n")
    job = {"JobState": "RUNNING", "PreemptTime": f"{NOW:.0f}", "EndTime": f"{NOW + 20:.0f}"}
    notice = read_notice(job, now=NOW, lead_time_s=120, restarts=1, kill_wait_s=lambda: 30.0)
    assert (notice.cause, notice.deadline) == (ExitReason.PREEMPTED, NOW + 20)


def test_without_a_time_limit_the_grace_is_the_partitions() -> None:
    job = {"JobState": "RUNNING", "PreemptTime": stamp(0), "EndTime": "Unknown"}

    def deadline(grace: float | None) -> float:
        return read_notice(
            job, now=NOW, lead_time_s=120, restarts=0, kill_wait_s=lambda: 5.0, grace_s=lambda: grace
        ).deadline

    assert [deadline(20), deadline(600), deadline(None)] == [NOW + 20, NOW + 120, NOW + 120]


def answers(**by_verb: tuple[int, str]) -> SlurmScheduler:
    def run(argv: Sequence[str], timeout_s: float) -> tuple[int, str]:
        assert timeout_s > 0
        return by_verb[argv[1]]

    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return SlurmScheduler({"SLURM_JOB_ID": "7"}, run=run, clock=lambda: now[0], sleep=sleep)


def test_silence_is_no_cause() -> None:
    notice = answers(show=(124, "no answer")).why(120)
    assert notice.cause is None


@pytest.mark.parametrize(
    ("answer", "ok"),
    [
        ((0, ""), True),
        ((1, "Job is pending execution for job 7\n"), True),
        ((1, "Requested operation is presently disabled for job 7"), False),
        ((124, ""), False),
    ],
)
def test_requeue_succeeds_when_slurm_was_faster(answer: tuple[int, str], ok: bool) -> None:
    done = answers(show=(0, "JobId=7 JobState=RUNNING Restarts=0"), requeue=answer).requeue()
    assert done.ok is ok
    assert ok or done.message


@pytest.mark.parametrize(
    ("job", "ok", "cancelled"),
    [
        ("JobState=COMPLETING Restarts=0 Reason=None", False, True),  # a scancel after the notice
        ("JobState=RUNNING Restarts=1", True, False),  # the next attempt: a requeue would end it
        ("JobState=PENDING Restarts=1 Reason=BeginTime", True, False),
    ],
)
def test_a_requeue_is_not_asked_for_when_it_would_undo_or_end_something(job: str, ok: bool, cancelled: bool) -> None:
    done = answers(show=(0, f"JobId=7 {job}")).requeue()
    assert (done.ok, done.cancelled) == (ok, cancelled)


@pytest.mark.parametrize(
    ("ended", "cancelled"),
    [(5, True), (20, False), (19, False)],  # seconds after the preemption; the grace is 20 s
)
def test_a_scancel_within_the_grace_of_a_preemption_is_not_undone(ended: int, cancelled: bool) -> None:
    """Slurm says the same of a job that it has ended itself (PreemptMode=CANCEL), but for the time (measured)."""
    told = answers(
        show=(0, f"JobId=7 JobState=RUNNING Restarts=0 PreemptTime={NOW:.0f} EndTime={NOW + 20:.0f}"),
        config=(0, "KillWait = 5"),
    ).why(120)
    job = f"JobId=7 JobState=COMPLETING Reason=None Restarts=0 PreemptTime={NOW:.0f} EndTime={NOW + ended:.0f}"
    done = answers(show=(0, job), requeue=(0, "")).requeue(grace_end=told.grace_end)
    assert (done.ok, done.cancelled) == (not cancelled, cancelled)


def test_a_requeue_without_a_notice_is_a_lost_node() -> None:
    """srun ends with `Node failure on n1` while everything on that node may run on."""
    scheduler = answers(show=(0, "JobId=7 JobState=PENDING Restarts=1 Reason=BeginTime"), config=(0, "KillWait = 5"))
    assert scheduler.why_ended(noticed=False, lead_time_s=20) is ExitReason.NODE_FAILURE
    assert scheduler.why_ended(noticed=True, lead_time_s=20) is ExitReason.REQUEUED_BY_ADMIN


def test_a_slurmctld_that_restarts_is_waited_for_at_the_end_of_an_attempt() -> None:
    now = [0.0]

    def run(argv: Sequence[str], timeout_s: float) -> tuple[int, str]:
        if now[0] < 20:
            return 1, "slurm_requeue error: Unable to contact slurm controller (connect failure)"
        return 0, "JobId=7 JobState=RUNNING Restarts=0"

    def sleep(seconds: float) -> None:
        now[0] += seconds

    assert SlurmScheduler({"SLURM_JOB_ID": "7"}, run=run, clock=lambda: now[0], sleep=sleep).requeue().ok
    assert now[0] == 20


def test_a_pause_before_the_next_attempt_is_told_to_slurm_after_the_requeue() -> None:
    asked: list[list[str]] = []

    def run(argv: Sequence[str], timeout_s: float) -> tuple[int, str]:
        asked.append(list(argv))
        return 0, "JobId=7 JobState=RUNNING Restarts=0"

    assert SlurmScheduler({"SLURM_JOB_ID": "7"}, run=run).requeue(30).ok
    assert asked[-2:] == [["scontrol", "requeue", "7"], ["scontrol", "update", "jobid=7", "starttime=now+30"]]


@pytest.mark.parametrize(("ago", "left"), [(0, 28), (10, 18), (300, 1)])
def test_what_is_left_counts_from_the_signal_and_is_never_in_the_past(ago: float, left: float) -> None:
    notice = read_notice(
        {"JobState": "COMPLETING"}, now=NOW, told=NOW - ago, lead_time_s=120, restarts=0, kill_wait_s=lambda: 30.0
    )
    assert notice.deadline == NOW + left


def test_an_array_element_is_named_by_array_and_index() -> None:
    environ = {"SLURM_JOB_ID": "40", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"}
    assert SlurmScheduler(environ).job_id == "40_3"


def test_a_question_that_hangs_has_a_deadline() -> None:
    code, words = run_command(["sleep", "30"], 0.05)
    assert code == 124
    assert "no answer" in words


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_second_notice_does_not_end_the_question_about_the_first(name: str) -> None:
    """Slurm sends it to every process of the step."""
    assert run_command(["sh", "-c", f"kill -{name} $$; echo answered"], 60) == (0, "answered\n")


def test_an_address_is_asked_for_until_slurmctld_answers() -> None:
    answers = [
        (1, "slurm_load_node error: Unable to contact slurm controller"),
        (124, ""),
        (0, "NodeName=n7 Arch=x86_64 NodeAddr=10.0.0.7 Version=1"),
    ]
    scheduler = SlurmScheduler({"SLURM_JOB_ID": "7"}, run=lambda *_: answers.pop(0), sleep=lambda _: None)
    assert scheduler.node_addresses("n1", "n7", "n1") == ["n1", "10.0.0.7", "n1"]


def test_a_missing_program_is_an_answer() -> None:
    assert run_command(["/no/such/program"], 1.0)[0] == 127


def test_a_local_signal_is_a_preemption_and_with_a_tombstone_a_cancellation(tmp_path: Path) -> None:
    scheduler = LocalScheduler("1.2", tmp_path / "cancelled")
    assert scheduler.why(120).cause is ExitReason.PREEMPTED
    (tmp_path / "cancelled").touch()
    before = time.time()
    notice = scheduler.why(120)
    assert notice.cause is ExitReason.CANCELLED
    assert notice.deadline < before + 60


def test_fields_are_parsed() -> None:
    assert parse_fields("JobId=7 JobState=RUNNING X=a=b") == {"JobId": "7", "JobState": "RUNNING", "X": "a=b"}

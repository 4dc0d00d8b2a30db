"""sbatch exactly once, refusals in Slurm's own words with a fix, and what sbatch gets to see."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.backends.base import JobHandle, SchedulerState
from orchestrator.backends.process import CommandMissing, run_command
from orchestrator.backends.slurm import SlurmBackend, scheduler_words, submission_environment
from orchestrator.errors import BackendError, SchedulerUnavailable
from tests.fakes.plans import slurm_plan
from tests.fakes.slurm import FakeSlurm


def backend(slurm: FakeSlurm) -> SlurmBackend:
    return SlurmBackend(run=slurm, sleep=lambda seconds: None)


def sbatch_calls(slurm: FakeSlurm) -> int:
    return sum(1 for command in slurm.commands if command[0] == "sbatch")


def test_the_script_in_the_run_directory_is_submitted(tmp_path: Path) -> None:
    slurm = FakeSlurm()
    handle = backend(slurm).submit(slurm_plan(tmp_path / "run"), environ={"HOME": "/root"})
    assert handle == JobHandle("slurm", "101")
    assert slurm.commands == [["sbatch", "--parsable", str(tmp_path / "run/plan/submit.sbatch")]]


def test_a_job_queued_before_the_time_out_is_found_by_its_token(tmp_path: Path) -> None:
    slurm = FakeSlurm(lose_answers=1)
    slurm.queue("somebody else's comment")
    handle = backend(slurm).submit(slurm_plan(tmp_path / "run"), environ={})
    assert handle.job_id == "102"
    assert sbatch_calls(slurm) == 1


def test_a_request_that_was_lost_is_repeated(tmp_path: Path) -> None:
    slurm = FakeSlurm(drop_requests=1)
    handle = backend(slurm).submit(slurm_plan(tmp_path / "run"), environ={})
    assert handle.job_id in slurm.jobs
    assert sbatch_calls(slurm) == 2


def test_when_the_first_request_arrives_late_only_the_oldest_job_stays(tmp_path: Path) -> None:
    slurm = FakeSlurm(drop_requests=1)
    plan = slurm_plan(tmp_path / "run")

    class LateSlurm(FakeSlurm):
        def _sbatch(self, argv, environ):  # type: ignore[no-untyped-def]
            if not self.drop_requests:
                self.queue(plan.token)  # the lost request arrives while the second is under way
            return super()._sbatch(argv, environ)

    late = LateSlurm(drop_requests=slurm.drop_requests)
    handle = backend(late).submit(plan, environ={})
    states = {job.job_id: job.state for job in late.jobs.values()}
    assert states == {"101": "RUNNING", "102": "CANCELLED"}
    assert handle.job_id == "101"


def test_a_silent_slurm_leaves_the_question_open(tmp_path: Path) -> None:
    slurm = FakeSlurm(down=True)
    with pytest.raises(SchedulerUnavailable, match="not known") as caught:
        backend(slurm).submit(slurm_plan(tmp_path / "run"), environ={})
    assert "looks for this job" in str(caught.value.hint)
    assert sbatch_calls(slurm) == 1  # never a second job while nobody knows about the first


def test_an_endlessly_lost_request_ends_in_an_error(tmp_path: Path) -> None:
    slurm = FakeSlurm(drop_requests=99)
    with pytest.raises(SchedulerUnavailable):
        backend(slurm).submit(slurm_plan(tmp_path / "run"), environ={})
    assert sbatch_calls(slurm) == 3


def test_no_sbatch_here(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="not on PATH") as caught:
        backend(FakeSlurm(missing=True)).submit(slurm_plan(tmp_path / "run"), environ={})
    assert "backend: local" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (
            "sbatch: error: invalid partition specified: nope\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            "invalid partition specified: nope",
            "high, low",
        ),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified\n",
            "Invalid account",
            "slurm.account",
        ),
        ("sbatch: error: Batch job submission failed: Invalid qos specification\n", "Invalid qos", "slurm.qos"),
        ("sbatch: error: Invalid feature specification\n", "Invalid feature", "slurm.constraint"),
        (
            "sbatch: error: Memory specification can not be satisfied\n"
            "sbatch: error: Batch job submission failed: Requested node configuration is not available\n",
            "Memory specification can not be satisfied",
            "resources",
        ),
        ("sbatch: error: Batch job submission failed: something new\n", "something new", "--dry-run"),
    ],
)
def test_a_refusal_is_one_error_with_slurms_words_and_a_fix(
    tmp_path: Path, words: str, message: str, hint: str
) -> None:
    slurm = FakeSlurm(refuse=words)
    with pytest.raises(BackendError, match=message) as caught:
        backend(slurm).submit(slurm_plan(tmp_path / "run"), environ={})
    assert hint in str(caught.value.hint)
    assert sbatch_calls(slurm) == 1
    assert not isinstance(caught.value, SchedulerUnavailable)


def test_a_transient_refusal_is_looked_into_and_repeated(tmp_path: Path) -> None:
    slurm = FakeSlurm(refuse="sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n")
    with pytest.raises(SchedulerUnavailable, match="Socket timed out"):
        backend(slurm).submit(slurm_plan(tmp_path / "run"), environ={})
    assert sbatch_calls(slurm) == 3
    assert any("--format=%i|%k" in command for command in slurm.commands)


def test_sbatch_sees_no_secret_and_nothing_that_beats_the_script(tmp_path: Path) -> None:
    slurm = FakeSlurm()
    environ = {
        "WANDB_API_KEY": "s3cret",
        "SBATCH_PARTITION": "other",
        "SBATCH_ACCOUNT": "kept: the script names none",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "3",
        "SLURM_CONF": "/etc/slurm.conf",
        "HOME": "/home/u",
    }
    backend(slurm).submit(slurm_plan(tmp_path / "run", secrets=["WANDB_API_KEY"]), environ=environ)
    assert set(slurm.environ) == {"SBATCH_ACCOUNT", "SLURM_CONF", "HOME"}


def test_a_flag_without_a_value_counts_as_the_scripts_own() -> None:
    script = "#SBATCH --exclusive\n#SBATCH --requeue\n"
    environ = {"SBATCH_REQUEUE": "1", "SBATCH_EXCLUSIVE": "user", "SBATCH_QOS": "long"}
    assert submission_environment(environ, script=script) == {"SBATCH_QOS": "long"}


def test_slurms_words_without_their_prefixes() -> None:
    assert scheduler_words("sbatch: error: a\nsbatch: error: Batch job submission failed: b\n\n") == (
        "a; Batch job submission failed: b"
    )


def test_a_signal_goes_to_the_steps_of_a_running_job_only(tmp_path: Path) -> None:
    slurm = FakeSlurm()
    handle = JobHandle("slurm", slurm.queue())
    backend(slurm).signal(handle, "USR1")
    assert slurm.commands[-1] == ["scancel", "--signal=USR1", handle.job_id]
    slurm.jobs[handle.job_id].state = "PENDING"  # there scancel --signal would hang for a minute and a half
    with pytest.raises(BackendError, match="not running"):
        backend(slurm).signal(handle, "USR1")


def test_a_scancel_that_fails_says_why(tmp_path: Path) -> None:
    class Denied(FakeSlurm):
        def _scancel(self, argv, environ):  # type: ignore[no-untyped-def]
            from orchestrator.backends.process import Finished

            return Finished(1, "", "scancel: error: Kill job error on job id 101: Access/permission denied\n")

    slurm = Denied()
    with pytest.raises(BackendError, match="Access/permission denied"):
        backend(slurm).cancel(JobHandle("slurm", slurm.queue()))


def test_submitits_handle_shares_one_question_and_our_rule() -> None:
    slurm = FakeSlurm(accounting=False)
    subject = backend(slurm)
    first, second = (subject.job(JobHandle("slurm", slurm.queue())) for _ in range(2))
    assert first.state == "RUNNING"
    assert second.state == "RUNNING"
    assert sum(1 for command in slurm.commands if command[0] == "squeue") == 1
    assert not first.done()
    slurm.forget(first.job_id)
    first.watcher.update()  # submitit merges questions within the same millisecond
    assert first.done()
    assert first.watcher.get_info(second.job_id)["NodeList"] == "n1"
    second.cancel()
    first.watcher.update()
    assert second.done()


def test_submitits_handle_on_an_unknown_job_is_never_done() -> None:
    job = backend(FakeSlurm(accounting=False)).job(JobHandle("slurm", "4711"))
    assert job.state == "UNKNOWN"
    assert not job.done(force_check=True)


def test_poll_of_many_is_one_question() -> None:
    slurm = FakeSlurm()
    handles = [JobHandle("slurm", slurm.queue()) for _ in range(50)]
    answers = backend(slurm).poll(handles)
    assert all(answers[handle].state is SchedulerState.RUNNING for handle in handles)
    assert len(slurm.commands) == 1


def test_commands_have_a_deadline() -> None:
    with pytest.raises(SchedulerUnavailable, match=r"sleep gave no answer within 0\.2 s"):
        run_command(["sleep", "30"], timeout_s=0.2)


def test_a_missing_program_is_named() -> None:
    with pytest.raises(CommandMissing, match="no-such-program-here"):
        run_command(["no-such-program-here"], timeout_s=1)


def test_a_command_gives_what_it_printed() -> None:
    finished = run_command(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=10)
    assert (finished.returncode, finished.stdout, finished.stderr) == (3, "out\n", "err\n")


def test_a_command_beside_a_job_takes_nothing_from_it_and_nothing_of_ours_with_it() -> None:
    environ = {"HOME": "/root", "TERM": "xterm", "TOKEN": "secret", "SLURM_JOB_ID": "9", "SLURM_MEM_PER_NODE": "1"}
    environ |= {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_PARTITION": "x"}
    command = backend(FakeSlurm()).beside(
        JobHandle("slurm", "101"), ["python", "-m", "x"], nodes=["n2", "n3"], environ=environ
    )
    *options, python, _, _ = command.argv
    assert python == "python"
    for option in ("--jobid=101", "--overlap", "--nodes=2", "--ntasks=2", "--nodelist=n2,n3", "--export=HOME,TERM"):
        assert option in options
    assert "--pty" not in options
    assert sorted(command.environ) == ["HOME", "SLURM_CONF", "TERM", "TOKEN"]
    terminal = backend(FakeSlurm()).beside(
        JobHandle("slurm", "101"), ["x"], nodes=["n2"], environ=environ, terminal=True
    )
    assert terminal.argv[-2:] == ("--pty", "x")

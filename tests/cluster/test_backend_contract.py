"""The contract of backends on real Slurm, with and without slurmdbd, and sbatch whose answer gets lost."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from orchestrator.backends.base import JobHandle, SchedulerState
from orchestrator.backends.process import Finished, run_command
from orchestrator.backends.slurm import SlurmBackend
from orchestrator.errors import BackendError, SchedulerUnavailable
from tests.cluster.handle import Cluster
from tests.contract.test_backend import (
    Case,
    planner,
    test_a_signal_needs_a_running_job,
    test_a_signal_to_a_running_job_is_accepted,
    test_a_submitted_job_is_alive,
    test_a_token_nobody_submitted_is_not_found,
    test_an_ended_job_is_never_alive_again,
    test_an_unknown_job_is_unknown_and_no_error,
    test_cancel_ends_the_job_and_may_be_repeated,
    test_cancelling_an_unknown_job_is_no_error,
    test_nothing_asked_nothing_answered,
    test_one_poll_answers_for_every_handle,
)

pytestmark = pytest.mark.other_slurm

__all__ = [
    "test_a_signal_needs_a_running_job",
    "test_a_signal_to_a_running_job_is_accepted",
    "test_a_submitted_job_is_alive",
    "test_a_token_nobody_submitted_is_not_found",
    "test_an_ended_job_is_never_alive_again",
    "test_an_unknown_job_is_unknown_and_no_error",
    "test_cancel_ends_the_job_and_may_be_repeated",
    "test_cancelling_an_unknown_job_is_no_error",
    "test_nothing_asked_nothing_answered",
    "test_one_poll_answers_for_every_handle",
]


class ClusterRunner:
    """Runs the real commands on the test's cluster; `lose` answers of sbatch are thrown away after it has queued."""

    def __init__(self, cluster: Cluster) -> None:
        self.overrides = cluster.overrides
        self.lose = 0

    def __call__(self, argv: Sequence[str], *, timeout_s: float, environ: Mapping[str, str] | None = None) -> Finished:
        done = run_command(argv, timeout_s=timeout_s, environ={**(environ or os.environ), **self.overrides})
        if argv[0] == "sbatch" and self.lose:
            self.lose -= 1
            raise SchedulerUnavailable(f"sbatch gave no answer within {timeout_s:g} s")
        return done


@pytest.fixture(params=["cluster", "cluster_without_accounting"])
def runner(request: pytest.FixtureRequest) -> ClusterRunner:
    return ClusterRunner(request.getfixturevalue(request.param))


@pytest.fixture
def case(runner: ClusterRunner, tmp_path: Path) -> Iterator[Case]:
    made = Case(SlurmBackend(run=runner), planner(tmp_path, "slurm"), JobHandle("slurm", "999999"))
    yield made
    for handle in made.started:
        made.cancel(handle)
    made.wait_until(lambda: not any(status.state.alive for status in made.backend.poll(made.started).values()))


def test_a_job_whose_answer_got_lost_is_queued_once(case: Case, runner: ClusterRunner) -> None:
    runner.lose = 1
    handle = case.submit()
    found = case.backend.find(case.plans[-1].token)
    assert found == handle
    queue = runner(["squeue", "--noheader", "--format=%i|%k"], timeout_s=30).stdout.split()
    assert [row for row in queue if row.endswith(case.plans[-1].token)] == [f"{handle.job_id}|{case.plans[-1].token}"]


def test_an_unknown_partition_is_one_error_that_lists_the_known(case: Case, runner: ClusterRunner) -> None:
    plan = case.make_plan("refused")
    script = plan.run_dir / "plan" / "submit.sbatch"
    script.write_text(script.read_text().replace("#SBATCH --nodes=1", "#SBATCH --partition=nope\n#SBATCH --nodes=1"))
    with pytest.raises(BackendError, match="invalid partition specified: nope") as caught:
        case.backend.submit(plan, environ=dict(os.environ))
    assert "low" in str(caught.value.hint)


def test_submitits_handle_on_a_real_job(case: Case) -> None:
    assert isinstance(case.backend, SlurmBackend)
    handle = case.submit()
    job = case.backend.job(handle)
    case.wait_until(lambda: job.get_info(mode="force").get("State") == SchedulerState.RUNNING.name)
    assert job.get_info()["NodeList"].startswith("n")
    case.cancel(handle)
    case.wait_until(lambda: job.done(force_check=True))

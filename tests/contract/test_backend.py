"""What every backend must do. `tests/cluster/test_backend_contract.py` runs the same suite on a real cluster."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator.backends.base import Backend, JobHandle, JobStatus, SchedulerState
from orchestrator.errors import BackendError
from orchestrator.operations.snapshot import ensure_snapshot
from orchestrator.operations.submission import plan_of, prepare, start_files
from orchestrator.paths import RootPaths, RunPaths
from orchestrator.plan import Plan
from tests.fakes.slurm import FakeSlurm


@dataclass
class Case:
    """A backend, a way to make plans for it, and an id that it never gave out."""

    backend: Backend
    make_plan: Callable[[str], Plan]
    unknown: JobHandle
    started: list[JobHandle] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)

    def submit(self, name: str = "run") -> JobHandle:
        plan = self.make_plan(name)
        self.plans.append(plan)
        handle = self.backend.submit(plan, environ=dict(os.environ))
        self.started.append(handle)
        return handle

    def cancel(self, handle: JobHandle) -> None:
        """As `operations.cancel` does it: the tombstone first, so that nothing requeues the job."""
        for plan in self.plans:
            RunPaths(plan.run_dir).tombstone.touch()
        self.backend.cancel(handle)

    def status(self, handle: JobHandle) -> JobStatus:
        return self.backend.poll([handle])[handle]

    def wait_until(self, condition: Callable[[], bool], *, deadline_s: float = 120.0) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end, "the condition did not come true"
            time.sleep(0.05)


def planner(folder: Path, backend: str) -> Callable[[str], Plan]:
    """Plans of a program that waits to be stopped, with their files where `submit` writes them."""
    workspace = folder / "workspace"
    workspace.mkdir()

    def make(name: str) -> Plan:
        spec = {
            "name": name,
            "backend": backend,
            "root": str(folder / "root"),
            "job": {"command": [sys.executable, "-c", "import time; time.sleep(600)"]},
            "workspace": {"path": str(workspace)},
            "resources": {"mem": "100M", "time": "00:05:00"},
            "preemption": {"lead_time": "1s"},  # the program saves nothing: it is ended when this is over
        }
        request = prepare(spec, overrides=(), root=None, environ={})
        ensure_snapshot(request.snapshot, RootPaths(request.root))
        plan = plan_of(spec)
        start_files(plan)
        return plan

    return make


def slurm_case(folder: Path) -> Case:
    from orchestrator.backends.slurm import SlurmBackend

    slurm = FakeSlurm()
    return Case(SlurmBackend(run=slurm), planner(folder, "slurm"), JobHandle("slurm", "999999"))


def local_case(folder: Path) -> Case:
    from orchestrator.backends.local import LocalBackend

    return Case(LocalBackend(), planner(folder, "local"), JobHandle("local", "999999999.1"))


CASES = {"slurm": slurm_case, "local": local_case}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    made = CASES[request.param](tmp_path)
    yield made
    for handle in made.started:
        made.cancel(handle)
    made.wait_until(lambda: not any(status.state.alive for status in made.backend.poll(made.started).values()))


def test_a_submitted_job_is_alive(case: Case) -> None:
    handle = case.submit()
    assert handle.backend == case.backend.name
    assert case.status(handle).state.alive


def test_an_unknown_job_is_unknown_and_no_error(case: Case) -> None:
    assert case.status(case.unknown).state is SchedulerState.UNKNOWN


def test_one_poll_answers_for_every_handle(case: Case) -> None:
    first, second = case.submit("one"), case.submit("two")
    answers = case.backend.poll([first, case.unknown, second])
    assert set(answers) == {first, second, case.unknown}
    assert answers[first].state.alive
    assert answers[second].state.alive
    assert not answers[case.unknown].state.alive


def test_nothing_asked_nothing_answered(case: Case) -> None:
    assert case.backend.poll([]) == {}


def test_cancel_ends_the_job_and_may_be_repeated(case: Case) -> None:
    handle = case.submit()
    case.cancel(handle)
    case.wait_until(lambda: not case.status(handle).state.alive)
    case.cancel(handle)
    assert not case.status(handle).state.alive


def test_cancelling_an_unknown_job_is_no_error(case: Case) -> None:
    case.backend.cancel(case.unknown)


def test_a_signal_needs_a_running_job(case: Case) -> None:
    with pytest.raises(BackendError) as caught:
        case.backend.signal(case.unknown, "USR1")
    assert caught.value.hint


def test_a_signal_to_a_running_job_is_accepted(case: Case) -> None:
    handle = case.submit()
    case.wait_until(lambda: case.status(handle).state is SchedulerState.RUNNING)
    case.backend.signal(handle, "USR1")


def test_a_live_job_is_found_by_its_token(case: Case) -> None:
    handle = case.submit()
    assert case.backend.find(case.plans[0].token) == handle


def test_a_token_nobody_submitted_is_not_found(case: Case) -> None:
    assert case.backend.find("orch:nobody:0123456789abcdef") is None


def test_an_ended_job_is_never_alive_again(case: Case) -> None:
    handle = case.submit()
    case.cancel(handle)
    case.wait_until(lambda: not case.status(handle).state.alive)
    assert not case.status(handle).state.alive

"""Submitting again is safe (PROTOCOLS 1), and a submission that fails leaves nothing that looks queued."""

from __future__ import annotations

import multiprocessing
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from orchestrator import operations
from orchestrator.backends.base import JobHandle, JobStatus, SchedulerState
from orchestrator.errors import (
    BackendError,
    ContainerError,
    RefusedError,
    RegistryError,
    RunNotFound,
    SchedulerUnavailable,
    SpecError,
)
from orchestrator.operations.roots import find_run, load_memory, locked, run_names
from orchestrator.plan import Plan
from orchestrator.registry import read_events
from orchestrator.states import JobState
from tests.fakes.backend import FakeAgent, FakeBackend
from tests.unit.operations.conftest import World


def test_a_first_submission_queues_the_run_and_writes_its_files(world: World) -> None:
    done = world.submit()
    assert done.action == "submitted"
    assert done.job_id == "101"
    paths = world.paths(done.run_id)
    plan = world.backend.plans[0]
    assert paths.script.read_text() == plan.script
    assert paths.agent_plan.read_text() == plan.agent_json
    assert paths.spec.exists()
    assert (world.root / "code" / plan.agent["code_hash"] / "train.py").exists()
    assert world.status(done.run_id).state is JobState.QUEUED


def test_what_is_submitted_is_what_dry_run_shows(world: World) -> None:
    shown = operations.plan_of(world.spec, environ=world.environ)
    assert not world.root.exists()
    world.submit()
    assert str(world.backend.plans[0]) == str(shown)


def test_the_result_as_json_has_exactly_the_documented_keys(world: World) -> None:
    done = world.submit()
    assert done.as_json() == {
        "run_id": done.run_id,
        "run_dir": str(world.root / "runs" / done.run_id),
        "backend": "slurm",
        "job_id": "101",
        "action": "submitted",
    }


def test_a_queued_run_is_left_alone(world: World) -> None:
    first = world.submit()
    again = world.submit()
    assert again.action == "already_queued"
    assert (again.run_id, again.job_id) == (first.run_id, first.job_id)
    assert len(world.backend.plans) == 1


def test_a_running_run_is_left_alone(world: World) -> None:
    world.running()
    assert world.submit().action == "already_running"
    assert len(world.backend.plans) == 1


def test_a_requeued_run_that_waits_is_left_alone(world: World) -> None:
    _, agent = world.running()
    agent.end("preempted", "preempted", step=10)
    world.backend.set("101", SchedulerState.PENDING, "BeginTime")
    assert world.submit().action == "already_queued"


def test_a_completed_run_is_left_alone(world: World) -> None:
    world.ended("completed", "completed", step=100)
    world.backend.down = True  # nobody needs to be asked
    assert world.submit().action == "already_completed"


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("needs_resume", "preempted"),
        ("needs_resume", "requeue_limit"),
        ("failed", "failure"),
        ("failed", "out_of_memory"),
    ],
)
def test_a_stopped_run_goes_on_as_the_next_attempt(world: World, status: str, reason: str) -> None:
    run = world.ended(status, reason, step=10)
    done = world.submit()
    assert (done.run_id, done.action, done.job_id) == (run, "resumed", "102")
    assert world.backend.plans[1].agent["attempt_base"] == 1
    assert world.backend.plans[1].token != world.backend.plans[0].token
    assert world.status(run).state is JobState.QUEUED


def test_a_lost_run_goes_on(world: World) -> None:
    run, _ = world.running()
    world.backend.set("101", SchedulerState.ENDED, "NODE_FAIL")
    assert world.status(run).state is JobState.LOST
    assert world.submit().action == "resumed"
    assert world.backend.plans[1].agent["attempt_base"] == 1


def test_a_run_slurm_requeued_after_the_agent_gave_up_is_not_submitted_twice(world: World) -> None:
    run = world.ended("needs_resume", "preempted", step=10)
    world.backend.set("101", SchedulerState.PENDING, "BeginTime")
    assert world.submit().action == "already_queued"
    assert world.status(run).state is JobState.PREEMPTED


def test_a_cancelled_run_is_refused_with_the_way_out(world: World) -> None:
    run, _ = world.running()
    world.cancel(run)
    with pytest.raises(RefusedError, match="was cancelled") as caught:
        world.submit()
    assert f"orch resume {run}" in str(caught.value.hint)
    assert caught.value.exit_code == 7


def test_new_makes_a_numbered_copy(world: World) -> None:
    first = world.submit()
    second, third = world.submit(new=True), world.submit(new=True)
    assert [second.run_id, third.run_id] == [f"{first.run_id}-2", f"{first.run_id}-3"]
    assert [second.action, third.action] == ["submitted", "submitted"]


def test_new_without_a_first_run_is_the_first_run(world: World) -> None:
    done = world.submit(new=True)
    assert done.run_id == world.submit().run_id


def test_changed_code_is_another_run(world: World) -> None:
    first = world.submit()
    (world.folder / "train.py").write_text("print('changed')\n")
    assert world.submit().run_id != first.run_id


def test_changed_arguments_are_another_run_and_resources_are_not(world: World) -> None:
    first = world.submit()
    assert world.submit(overrides=["job.args.lr=0.2"]).run_id != first.run_id
    assert world.submit(overrides=["resources.cpus_per_task=4"]).run_id == first.run_id


def test_the_same_run_from_another_directory(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = world.submit()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert world.submit().run_id == first.run_id
    assert find_run(first.run_id, environ=world.environ).run_dir == first.run_dir
    assert find_run(first.run_id[:9], environ=world.environ).run_dir == first.run_dir


def test_python_users_pass_a_mapping(world: World) -> None:
    spec = {
        "name": "job",
        "backend": "slurm",
        "root": str(world.root),
        "job": {"command": ["true"]},
        "workspace": {"path": str(world.folder)},
    }
    assert world.submit(spec).action == "submitted"


# --- secrets


def test_secrets_lie_in_a_private_file_before_the_job_is_queued(world: World) -> None:
    done = world.submit()
    secrets = world.paths(done.run_id).secrets
    assert world.backend.secrets_seen == ['{"TOKEN": "s3cret-value"}']
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o600
    others = [path for path in world.root.rglob("*") if path.is_file() and path != secrets]
    assert not [path for path in others if b"s3cret-value" in path.read_bytes()]


def test_a_missing_secret_is_named_and_nothing_is_written(world: World) -> None:
    del world.environ["TOKEN"]
    with pytest.raises(SpecError, match="TOKEN is not set"):
        world.submit()
    assert not world.root.exists()


def test_what_needs_nothing_needs_no_secret(world: World) -> None:
    world.submit()
    del world.environ["TOKEN"]
    assert world.submit().action == "already_queued"
    world.backend.set("101", SchedulerState.ENDED, "NODE_FAIL")
    with pytest.raises(SpecError, match="TOKEN"):
        world.submit()


def test_without_its_secrets_neither_submit_nor_resume_says_to_do_the_other(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    with pytest.raises(SpecError, match="TOKEN is not set") as caught:
        world.resume(run, environ={name: value for name, value in world.environ.items() if name != "TOKEN"})
    assert str(caught.value.hint).endswith("and run the same command again")


def test_resume_reads_the_secrets_again(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    assert not world.paths(run).secrets.exists()
    world.resume(run)
    assert world.backend.secrets_seen[1] == '{"TOKEN": "s3cret-value"}'


# --- failures


def test_a_refused_first_submission_leaves_no_run(world: World) -> None:
    world.backend.refuse = "Slurm refused the job: invalid partition"
    with pytest.raises(BackendError, match="invalid partition"):
        world.submit()
    assert list((world.root / "runs").iterdir()) == []
    world.backend.refuse = ""
    assert world.submit().action == "submitted"


def test_a_refused_continuation_leaves_the_run_as_it_was(world: World) -> None:
    run = world.ended("needs_resume", "preempted", step=10)
    world.backend.refuse = "Slurm refused the job: QOSMaxSubmitJobPerUserLimit"
    with pytest.raises(BackendError):
        world.submit()
    assert world.status(run).state is JobState.NEEDS_RESUME
    assert not world.paths(run).secrets.exists()
    world.backend.refuse = ""
    assert world.submit().action == "resumed"


def test_a_job_whose_id_got_lost_is_found_by_its_token(world: World) -> None:
    world.backend.lose_answer = True
    with pytest.raises(SchedulerUnavailable):
        world.submit()
    world.backend.lose_answer = False
    again = world.submit()
    assert (again.action, again.job_id) == ("already_queued", "101")
    assert len(world.backend.plans) == 1
    assert "submitted" in [event["event"] for event in read_events(world.paths(again.run_id))]


def test_the_secrets_of_such_a_job_are_handed_over_again(world: World) -> None:
    world.backend.lose_answer = True
    with pytest.raises(SchedulerUnavailable):
        world.submit()
    world.backend.lose_answer = False
    done = world.submit()
    assert world.paths(done.run_id).secrets.exists()


def test_ctrl_c_while_queueing_does_not_queue_the_run_twice(world: World) -> None:
    world.backend.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        world.submit()
    world.backend.interrupt = False
    again = world.submit()
    assert (again.action, again.job_id) == ("already_queued", "101")
    assert len(world.backend.plans) == 1


def test_resume_hands_the_secrets_over_again_too(world: World) -> None:
    world.backend.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        world.submit()
    (run_dir,) = (world.root / "runs").iterdir()
    assert not world.paths(run_dir.name).secrets.exists()
    assert world.resume(run_dir.name).action == "already_queued"
    assert world.paths(run_dir.name).secrets.exists()


def test_a_job_found_again_that_has_ended_gets_no_secrets(world: World) -> None:
    world.backend.lose_answer = True
    with pytest.raises(SchedulerUnavailable):
        world.submit()
    (run_dir,) = (world.root / "runs").iterdir()
    agent = FakeAgent(world.paths(run_dir.name))
    agent.begin(0)
    agent.end("completed", "completed", step=100)
    world.backend.set("101", SchedulerState.ENDED, "COMPLETED")
    assert world.submit().action == "already_completed"
    assert not world.paths(run_dir.name).secrets.exists()


def test_a_submission_lost_for_good_is_repeated(world: World) -> None:
    world.backend.down = True
    with pytest.raises(SchedulerUnavailable):
        world.submit()
    world.backend.down = False
    done = world.submit()
    assert done.action == "submitted"
    assert len(world.backend.plans) == 1


def test_a_silent_scheduler_is_no_reason_to_submit_again(world: World) -> None:
    world.running()
    world.backend.down = True
    with pytest.raises(SchedulerUnavailable, match="not known"):
        world.submit()
    assert len(world.backend.plans) == 1


def test_an_unwritable_root_is_one_error(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="cannot write") as caught:
        world.submit(root=tmp_path / "file" / "root")
    assert "--root" in str(caught.value.hint)
    assert world.backend.plans == []


def test_a_local_mount_must_exist(world: World) -> None:
    spec = {
        "name": "job",
        "backend": "local",
        "root": str(world.root),
        "job": {"command": ["true"]},
        "workspace": {"path": str(world.folder)},
        "container": {
            "runtime": "docker",
            "image": "sha256:" + "0" * 64,
            "mounts": [{"source": str(world.folder / "nowhere"), "target": "/data"}],
        },
    }
    with pytest.raises(ContainerError, match=r"mounts\[0\]\.source.*nowhere"):
        world.submit(spec)
    assert not world.root.exists()


def test_a_submission_under_way_is_waited_for_and_then_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    done = world.submit()
    monkeypatch.setattr("orchestrator.operations.submission.LOCK_DEADLINE_S", 0.2)
    with (
        locked(world.paths(done.run_id).submit_lock, deadline_s=1),
        pytest.raises(RegistryError, match="another `orch` is submitting"),
    ):
        world.submit()


class SharedBackend(FakeBackend):
    """A scheduler that several processes see: one file per queued job."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def submit(self, plan: Plan, *, environ: Mapping[str, str]) -> JobHandle:
        job_id = str(os.getpid())
        (self.folder / job_id).touch()
        return JobHandle(self.name, job_id)

    def poll(self, handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        known = {path.name for path in self.folder.iterdir()}
        states = {True: SchedulerState.PENDING, False: SchedulerState.UNKNOWN}
        return {handle: JobStatus(states[handle.job_id in known]) for handle in handles}


def _submit_in_a_process(world: World, jobs: Path) -> None:
    World(world.folder, world.spec, world.root, SharedBackend(jobs), world.environ).submit()


def test_of_submissions_at_the_same_time_one_queues_the_run(world: World) -> None:
    jobs = world.folder.parent / "jobs"
    jobs.mkdir()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_submit_in_a_process, args=(world, jobs)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert len(list((world.root / "runs").iterdir())) == 1
    assert len(list(jobs.iterdir())) == 1


def test_the_root_is_remembered(world: World) -> None:
    done = world.submit()
    memory = load_memory(world.environ)
    assert memory.runs[done.run_id] == str(world.root)
    assert memory.roots[0] == str(world.root)


def test_what_is_no_directory_is_no_run(tmp_path: Path) -> None:
    assert run_names(tmp_path) == []
    for name in ("a-2", ".tmp"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "stray.txt").touch()
    assert run_names(tmp_path) == ["a-2"]
    with pytest.raises(RegistryError):
        run_names(tmp_path / "runs" / "stray.txt")


def test_a_colleagues_run_is_found_under_the_root_of_the_site(world: World, tmp_path: Path) -> None:
    done = world.submit()
    (tmp_path / "site.yaml").write_text(f"root: {world.root}\n")
    environ = {"ORCH_STATE_DIR": str(tmp_path / "nothing-remembered"), "HOME": str(tmp_path)}
    with pytest.raises(RunNotFound):
        find_run(done.run_id, environ=environ)
    assert find_run(done.run_id, environ={**environ, "ORCH_SITE_CONFIG": str(tmp_path / "site.yaml")}).run_dir.is_dir()


def test_a_memory_that_cannot_be_written_is_a_warning(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    world.environ["ORCH_STATE_DIR"] = str(tmp_path / "file")
    done = world.submit()
    assert done.action == "submitted"
    assert "--root" in done.warnings[0]


def test_overrides_need_a_file_or_mapping(world: World) -> None:
    from orchestrator.operations.submission import load

    spec, _ = load(world.spec, environ=world.environ)
    with pytest.raises(SpecError, match="overrides"):
        world.submit(spec, overrides=["name=x"])

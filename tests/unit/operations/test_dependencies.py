"""`after` at submission: which run is meant, whether it goes on, and what is given to the scheduler."""

from __future__ import annotations

import os
from typing import Any

import pytest

from orchestrator import operations
from orchestrator.backends.base import SchedulerState
from orchestrator.errors import OrchError, RefusedError, SchedulerUnavailable, SpecError
from orchestrator.files import read_json
from orchestrator.operations.dependencies import upstreams_first
from orchestrator.registry import EventLog
from orchestrator.states import JobState
from tests.unit.operations.conftest import World

OTHER = "job.args.lr=0.5"


def second(world: World, *after: str, **options: Any) -> Any:
    return world.submit(overrides=[OTHER, f"after=[{', '.join(after)}]"], **options)


def dependency(world: World) -> str | None:
    lines = world.backend.plans[-1].script.splitlines()
    return next((line.partition("=")[2] for line in lines if line.startswith("#SBATCH --dependency")), None)


def test_a_run_that_goes_on_is_waited_for_by_its_job(world: World) -> None:
    first = world.submit()
    run = second(world, first.run_id[:9]).run_id
    assert dependency(world) == "afterany:101"
    assert world.backend.plans[-1].agent["after"] == [first.run_id]
    assert f"after:\n- {first.run_id}\n" in world.paths(run).spec.read_text()
    world.backend.set("102", SchedulerState.PENDING, "Dependency")
    assert (world.status(run).state, world.status(run).message) == (JobState.QUEUED, f"waiting for {first.run_id}")
    world.backend.set("102", SchedulerState.PENDING, "Priority")
    assert world.status(run).message == "waiting: Priority"


def test_a_run_directory_is_taken_too_and_named_once(world: World) -> None:
    first = world.submit()
    second(world, str(world.paths(first.run_id).run_dir), first.run_id)
    assert world.backend.plans[-1].agent["after"] == [first.run_id]


def test_a_completed_run_is_not_waited_for(world: World) -> None:
    first = world.ended("completed", "completed")
    run = second(world, first).run_id
    assert dependency(world) is None
    assert world.backend.plans[-1].agent["after"] == [first]
    assert world.status(run).message == "waiting: Resources"


@pytest.mark.parametrize(
    ("status", "reason", "words"),
    [
        ("failed", "failure", "has failed"),
        ("needs_resume", "requeue_limit", "needs to be resumed"),
        ("cancelled", "cancelled", "was cancelled"),
    ],
)
def test_a_run_that_needs_a_person_first_is_named(world: World, status: str, reason: str, words: str) -> None:
    first = world.ended(status, reason)
    with pytest.raises(RefusedError, match=f"{first} {words}") as caught:
        second(world, first)
    assert f"orch resume {first}" in str(caught.value.hint)
    assert len(list((world.root / "runs").iterdir())) == 1


def test_a_lost_run_is_refused_and_so_is_one_that_is_being_cancelled(world: World) -> None:
    first = world.submit()
    world.paths(first.run_id).tombstone.touch()
    with pytest.raises(RefusedError, match="is being cancelled"):
        second(world, first.run_id)
    world.paths(first.run_id).tombstone.unlink()
    world.backend.set("101", SchedulerState.ENDED, "NODE_FAIL")
    with pytest.raises(RefusedError, match="is lost"):
        second(world, first.run_id)


def test_a_silent_scheduler_is_no_answer(world: World) -> None:
    first = world.submit()
    world.backend.down = True
    with pytest.raises(SchedulerUnavailable, match="is not known"):
        second(world, first.run_id)


@pytest.mark.parametrize("name", ["job-0000000000", "nothing-like-it", "/nowhere/runs/x"])
def test_an_unknown_run_is_refused_and_leaves_nothing(world: World, name: str) -> None:
    world.submit()
    with pytest.raises(SpecError, match=r"after\[0\]: "):
        second(world, name)
    assert len(list((world.root / "runs").iterdir())) == 1
    checked = operations.validate(world.spec, overrides=[OTHER, f"after=[{name}]"], environ=world.environ)
    assert any(warning.startswith("after[0]: ") for warning in checked.warnings)


def test_a_run_of_another_root_or_itself_is_refused(world: World) -> None:
    first = world.submit()
    place = str(world.paths(first.run_id).run_dir)
    with pytest.raises(SpecError, match="not a run under the root"):
        second(world, place, root=world.folder / "other")
    own = second(world).run_id
    world.cancel(own)
    with pytest.raises(SpecError, match="cannot wait for itself"):
        world.resume(own, overrides=[f"after=[{own}]"])


def test_runs_of_another_backend_are_refused(world: World) -> None:
    first = world.submit()
    world.backend.name = "local"
    with pytest.raises(SpecError, match="backend slurm, this one with local"):
        world.submit(overrides=[OTHER, "backend=local", f"after=[{first.run_id}]"])


def test_a_local_run_of_another_machine_is_refused(world: World) -> None:
    first = world.submit().run_id
    log = EventLog(world.paths(first), "login")
    log.append("submitted", job_id="101", backend="slurm", token="t", attempt_base=0, host="elsewhere")
    second(world, first)  # on Slurm it does not matter
    log.append("submitted", job_id="9.9", backend="local", token="u", attempt_base=0, host="elsewhere")
    world.backend.name = "local"
    with pytest.raises(RefusedError, match="runs on elsewhere"):
        world.submit(overrides=["job.args.lr=0.7", "backend=local", f"after=[{first}]"])
    log.append("submitted", job_id="9.9", backend="local", token="v", attempt_base=0, host=os.uname().nodename)
    with pytest.raises(RefusedError, match="is lost"):
        world.submit(overrides=["job.args.lr=0.7", "backend=local", f"after=[{first}]"])


def test_a_circle_is_refused(world: World) -> None:
    first, agent = world.running()
    run = second(world, first).run_id
    agent.end("needs_resume", "requeue_limit")
    world.backend.set("101", SchedulerState.ENDED)
    with pytest.raises(RefusedError, match=f"{first} waits for {run} waits for {first}: none of them"):
        world.resume(first, overrides=[f"after=[{run}]"])


def test_resume_looks_again_and_may_drop_it(world: World) -> None:
    first, agent = world.running()
    run = second(world, first).run_id
    world.backend.set("102", SchedulerState.ENDED, "COMPLETED")
    agent.end("failed", "failure")
    with pytest.raises(RefusedError, match="has failed"):
        world.resume(run)
    world.resume(first)
    world.resume(run)
    assert dependency(world) == "afterany:103"
    world.backend.set("104", SchedulerState.ENDED, "COMPLETED")
    world.resume(run, overrides=["after=[]"])
    assert (dependency(world), read_json(world.paths(run).agent_plan)["after"]) == (None, [])


def test_a_dry_run_needs_no_scheduler(world: World) -> None:
    first = world.submit().run_id
    plan = operations.plan_of(world.spec, overrides=[OTHER, f"after=[{first}]"], environ=world.environ)
    assert "#SBATCH --dependency=afterany:101" in plan.script
    assert world.backend.polls == 0


def test_resume_all_takes_upstreams_first(world: World) -> None:
    first = world.submit().run_id
    middle = second(world, first).run_id
    last = world.submit(overrides=["job.args.lr=0.9", f"after=[{middle}]"]).run_id
    wanted = [world.paths(run) for run in (first, middle, last)]
    for given in (wanted, wanted[::-1], [wanted[1], wanted[2], wanted[0]]):
        assert [paths.run_dir.name for paths in upstreams_first(given)] == [first, middle, last]
    assert upstreams_first([wanted[2]]) == [wanted[2]]


def test_resume_may_change_who_is_told(world: World) -> None:
    run = world.ended("needs_resume", "requeue_limit")
    world.resume(run, overrides=["notify.mail=me@example.org"])
    assert read_json(world.paths(run).agent_plan)["notify"]["mail"] == ["me@example.org"]


def test_a_secret_that_is_no_url_is_refused_before_anything_is_written(world: World) -> None:
    for value in ("s3cret-value", "https://example.org/s3cret\n"):
        world.environ["TOKEN"] = value
        with pytest.raises(OrchError, match=r"notify.webhook: the value of \$TOKEN is no") as caught:
            world.submit(overrides=["notify.webhook=$TOKEN"])
        assert "s3cret" not in f"{caught.value} {caught.value.hint}"
    assert not world.root.exists()

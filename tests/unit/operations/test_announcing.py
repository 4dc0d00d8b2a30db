"""Ends that no agent could tell: by whoever looks first, once, and never in the way of the answer."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from orchestrator import operations
from orchestrator.backends.base import JobStatus, SchedulerState
from orchestrator.files import read_json
from orchestrator.registry import EventLog
from orchestrator.states import JobState
from tests.polling import poll
from tests.unit.operations.conftest import World, owned_by_another

TELL = "import os,sys; open(sys.argv[1], 'a').write(os.environ['ORCH_STATE'] + ' ' + os.environ['ORCH_RUN_ID'] + '\\n')"


@pytest.fixture
def told(world: World, tmp_path: Path) -> Path:
    """What the command of the spec has been told."""
    file = tmp_path / "told"
    notify = {"on": ["lost", "cancelled", "failed"], "command": [sys.executable, "-c", TELL, str(file)]}
    world.spec.write_text(world.spec.read_text() + f"notify: {json.dumps(notify)}\n")
    return file


def lines(told: Path) -> list[str]:
    return told.read_text().splitlines() if told.exists() else []


def lost(world: World) -> str:
    run, _ = world.running()
    world.backend.set("101", SchedulerState.ENDED, "NODE_FAIL")
    return run


def test_a_lost_run_is_told_by_the_first_command_that_sees_it(world: World, told: Path) -> None:
    run = lost(world)
    assert world.status(run).state is JobState.LOST
    poll(lambda: lines(told), "somebody to be told")
    place = str(world.paths(run).run_dir)
    operations.ps(root=world.root, open_backend=world.backend.open)
    operations.resume_all(root=world.root, environ=world.environ, open_backend=world.backend.open)
    operations.wait(place, open_backend=world.backend.open, sleep=lambda _: None, clock=iter(range(0, 900, 3)).__next__)
    assert lines(told) == [f"lost {run}"]
    (event,) = [event for event in world.status(run).events if event["writer"] == "notify"]
    assert (event["action"], event["channel"], event["state"]) == ("notified", "command", "lost")


@pytest.mark.parametrize("look", ["ps", "resume --all"])
def test_other_commands_tell_it_too(world: World, told: Path, look: str) -> None:
    run = lost(world)
    if look == "ps":
        operations.ps(root=world.root, open_backend=world.backend.open)
    else:
        operations.resume_all(root=world.root, environ=world.environ, open_backend=world.backend.open)
    poll(lambda: lines(told) == [f"lost {run}"], "somebody to be told")


def test_a_run_cancelled_in_the_queue_is_told(world: World, told: Path) -> None:
    run = world.submit().run_id
    world.cancel(run)
    assert world.status(run).state is JobState.CANCELLED
    poll(lambda: lines(told) == [f"cancelled {run}"], "somebody to be told")


def test_what_an_agent_has_said_is_its_own_to_tell(world: World, told: Path) -> None:
    run = world.ended("failed", "failure")
    assert world.status(run).state is JobState.FAILED
    assert (lines(told), list(world.paths(run).run_dir.glob("notified*"))) == ([], [])


def test_a_silent_scheduler_makes_no_run_lost(world: World, told: Path) -> None:
    run, _ = world.running()
    world.paths(run).heartbeat.write_text("{}")
    world.backend.down = True
    world.status(run)
    assert (lines(told), list(world.paths(run).run_dir.glob("notified*"))) == ([], [])


def test_a_last_word_may_still_be_on_its_way(world: World, told: Path) -> None:
    run = lost(world)
    world.backend.states["101"] = JobStatus(SchedulerState.ENDED, "COMPLETED", end=time.time() - 1)
    assert world.status(run).state is JobState.RUNNING
    assert not list(world.paths(run).run_dir.glob("notified*"))
    world.backend.states["101"] = JobStatus(SchedulerState.ENDED, "COMPLETED", end=time.time() - 60)
    world.status(run)
    poll(lambda: lines(told) == [f"lost {run}"], "somebody to be told")


def test_a_local_run_of_another_machine_is_not_declared_lost_to_anybody(world: World, told: Path) -> None:
    run = world.submit().run_id
    log = EventLog(world.paths(run), "login")
    log.append("submitted", job_id="9.9", backend="local", token="t", attempt_base=0, host="elsewhere")
    world.status(run)
    assert (lines(told), list(world.paths(run).run_dir.glob("notified*"))) == ([], [])


def test_a_message_that_takes_long_does_not_keep_the_answer(world: World, tmp_path: Path) -> None:
    go, done = tmp_path / "go", tmp_path / "done"
    notify = {"command": ["sh", "-c", f"until [ -e {go} ]; do sleep 0.1; done; touch {done}"]}  # 30 s at most
    world.spec.write_text(world.spec.read_text() + f"notify: {json.dumps(notify)}\n")
    run = lost(world)
    begin = time.monotonic()
    world.status(run)
    assert time.monotonic() - begin < 15
    go.touch()
    poll(done.exists, "the message to be sent all the same", timeout=60)


def test_a_plan_of_an_older_version_wants_nothing(world: World, told: Path) -> None:
    run = lost(world)
    path = world.paths(run).agent_plan
    path.write_text(json.dumps({key: value for key, value in read_json(path).items() if key != "notify"}))
    assert world.status(run).state is JobState.LOST
    path.write_text("damaged")
    assert world.status(run).state is JobState.LOST
    assert lines(told) == []


@pytest.mark.parametrize("whose", ["run_dir", "agent_plan"])
def test_a_command_that_somebody_else_wrote_down_is_not_run(
    world: World, told: Path, whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root and colleagues with write access look at runs, too; what those would start is not theirs."""
    run = lost(world)
    with monkeypatch.context() as patch:
        owned_by_another(getattr(world.paths(run), whose), patch)
        assert world.status(run).state is JobState.LOST
    assert list(world.paths(run).run_dir.glob("notified*")) == []
    assert world.status(run).state is JobState.LOST
    poll(lambda: lines(told) == [f"lost {run}"], "the owner to be told")


def test_programs_of_the_current_directory_do_not_stand_in_for_the_library_s(
    world: World, told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "email.py").write_text("raise SystemExit('not me')\n")
    monkeypatch.chdir(tmp_path)
    run = lost(world)
    world.status(run)
    poll(lambda: lines(told) == [f"lost {run}"], "somebody to be told")

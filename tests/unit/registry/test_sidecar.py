"""The sidecar, and reading runs that are only half there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.errors import RegistryError, RunNotFound
from orchestrator.files import write_json
from orchestrator.paths import RootPaths, RunPaths
from orchestrator.registry import RunView, SidecarWriter, load_run, load_sidecar
from orchestrator.states import ExitReason, JobState


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    run = RootPaths(tmp_path).run("digits-0123456789")
    run.run_dir.mkdir(parents=True)
    return run


def test_the_story_of_two_attempts(paths: RunPaths) -> None:
    writer = SidecarWriter(paths, clock=iter([10.0, 20.0, 30.0]).__next__)
    writer.update(run_id="digits-0123456789", name="digits", backend="slurm", job_id="7", status=JobState.RUNNING)
    writer.begin_attempt(0, job_id="7", nodes=["n1", "n2"])
    writer.update_attempt(0, step_start=0)
    writer.end_attempt(0, outcome="saved", exit_reason=ExitReason.PREEMPTED, step_end=30, exit_code=75)
    assert writer.count_requeue(ExitReason.PREEMPTED) == 1
    later = SidecarWriter(paths, clock=lambda: 40.0)  # the agent of the next attempt
    later.begin_attempt(1, job_id="7", nodes=["n3"])
    assert later.count_requeue("preempted") == 2
    sidecar = load_sidecar(paths)
    assert sidecar is not None
    assert sidecar["requeues"] == {"preempted": 2}
    first, second = sidecar["attempts"]
    assert (first["started"], first["ended"], first["step_end"], first["nodes"]) == (10.0, 20.0, 30, ["n1", "n2"])
    assert (second["attempt"], second["ended"], second["nodes"]) == (1, None, ["n3"])
    assert load_run(paths).sidecar == sidecar


def test_beginning_an_attempt_again_makes_its_entry_anew(paths: RunPaths) -> None:
    writer = SidecarWriter(paths)
    writer.update_attempt(2, step_end=5)
    writer.update_attempt(0, step_end=3)
    writer.begin_attempt(2)
    assert [(a["attempt"], a["step_end"]) for a in writer.data["attempts"]] == [(0, 3), (2, None)]


def test_unknown_fields_are_refused_on_write_and_kept_on_read(paths: RunPaths) -> None:
    writer = SidecarWriter(paths)
    with pytest.raises(TypeError, match="stauts"):
        writer.update(stauts="running")
    with pytest.raises(TypeError, match="exitcode"):
        writer.update_attempt(0, exitcode=1)
    paths.sidecar.write_text('{"status": "running", "attempts": [{"attempt": 4, "new": 1}], "of_a_later_version": 7}')
    sidecar = load_sidecar(paths)
    assert sidecar is not None
    assert (sidecar["of_a_later_version"], sidecar["attempts"][0]["new"], sidecar["requeues"]) == (7, 1, {})
    SidecarWriter(paths).update(message="x")
    assert json.loads(paths.sidecar.read_text())["of_a_later_version"] == 7


def test_a_damaged_sidecar_is_kept_aside_and_the_run_goes_on(paths: RunPaths) -> None:
    paths.sidecar.write_text('{"status": ')
    with pytest.raises(RegistryError):
        load_sidecar(paths)
    assert load_run(paths).sidecar is None
    SidecarWriter(paths).update(status="running")
    assert (load_sidecar(paths) or {})["status"] == "running"
    assert paths.sidecar.with_name("sidecar.json.corrupt").read_text() == '{"status": '


def test_an_unwritable_run_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(RegistryError) as caught:
        SidecarWriter(RunPaths(tmp_path / "missing")).update(status="running")
    assert caught.value.hint


def test_a_run_that_was_only_just_created(paths: RunPaths) -> None:
    assert load_run(paths) == RunView(paths=paths, sidecar=None, progress=None)
    paths.tombstone.touch()
    assert load_run(paths).cancelled
    with pytest.raises(RunNotFound):
        load_run(RunPaths(paths.run_dir.with_name("none")))


def test_progress_of_an_older_attempt_is_not_shown(paths: RunPaths) -> None:
    writer = SidecarWriter(paths)
    writer.begin_attempt(0)
    write_json(paths.progress, {"step": 7, "attempt": 0})
    assert load_run(paths).progress == {"step": 7, "attempt": 0}
    writer.begin_attempt(1)
    assert load_run(paths).progress is None


@pytest.mark.parametrize("content", ["", "[]", "7", "{", "\0\0"])
def test_damaged_files_become_problems_not_errors(paths: RunPaths, content: str) -> None:
    for path in (paths.progress, paths.sidecar):
        path.write_text(content)
    view = load_run(paths)
    assert len(view.problems) == 2
    assert (view.progress, view.sidecar) == (None, None)


def test_words_of_a_later_version_do_not_break_the_list(paths: RunPaths) -> None:
    paths.sidecar.write_text('{"status": "hibernating", "exit_reason": "sunset"}')
    view = load_run(paths)
    assert view.sidecar is not None
    assert (view.sidecar["status"], view.sidecar["exit_reason"]) == (None, None)
    assert len(view.problems) == 2


def test_changes_of_one_write_become_visible_together(paths: RunPaths) -> None:
    writer = SidecarWriter(paths)
    writer.update(status="cancelled")
    with writer.one_write():
        writer.begin_attempt(1)
        assert load_sidecar(paths)["attempts"] == []  # type: ignore[index]
        writer.update(status="running")
    stored = load_sidecar(paths)
    assert stored is not None
    assert (stored["status"], len(stored["attempts"])) == ("running", 1)

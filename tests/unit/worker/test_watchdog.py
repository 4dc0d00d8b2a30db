"""Standing still: noticed by this machine's clock alone, and only of a run that reports its steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.files import write_json
from orchestrator.paths import RunPaths
from orchestrator.worker.watchdog import StallWatch


class Scene:
    def __init__(self, directory: Path, limit_s: float = 100.0) -> None:
        self.now = 0.0
        self.paths = RunPaths(directory)
        self.watch = StallWatch(self.paths, 2, limit_s, clock=lambda: self.now)

    def stalled_after(self, seconds: float) -> bool:
        """Look every second, as an agent does even more often."""
        until = self.now + seconds
        while self.now < until:
            self.now += min(1.0, until - self.now)
            if self.watch.stalled():
                return True
        return False

    def step(self, step: int, attempt: int = 2) -> None:
        write_json(self.paths.progress, {"step": step, "attempt": attempt})


def test_a_step_in_time_keeps_it_quiet(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for step in range(5):
        scene.step(step)
        assert not scene.stalled_after(90)
    assert scene.stalled_after(101)
    assert scene.watch.step == 4


def test_a_program_that_reports_nothing_is_left_alone(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.step(7, attempt=1)  # an older attempt's
    assert not scene.stalled_after(5000)


def test_a_first_step_that_never_comes_counts_from_the_heartbeat_on(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    write_json(scene.paths.heartbeat, {"attempt": 2})
    assert not scene.stalled_after(99)
    assert scene.stalled_after(12)


def test_the_disk_is_not_asked_at_every_tick(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.step(1)
    assert not scene.stalled_after(1)
    scene.paths.progress.unlink()
    scene.paths.progress.mkdir()  # reading it would raise
    assert not scene.stalled_after(1)


def test_a_suspended_job_does_not_stand_still(tmp_path: Path) -> None:
    """Slurm stops agent and ranks together (gang scheduling); a disk that is away does the same to both."""
    scene = Scene(tmp_path)
    scene.step(1)
    assert not scene.stalled_after(40)
    scene.now += 3600
    assert not scene.stalled_after(39)
    scene.step(2)
    assert not scene.stalled_after(99)
    assert scene.stalled_after(12)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null"])
def test_a_damaged_progress_file_kills_nothing(tmp_path: Path, damage: str) -> None:
    scene = Scene(tmp_path)
    scene.step(1)
    assert not scene.stalled_after(50)
    scene.paths.progress.write_text(damage)
    assert not scene.stalled_after(20)

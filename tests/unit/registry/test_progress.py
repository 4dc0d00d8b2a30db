"""Progress and heartbeat: throttled, never in the way of a step, nothing lost at a flush."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.files import read_json
from orchestrator.paths import RunPaths
from orchestrator.registry import HeartbeatThread, ProgressWriter

DEADLINE_S = 60.0


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.005)


def step(paths: RunPaths) -> int:
    return int(read_json(paths.progress)["step"]) if paths.progress.exists() else -1


def test_a_flush_writes_the_latest_whatever_the_throttle(paths: RunPaths) -> None:
    with ProgressWriter(paths, attempt=2, interval_s=3600, clock=lambda: 5.0) as writer:
        for n in range(1000):
            writer.update(n, n // 100, 5000, 12.5, (0.1, 0.2))
        writer.flush()
        assert read_json(paths.progress) == {
            "step": 999, "epoch": 9, "max_steps": 5000, "throughput": 12.5, "rank_seconds": [0.1, 0.2],
            "attempt": 2, "time": 5.0,
        }  # fmt: skip
        writer.update(1000, 10, 5000)
        writer.flush()
        assert step(paths) == 1000


def test_writes_are_throttled(paths: RunPaths) -> None:
    with ProgressWriter(paths, attempt=0, interval_s=3600) as writer:
        writer.update(1, 0, None)
        eventually(lambda: step(paths) == 1)  # the first at once
        written = paths.progress.stat().st_ino
        for n in range(2, 500):
            writer.update(n, 0, None)
        assert paths.progress.stat().st_ino == written
    assert step(paths) == 499  # the last at the end


def test_the_last_update_is_written_though_no_other_follows(paths: RunPaths) -> None:
    with ProgressWriter(paths, attempt=0, interval_s=0.05) as writer:
        for n in range(50):
            writer.update(n, 0, None)
        eventually(lambda: step(paths) == 49)  # a run that hangs shows where


def test_a_writer_that_was_never_used_writes_nothing(paths: RunPaths) -> None:
    with ProgressWriter(paths, attempt=0) as writer:
        writer.flush()
    assert not paths.progress.exists()


def test_a_full_disk_is_logged_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = RunPaths(tmp_path / "gone")
    with caplog.at_level(logging.WARNING), ProgressWriter(paths, attempt=0, interval_s=3600) as writer:
        for n in range(3):
            writer.update(n, 0, None)
            writer.flush()
        assert len(caplog.records) == 1
        paths.run_dir.mkdir()
        writer.flush()  # what could not be written is not forgotten
        assert step(paths) == 2


def test_concurrent_updates_and_flushes_lose_nothing(paths: RunPaths) -> None:
    with ProgressWriter(paths, attempt=0, interval_s=0.001) as writer:
        done = threading.Event()
        flusher = threading.Thread(target=lambda: [writer.flush() for _ in iter(done.is_set, True)])
        flusher.start()
        for n in range(300):
            writer.update(n, 0, None)
            if n % 50 == 0:
                writer.flush()
                assert step(paths) == n
        done.set()
        flusher.join()
    assert step(paths) == 299


def test_the_heart_beats_until_it_is_stopped(paths: RunPaths) -> None:
    times = iter(range(100))
    thread = HeartbeatThread(paths, attempt=1, interval_s=0.01, clock=lambda: float(next(times)))
    assert thread.daemon
    thread.start()
    eventually(lambda: paths.heartbeat.exists() and read_json(paths.heartbeat)["time"] >= 3)
    thread.stop()
    last = read_json(paths.heartbeat)
    assert last["attempt"] == 1
    assert not thread.is_alive()


def test_a_heart_that_cannot_write_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = RunPaths(tmp_path / "later")
    with caplog.at_level(logging.WARNING):
        thread = HeartbeatThread(paths, attempt=0, interval_s=0.01)
        thread.start()
        eventually(lambda: len(caplog.records) == 1)
        paths.run_dir.mkdir()
        eventually(paths.heartbeat.exists)
        thread.stop()
    assert len(caplog.records) == 1


def test_stopping_a_heart_that_never_started(paths: RunPaths) -> None:
    HeartbeatThread(paths, attempt=0).stop()

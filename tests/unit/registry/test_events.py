"""Events: one file per writer, merged when read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import RegistryError
from orchestrator.paths import RunPaths
from orchestrator.registry import EventLog, read_events


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run-1")


def ticking(*times: float) -> Callable[[], float]:
    remaining = iter(times)
    return lambda: next(remaining)


def test_events_of_all_writers_come_back_by_time(paths: RunPaths) -> None:
    login = EventLog(paths, "login", clock=ticking(1.0, 4.0))
    rank = EventLog(paths, "rank0", attempt=0, clock=ticking(2.0, 3.0))
    login.append("submitted", job_id="17", backend="slurm")
    rank.append("resumed", step=10)
    rank.append("verdict", loss=math.nan)
    login.append("cancelled", attempt=3)
    events = read_events(paths)
    assert [event["event"] for event in events] == ["submitted", "resumed", "verdict", "cancelled"]
    assert events[0] == {
        "time": 1.0, "writer": "login", "event": "submitted", "attempt": None, "job_id": "17", "backend": "slurm",
    }  # fmt: skip
    assert events[1]["attempt"] == 0
    assert events[2]["loss"] == "NaN"
    assert events[3]["attempt"] == 3


def test_a_clock_set_back_does_not_reorder_a_writers_own_story(paths: RunPaths) -> None:
    log = EventLog(paths, "agent-n0", clock=ticking(10.0, 5.0, 6.0))
    for event in ("attempt_started", "signalled", "requeued"):
        log.append(event)
    EventLog(paths, "login", clock=ticking(7.0)).append("submitted")
    assert [e["event"] for e in read_events(paths)] == ["submitted", "attempt_started", "signalled", "requeued"]


def test_torn_and_foreign_lines_are_left_out(paths: RunPaths) -> None:
    log = EventLog(paths, "rank0")
    log.append("resumed")
    with paths.events("rank0").open("ab") as handle:
        handle.write(b'{"time": 3, "event": "verd')
    assert [e["event"] for e in read_events(paths)] == ["resumed"]
    log.append("verdict")  # the next attempt's writer goes on after it
    with paths.events("other").open("wb") as handle:
        handle.write(b'[]\n7\n{"event": "no time"}\n\xff\xff\n\n\0\0\0\0')
    assert [e["event"] for e in read_events(paths)] == ["resumed", "verdict"]


def test_a_run_without_events_has_none(paths: RunPaths) -> None:
    assert read_events(paths) == []


@pytest.mark.parametrize("writer", ["", "../x", "a/b", ".hidden", "a b", "x\n"])
def test_a_writer_is_a_file_name(paths: RunPaths, writer: str) -> None:
    with pytest.raises(RegistryError):
        EventLog(paths, writer)


def test_a_directory_that_cannot_be_written_is_told(paths: RunPaths) -> None:
    paths.run_dir.mkdir(parents=True)
    paths.events_dir.write_text("not a directory")
    with pytest.raises(RegistryError, match="submitted") as caught:
        EventLog(paths, "login").append("submitted")
    assert caught.value.hint


def test_an_event_is_written_with_one_call(paths: RunPaths) -> None:
    EventLog(paths, "login").append("submitted", text="line\nbreak")
    assert paths.events("login").read_bytes().count(b"\n") == 1
    assert os.listdir(paths.events_dir) == ["login.jsonl"]  # noqa: PTH208

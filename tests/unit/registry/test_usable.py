"""Which checkpoint a run can go on from, as its events and the files beside them tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.registry.usable import Usable, usable_checkpoint

STORE = "s3://bucket/run"


def commit(step: int, place: str = STORE, **fields: Any) -> dict[str, Any]:
    return {"event": "checkpoint_committed", "step": step, "path": f"{place}/{step}.ckpt", **fields}


def resumed(step: int, **fields: Any) -> dict[str, Any]:
    return {"event": "resumed", "step": step, "checkpoint": f"{STORE}/{step}.ckpt", **fields}


def rejected(path: str) -> dict[str, Any]:
    return {"event": "checkpoint_rejected", "path": path}


def answer(*events: dict[str, Any]) -> tuple[int | None, int | None]:
    usable = usable_checkpoint(events, Path("/runs/run"), look=True)
    return (None if usable.newest is None else usable.newest["step"], usable.lost)


BEGAN = {"start_from": "/theirs.ckpt", "checkpoint": "/theirs.ckpt"}


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], (None, None)),
        ([commit(1), commit(2)], (2, None)),
        ([commit(600), commit(601), rejected(f"{STORE}/601.ckpt")], (600, None)),
        ([commit(600), commit(601), rejected(f"{STORE}/601.ckpt"), resumed(600)], (600, None)),
        ([commit(600), commit(601), resumed(600)], (600, None)),
        ([commit(600), commit(601), resumed(600), commit(602)], (602, None)),
        ([commit(601), commit(602), rejected(STORE)], (None, 602)),
        ([commit(601), rejected(STORE), commit(3)], (3, None)),
        ([commit(601), rejected(STORE), resumed(601)], (601, None)),  # a copy was restored
        ([commit(601), rejected("s3://bucket/run-2")], (601, None)),
        ([commit(5), {"event": "action", "action": "pushed", "step": 5, "path": "s3://b/5.ckpt"}], (5, None)),
        ([commit(5), commit(9), {"event": "rolled_back", "step": 5, "path": f"{STORE}/5.ckpt"}], (5, None)),
        ([{"event": "resumed", "step": 800, **BEGAN}], (None, None)),
        ([{"event": "resumed", "step": 800, **BEGAN}, commit(1)], (1, None)),
        ([commit(7), {"event": "checkpoint_committed", "step": None, "path": "?"}], (7, None)),
    ],
)
def test_a_later_event_takes_a_commit_back(
    events: list[dict[str, Any]], expected: tuple[int | None, int | None]
) -> None:
    assert answer(*events) == expected


def test_what_was_resumed_from_keeps_what_is_known_of_its_commit() -> None:
    first = commit(600, time=5.0, size_bytes=10)
    assert usable_checkpoint([first, commit(601), resumed(600, time=9.0)], Path("/r"), look=False).newest == first


def write(folder: Path, step: int, *sizes: int) -> dict[str, Any]:
    """A checkpoint of one file, or of several, and its event."""
    names = [f"{step}.ckpt", *(f"{step}.shard-{index:04d}.ckpt" for index in range(len(sizes) - 1))]
    for name, size in zip(names, sizes, strict=True):
        (folder / name).write_bytes(b"x" * size)
    (folder / f"{step}.json").write_text("{}")
    return commit(step, str(folder), size_bytes=sum(sizes))


def test_files_that_are_gone_or_too_short_are_not_safe(tmp_path: Path) -> None:
    events = [write(tmp_path, 600, 10), write(tmp_path, 601, 10, 20)]
    assert answer(*events) == (601, None)
    (tmp_path / "601.shard-0000.ckpt").write_bytes(b"short")
    assert answer(*events) == (600, 601)
    assert usable_checkpoint(events, tmp_path, look=False) == Usable(events[1])
    (tmp_path / "600.ckpt").rename(tmp_path / "600.ckpt.corrupt")
    assert answer(*events) == (None, 601)
    (tmp_path / "600.ckpt.corrupt").rename(tmp_path / "600.ckpt")
    (tmp_path / "600.json").unlink()  # the manifest is the commit
    assert answer(*events) == (None, 601)


def test_a_disk_that_is_not_mounted_here_says_nothing(tmp_path: Path) -> None:
    assert answer(commit(5, str(tmp_path / "elsewhere"), size_bytes=1)) == (5, None)
    inside = commit(5, str(tmp_path / "checkpoints"), size_bytes=1)
    assert usable_checkpoint([inside], tmp_path, look=True) == Usable(None, 5)

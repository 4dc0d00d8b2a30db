"""Which checkpoint a run can go on from, as far as its events and one look at a disk tell; no store is asked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REST = (".ckpt", ".json")  # what the files of a checkpoint end in, as long as it is not set aside


@dataclass(frozen=True)
class Usable:
    """`newest` is the event that told of the checkpoint to go on from. `lost` is the step of a newer one whose files
    are gone or damaged; where there is no `newest`, that of the last one there was."""

    newest: Mapping[str, Any] | None = None
    lost: int | None = None


def usable_checkpoint(events: Iterable[Mapping[str, Any]], run_dir: Path, *, look: bool) -> Usable:
    """The newest checkpoint that no later event takes back: a rejected one does not count, nor one beyond the step that
    a later attempt or a rollback went on from.

    With `look`, its files must be as long as they were written, where they are on a disk that is mounted here. Not
    while an attempt saves: it removes old ones that these events still name.
    """
    told: dict[str, Mapping[str, Any]] = {}
    counting: list[Mapping[str, Any]] = []
    for event in events:
        kind = event.get("action", event.get("event"))
        path = str(event.get("checkpoint" if kind == "resumed" else "path"))
        if kind == "checkpoint_rejected":
            counting = [kept for kept in counting if not _is_in(str(kept.get("path")), path)]
        if not isinstance(event.get("step"), int) or event.get("start_from") is not None:
            continue
        if kind in ("checkpoint_committed", "pushed"):
            told[path] = event
            counting.append(event)
        elif kind in ("resumed", "rolled_back"):
            base = told.get(path) or {"step": event["step"], "path": path, "time": event.get("time")}
            counting = [kept for kept in counting if kept["step"] <= base["step"] and kept is not base] + [base]
    lost = None
    for event in reversed(counting):
        if not look or _may_be_there(event, run_dir):
            return Usable(event, lost)
        lost = event["step"] if lost is None else lost
    last = next(reversed(told.values()), None)
    return Usable(None, last["step"] if lost is None and last is not None else lost)


def _is_in(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}/")


def _may_be_there(event: Mapping[str, Any], run_dir: Path) -> bool:
    """False only for files that this machine would see, and that are not there or shorter than they were written."""
    path = Path(str(event.get("path")))
    size: int | None = event.get("size_bytes")
    if not path.is_absolute():  # an object store
        return True
    manifest = path.with_suffix(".json")
    try:
        if not path.parent.is_dir():
            return run_dir not in path.parents
        if not manifest.exists() or not path.exists():
            return False
        if size is None or path.stat().st_size == size:
            return True
        stem = f"{path.stem}."
        with os.scandir(path.parent) as entries:
            files = [e for e in entries if e.name.startswith(stem) and e.name.endswith(_REST)]
            return size == sum(e.stat().st_size for e in files if e.name != manifest.name)
    except OSError:  # not for us to see
        return True

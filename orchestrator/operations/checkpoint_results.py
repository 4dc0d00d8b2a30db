"""What the verbs about checkpoints return. Apart from `results`, which every command imports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StoredCheckpoint:
    """A committed checkpoint. Its manifest's fields are None where that cannot be read; `problem` says why it is not
    valid; `live` is False for one that a later attempt or a rollback has left behind."""

    step: int
    epoch: int | None
    attempt: int | None
    path: str
    size_bytes: int | None
    sha256: str | None
    valid: bool
    committed_at: float | None
    live: bool = True
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        fields = asdict(self)
        return {name: value for name, value in fields.items() if name not in ("live", "problem")}


@dataclass(frozen=True)
class Pulled:
    """A copy of a checkpoint: `path` is the file to load."""

    run_id: str
    step: int
    path: Path
    manifest: Path
    size_bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "manifest": str(self.manifest)}


@dataclass(frozen=True)
class Pushed:
    """The emergency save that is in the object store now; `step` None = there was none to bring in."""

    run_id: str
    step: int | None
    path: str | None
    size_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Collected:
    """What `ckpt gc` has removed (would remove, with `dry_run`), and the steps that are left, newest first."""

    run_id: str
    dry_run: bool
    removed: tuple[str, ...]
    freed_bytes: int
    steps_left: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RolledBack:
    """Where the next attempt goes on, and what is given up for it."""

    run_id: str
    run_dir: Path
    step: int
    path: str
    checkpoints_given_up: int
    steps_given_up: int

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "run_dir": str(self.run_dir)}

"""What a store answers when it is asked for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.manifest import CheckpointName, Manifest

Load = Callable[[Path], Any]
"""Makes a state of the file at that path."""


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was passed over, and why (a sentence)."""

    location: str
    reason: str

    @property
    def name(self) -> str:
        """Of its file."""
        return self.location.rpartition("/")[2]


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume from: live, and its bytes match the manifest."""

    manifest: Manifest
    files: Mapping[str, Path]  # by name: where each of the manifest's files can be loaded from
    skipped: tuple[Skipped, ...]  # newer ones that could not be used, newest first
    loaded: Any = field(default=None, compare=False, repr=False)  # what `load` made of it, where one was given

    @property
    def path(self) -> Path:
        """Of the file that every checkpoint has."""
        return self.files[self.manifest.name.data]


@dataclass(frozen=True)
class Listed:
    """A checkpoint as a listing shows it. `problem`: why nobody resumes from it, as far as names, manifest and sizes
    tell; None when they tell nothing against it. `manifest` is None where it cannot be read; `live` is the lineage's
    word alone."""

    name: CheckpointName
    location: str
    manifest: Manifest | None
    live: bool
    problem: str | None

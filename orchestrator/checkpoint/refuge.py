"""Where a run with an object store saves when it is told to stop: its own directory on the shared disk (PROTOCOLS 4).

A disk takes a checkpoint in seconds and needs no network, so nothing that is slow over there can cost a grace period.
The next attempt (or `orch ckpt push`) brings what lies here to the store, under the name it was committed with: whether
it counts is decided there, by the lineage rule, as for every other checkpoint. The pointer never names what is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.manifest import POINTER, Manifest
from orchestrator.checkpoint.posix import PosixStore
from orchestrator.checkpoint.protocol import CheckpointStore, Reading


@dataclass(frozen=True)
class Brought:
    """What became of one checkpoint; `problem` says why it could not be used, None when it could."""

    manifest: Manifest
    published: bool  # it is in the store now; else it counts no longer, or is damaged
    problem: str | None = None


class Refuge:
    """The emergency saves of one run."""

    def __init__(self, directory: Path) -> None:
        self.store = PosixStore(directory)

    def open(self) -> PosixStore:
        """The store, with its directory made. Raises CheckpointError."""
        try:
            self.store.medium.prepare()
        except OSError as error:
            raise self.store.medium.failure(error, "make the directory for an emergency save") from error
        return self.store

    def bring_to(self, store: CheckpointStore, *, reading: Reading | None = None) -> Iterator[Brought]:
        """Publish the newest usable one in `store`. Older ones would change nothing. Raises CheckpointError."""
        for manifest in self.store.manifests():
            problem = self.store.verify(manifest)
            published = problem is None and store.adopt(manifest, self.store.medium, reading=reading)
            yield Brought(manifest, published, problem)
            if published:
                return

    def clear(self, newest: Manifest) -> list[str]:
        """Remove all that `newest`, which is verified in the object store, has overtaken; returns the names."""
        saves = self.store.manifests()
        overtaken = [m.name for m in saves if m.rank <= newest.rank]
        if saves and len(overtaken) == len(saves):
            self.store.medium.remove([POINTER])  # else it would name nothing
        return self.store.discard(overtaken)

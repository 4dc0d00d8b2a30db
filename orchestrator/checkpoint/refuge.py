"""Where a run with an object store saves when it is told to stop: its own directory on the shared disk (PROTOCOLS 4).

A disk takes a checkpoint in seconds and needs no network, so nothing that is slow over there can cost a grace period.
The next attempt (or `orch ckpt push`) brings what lies here to the store, under the name it was committed with: whether
it counts is decided there, by the lineage rule, as for every other checkpoint. The pointer never names what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.lineage import Fence
from orchestrator.checkpoint.manifest import MANIFEST_SUFFIX, POINTER, CheckpointName, Manifest
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
        self._damaged: set[CheckpointName] = set()

    def open(self) -> PosixStore:
        """The store, with its directory made. Raises CheckpointError."""
        try:
            self.store.medium.prepare()
        except OSError as error:
            raise self.store.medium.failure(error, "make the directory for an emergency save") from error
        return self.store

    def bring_to(
        self, store: CheckpointStore, *, reading: Callable[[int, int], None] | None = None
    ) -> Iterator[Brought]:
        """Publish the newest usable one in `store`; older ones would change nothing. Raises CheckpointError.

        `reading` is called with the number of bytes just copied, and how many there are.
        """
        for manifest in self.store.manifests():
            problem = self.store.verify(manifest)
            if problem is not None:
                self._damaged.add(manifest.name)
            published = problem is None and store.adopt(manifest, self.store.medium, reading=_of(manifest, reading))
            yield Brought(manifest, published, problem)
            if published:
                return

    def forget(self, published: Manifest) -> list[str]:
        """Remove the save that was published and verified, and those it has overtaken; returns the names."""
        return self._discard([m.name for m in self.store.manifests() if m.rank <= published.rank])

    def clear(self, fence: Fence) -> list[str]:
        """Remove what earlier attempts left, when the attempt of `fence` has a verified base; returns the names.

        What was brought in is that base or older, and everything beyond it is dead from now on. Damaged ones stay.
        """
        old = [name for name in self._saves() if name.fence_epoch < fence.epoch and name not in self._damaged]
        return self._discard(old)

    def _saves(self) -> list[CheckpointName]:
        return [name for n in self.store.medium.names() if (name := CheckpointName.parse(n, MANIFEST_SUFFIX))]

    def _discard(self, names: Sequence[CheckpointName]) -> list[str]:
        if names and len(names) == len(self._saves()):
            self.store.medium.remove([POINTER])  # else it would name nothing
        return self.store.discard(names)


def _of(manifest: Manifest, reading: Callable[[int, int], None] | None) -> Reading | None:
    return None if reading is None else lambda count: reading(count, manifest.size_bytes)

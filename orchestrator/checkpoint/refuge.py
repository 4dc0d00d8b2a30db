"""Where a run with an object store saves when it is told to stop: its own directory on the shared disk (PROTOCOLS 4).

A disk takes a checkpoint in seconds and needs no network, so nothing that is slow over there can cost a grace period.
The next attempt (or `orch ckpt push`) brings what lies here to the store, under the name it was committed with: whether
it counts is decided there, by the lineage rule, as for every other checkpoint. The pointer never names what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.found import Found
from orchestrator.checkpoint.lineage import Fence, parse_fence_name
from orchestrator.checkpoint.manifest import MANIFEST_SUFFIX, POINTER, CheckpointName, Manifest, parse_manifest
from orchestrator.checkpoint.medium import Reading
from orchestrator.checkpoint.posix import PosixStore
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.errors import CheckpointCorrupt, CheckpointError


@dataclass(frozen=True)
class Brought:
    """What became of one checkpoint; `problem` says why it could not be used, None when it could."""

    manifest: Manifest
    published: bool  # it is in the store now; else it counts no longer, or is damaged
    problem: str | None = None
    certain: bool = True  # False: `problem` is that it could not be read now, which says nothing about its content


class Refuge:
    """The emergency saves of one run."""

    def __init__(self, directory: Path) -> None:
        self.store = PosixStore(directory)
        self._damaged: set[CheckpointName] = set()
        self._seen: set[CheckpointName] = set()
        self._brought: dict[CheckpointName, Brought] = {}

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
        self._seen.update(self._saves())
        for manifest in self.store.manifests():
            problem = self.store.verify(manifest)
            if problem is not None:
                self._damaged.add(manifest.name)
            published = problem is None and store.adopt(manifest, self.store.medium, reading=_of(manifest, reading))
            brought = Brought(manifest, published, problem, certain=not self.store.is_unreadable(manifest))
            self._brought[manifest.name] = brought
            yield brought
            if published:
                return

    def require_base(self, store: CheckpointStore, found: Found | None) -> None:
        """That an epoch opened on top of `found` buries no emergency save whose content may be good.

        After `bring_to`. Raises CheckpointError; CheckpointCorrupt where all that there is, is damaged.
        """
        above = [b for b in self._brought.values() if found is None or b.manifest.rank > found.manifest.rank]
        if not above:
            return
        live = {listed.name for listed in store.inventory(waiting=self.store.medium) if listed.live}
        for brought in above:
            if brought.manifest.name not in live:
                continue  # given up before, or a newer attempt is there: to open an epoch says so
            step, location = brought.manifest.step, f"{self.store.uri}/{brought.manifest.name.data}"
            if brought.problem is None:
                raise CheckpointError(
                    f"the emergency save of step {step} should be in {store.uri} now, but could not be read there",
                    hint=f"nothing was changed, and {location} is still there; resume the run again",
                )
            if not brought.certain:
                raise CheckpointError(
                    f"the emergency save {location} cannot be read: {brought.problem}",
                    hint="nothing was changed; when the file system is well again, resume the run, or give that "
                    "save up by moving it and its manifest away",
                )
            if found is None:
                raise CheckpointCorrupt(
                    f"the only checkpoint, the emergency save {location}, is damaged: {brought.problem}",
                    hint="restore a copy of it, or move it and its manifest away to start from the beginning",
                )

    def forget(self, published: Manifest) -> list[str]:
        """Remove the save that was published and verified, and those it has overtaken; returns the names."""
        return self._discard([m.name for m in self.store.manifests() if m.rank <= published.rank])

    def keep_newest(self, fence: Fence, count: int) -> list[str]:
        """Of the saves of this attempt, made while the store could not be reached, remove all but `count`."""
        return self._discard(sorted(name for name in self._saves() if name.fence_epoch == fence.epoch)[:-count])

    def clear(self, fence: Fence) -> list[str]:
        """Remove what earlier attempts left, when the attempt of `fence` has a verified base; returns the names.

        Of saves only those that `bring_to` has looked through: they are that base, older, or dead from now on. What is
        damaged stays, and everything in a directory that is, or was, a store of its own. Raises CheckpointError.
        """
        names = self._names()
        if fence.file_name not in names and any(parse_fence_name(name) for name in names):
            return []
        seen = [name for name in self._saves() if name.fence_epoch < fence.epoch and name in self._seen]
        removed = self._discard([name for name in seen if name not in self._damaged and self._loads(name)])
        return removed + self.store.sweep(fence)

    def _loads(self, name: CheckpointName) -> bool:
        try:
            parse_manifest(
                self.store.medium.read(name.manifest), file_name=name.manifest, directory=self.store.medium.uri
            )
        except CheckpointCorrupt:
            return False
        except OSError as error:
            raise self.store.medium.failure(error, "read an emergency save") from error
        return True

    def _saves(self) -> list[CheckpointName]:
        return [name for n in self._names() if (name := CheckpointName.parse(n, MANIFEST_SUFFIX))]

    def _names(self) -> list[str]:
        try:
            return self.store.medium.names()
        except OSError as error:
            raise self.store.medium.failure(error, "list the emergency saves") from error

    def _discard(self, names: Sequence[CheckpointName]) -> list[str]:
        if names and len(names) == len(self._saves()):
            try:
                self.store.medium.remove([POINTER])  # else it would name nothing
            except OSError as error:
                raise self.store.medium.failure(error, "remove emergency saves") from error
        return self.store.discard(names)


def _of(manifest: Manifest, reading: Callable[[int, int], None] | None) -> Reading | None:
    return None if reading is None else lambda count: reading(count, manifest.size_bytes)

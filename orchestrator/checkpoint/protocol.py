"""What every checkpoint store does, wherever it keeps the bytes (PROTOCOLS 4)."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from orchestrator.checkpoint.lineage import Fence
from orchestrator.checkpoint.manifest import CheckpointName, FileEntry, Manifest
from orchestrator.checkpoint.retention import Best
from orchestrator.errors import CheckpointCorrupt, CheckpointError, Fenced

if TYPE_CHECKING:
    from orchestrator.checkpoint.medium import Medium

Reading = Callable[[int], None]
"""Called with the number of bytes just read."""

Trace = Callable[[str], None]
"""Called with the name of every operation just before it is done: chaos tests stop or kill the process there."""


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


class CheckpointStore(Protocol):
    """Commits and finds checkpoints of one run. Blocking; rank 0 of an attempt writes, the others only `write_part`."""

    uri: str

    def weaknesses(self) -> tuple[str, ...]:
        """Tries the place out: one sentence for every guarantee that it does not give.

        Raises CheckpointError when checkpoints cannot be kept there at all.
        """
        ...

    def find(self, *, keep: bool = True) -> Found | None:
        """The newest live checkpoint whose bytes match; None when nothing was ever committed.

        Without `keep` its bytes are compared and not kept: there is nothing to load where `files` says.
        Damaged ones are set aside as `*.corrupt` and reported. Raises CheckpointCorrupt when checkpoints were committed
        but none is usable (to start over silently would throw the work away for good), CheckpointError when the store
        cannot be read.
        """
        ...

    def fetch(self, manifest_name: str, *, only: Container[str] | None = None) -> Found:
        """That checkpoint (or these files of it), verified, whoever owns the run; changes nothing.

        Raises CheckpointError.
        """
        ...

    def open_epoch(
        self, *, attempt: int, base: Manifest | None, discard_newer: bool = False, trace: Trace | None = None
    ) -> Fence:
        """Claim the run for `attempt`, going on from `base`; from now on older attempts are fenced.

        Raises Fenced when a later attempt already owns the run, CheckpointError when a live checkpoint newer than
        `base` exists (unless `discard_newer`: it would become invisible), `base` does not count any more, or the claim
        cannot be written.
        """
        ...

    def commit(
        self,
        fence: Fence,
        write: Callable[[BinaryIO], object],
        *,
        step: int,
        epoch: int,
        world_size: int,
        code_hash: str | None = None,
        image: str | None = None,
        metrics: Mapping[str, float] | None = None,
        data: str | None = None,
        trace: Trace | None = None,
    ) -> Manifest:
        """Publish what `write` writes as the checkpoint of `step`; on return it is durable.

        `metrics` are what `keep_best` chooses by (NaN and infinity are left out), `data` is a fingerprint of the
        training data.

        Raises Fenced when a newer attempt owns the run, CheckpointError when it could not be written (then the previous
        checkpoint stands); what `write` raises itself passes through.
        """
        ...

    def begin(self, fence: Fence, *, step: int, trace: Trace | None = None) -> CheckpointName:
        """First step of a commit in parts (`begin`, any number of `write_part`, `publish`): the name of its files.

        Raises Fenced, CheckpointError. Nothing is written yet.
        """
        ...

    def write_part(
        self,
        name: CheckpointName,
        write: Callable[[BinaryIO], object],
        *,
        part: str | None = None,
        trace: Trace | None = None,
    ) -> FileEntry:
        """Make what `write` writes one file of the checkpoint, durable on return; no reader looks at it yet.

        Any rank of the attempt may do this, each with a `part` of its own (`shard-0001.ckpt`); None is the file that
        every checkpoint has. Raises CheckpointError when it could not be written, and leaves nothing; what `write`
        raises itself passes through.
        """
        ...

    def publish(
        self,
        fence: Fence,
        name: CheckpointName,
        files: Sequence[FileEntry],
        *,
        epoch: int,
        world_size: int,
        code_hash: str | None = None,
        image: str | None = None,
        metrics: Mapping[str, float] | None = None,
        data: str | None = None,
        trace: Trace | None = None,
    ) -> Manifest:
        """Make the checkpoint of these files visible: manifest, ownership, pointer. The first has no `part`.

        Raises as `commit` does; when the manifest could not be written, all files of that name are removed.
        """
        ...

    def abandon(self, fence: Fence, name: CheckpointName) -> None:
        """Remove what was written under a name that will not be published. Raises Fenced when a newer attempt owns the
        run: then that is why the save failed."""
        ...

    def adopt(self, manifest: Manifest, source: Medium, *, reading: Reading | None = None) -> bool:
        """Publish here, under the same name, what was committed in `source`; False when it is not live here.

        For saves that had no time for this store. Raises CheckpointCorrupt, CheckpointError.
        """
        ...

    def manifests(self) -> list[Manifest]:
        """Live checkpoints, newest first. Their bytes are not verified and nothing is changed."""
        ...

    def verify(self, manifest: Manifest, *, reading: Reading | None = None) -> str | None:
        """Read the bytes of a committed checkpoint again: what does not match its manifest, or None. Changes nothing.

        Raises CheckpointError when it was removed meanwhile, or the store cannot be read.
        """
        ...

    def inventory(self, *, waiting: Medium | None = None) -> list[Listed]:
        """Every committed checkpoint, newest first, live or not. No data is read and nothing is changed."""
        ...

    def owner(self) -> Fence | None:
        """The newest fence that counts: the attempt that owns the run. None before the first."""
        ...

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every file there is, by name."""
        ...

    def copy_to(self, directory: Path, manifest: Manifest, *, reading: Reading | None = None) -> Path:
        """Copy a checkpoint into a local directory (made if missing), compared on its way; the path to load.

        Each file appears whole and durable, the manifest last. Raises CheckpointCorrupt when the bytes do not match,
        CheckpointError when they cannot be read or written.
        """
        ...

    def collect_garbage(
        self,
        fence: Fence,
        *,
        keep_last: int,
        keep_every: int | None = None,
        keep_best: Best | None = None,
        trace: Trace | None = None,
    ) -> list[str]:
        """Remove live checkpoints that no rule keeps (`retention.kept`), and dead ones; returns the names removed.

        Reads the newest back first: CheckpointCorrupt, and nothing is removed, when it does not match. The best are
        read back once by each instance; a damaged one is set aside and the next takes its place. Leftovers of older
        attempts are swept. Raises Fenced, CheckpointError.
        """
        ...

    def garbage(self, *, keep_last: int, keep_every: int | None = None, keep_best: Best | None = None) -> list[str]:
        """Names that the next attempt's collection would remove if all bytes match. Changes nothing."""
        ...


def take_over(
    store: CheckpointStore, *, attempt: int, accept: Callable[[Found | None], None] = lambda found: None
) -> tuple[Found | None, Fence]:
    """Find the checkpoint to resume from and claim the run; the two are one step for everybody else.

    An older attempt that is still alive may commit between the two; then the newer checkpoint is taken. Raises as
    `find` and `open_epoch` do, and as `accept`, which is asked before anything is claimed.
    """
    for retries_left in range(4, -1, -1):
        found = store.find()
        accept(found)
        base = found.manifest if found else None
        try:
            return found, store.open_epoch(attempt=attempt, base=base)
        except (Fenced, CheckpointCorrupt):
            raise
        except CheckpointError:
            live = store.manifests()
            gone = base is not None and base.name not in (manifest.name for manifest in live)  # collected, or replaced
            moved = bool(live) and (base is None or live[0].rank > base.rank)
            if not (gone or moved) or not retries_left:
                raise
    raise AssertionError("unreachable")

"""Where the bytes of one run's checkpoints lie: the few operations that the commit protocol needs (PROTOCOLS 4).

Every operation is done or not done when it is cut short, durable when it returns, and raises OSError when it fails.
What is particular to a kind of storage (retries, conditions, temporary files) stays inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from orchestrator.checkpoint.manifest import FileEntry
from orchestrator.errors import CheckpointError

Reading = Callable[[int], None]
"""Called with the number of bytes just read."""

Trace = Callable[[str], None]
"""Called with the name of every operation just before it is done: chaos tests stop or kill the process there."""


class Vanished(Exception):
    """A file disappeared while it was read because its owner's garbage collection removed it: look again."""


@dataclass(frozen=True)
class Problem:
    """Why the bytes of a data file cannot be used; `certain` when they were read and are wrong.

    `lasting`: they could not be read, and will not come back by waiting (a bad sector). Whatever else keeps somebody
    from reading (rights, time, room, a network) says nothing about the bytes.
    """

    words: str
    certain: bool
    lasting: bool = False


class Medium(Protocol):
    """One flat collection of files; names are plain."""

    uri: str
    in_place: bool  # whether files can be loaded from where they lie; else they are fetched by `examine`
    lists_at_once: bool  # False where a listing comes in pages: a later page may show what is younger than a fence

    def names(self) -> list[str]:
        """All names; none when the place does not exist yet."""
        ...

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every file, by name."""
        ...

    def read(self, name: str) -> bytes:
        """Content of a small file that was listed a moment ago. Raises FileNotFoundError when it is gone."""
        ...

    def prepare(self) -> None:
        """Make the place, where it is one that must be made."""
        ...

    def create(self, name: str, data: bytes, *, note: Trace, mine: Callable[[bytes], bool]) -> bool:
        """Create a small file that nobody else can have created; False when somebody has.

        `mine` recognises our own content: when an answer gets lost, the second request finds the first one's work.
        """
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Put a small file in the place of the one of that name."""
        ...

    def write_data(self, name: str, write: Callable[[BinaryIO], object], *, note: Trace) -> FileEntry:
        """Make a file of what `write` writes, hashed on its way. What `write` raises itself passes through."""
        ...

    def put(self, name: str, source: Path, *, reading: Reading | None) -> None:
        """Make a file with the content of a local one."""
        ...

    def write_manifest(self, name: str, data: bytes, *, note: Trace) -> None:
        """Make the commit visible."""
        ...

    def examine(
        self, entry: FileEntry, *, committed: Callable[[], bool], keep: bool = False, reading: Reading | None = None
    ) -> Problem | None:
        """Compare a data file with its entry; with `keep`, it can be loaded from `local` afterwards.

        Raises Vanished when its checkpoint is not `committed` any more.
        """
        ...

    def fetch(self, entry: FileEntry, copy: BinaryIO, *, reading: Reading | None) -> str | None:
        """Copy a data file; what does not match its entry, or None. Raises OSError of either side."""
        ...

    def local(self, name: str) -> Path:
        """Where a data file that was examined and kept can be loaded from."""
        ...

    def set_aside(self, names: Iterable[str]) -> None:
        """Rename files to `*.corrupt`, in this order, without overwriting what was set aside before."""
        ...

    def remove(self, names: Iterable[str]) -> list[str]:
        """Remove files; the names that were there. Durable after `sync`."""
        ...

    def sync(self) -> None:
        """Make removals durable."""
        ...

    def pointer(self) -> str | None:
        """Name of the data file that `last.ckpt` stands for; None when there is no pointer."""
        ...

    def point_to(self, target: str, *, epoch: int, note: Trace) -> None:
        """Swap the pointer, as the attempt of this fence epoch."""
        ...

    def is_stale(self, name: str, epoch: int) -> bool:
        """Whether this is a temporary file of an attempt older than the one of that fence epoch."""
        ...

    def abort_uploads(self, epoch: int) -> list[str]:
        """Free what attempts older than the one of that fence epoch sent of files they never finished; their names."""
        ...

    def failure(self, error: OSError, doing: str) -> CheckpointError:
        """The error as one sentence with a hint."""
        ...

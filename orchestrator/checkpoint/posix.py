"""Checkpoints in a directory of a POSIX file system, local or NFS."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from orchestrator.checkpoint.lineage import parse_fence_name
from orchestrator.checkpoint.manifest import CORRUPT_SUFFIX, POINTER, CheckpointName, FileEntry
from orchestrator.checkpoint.medium import Problem, Reading, Trace, Vanished
from orchestrator.checkpoint.store import RETRY_DELAYS_S, CheckpointStore, describe
from orchestrator.checkpoint.stream import HashingWriter
from orchestrator.errors import CheckpointError
from orchestrator.files import fsync_dir, open_atomic, write_atomic

_CHUNK_BYTES = 1 << 20  # small enough for the processor's cache to hold it while it is hashed
_ALIGNMENT = 4096  # of what is written past the page cache
_WRITEBACK_BYTES = 16 << 20
_VANISHING = (errno.ENOENT, errno.ESTALE)  # what an NFS client answers for a moment after a rename on another machine
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS, errno.EXDEV)
_POINTER_TEMPORARY = re.compile(r"\.last\.ckpt\.e(?P<epoch>\d{4,9})\.[0-9a-f]{12}\.tmp")
_FENCE_TEMPORARY = re.compile(r"\.(?P<final>epoch-\d{4,9}\.json)\.[0-9a-f]{12}\.tmp")


class PosixStore(CheckpointStore):
    """The checkpoints of one run in one directory. Instances share nothing but the directory."""

    def __init__(
        self,
        directory: Path | str,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        link: Callable[[Path, Path], None] = os.link,
        node: str | None = None,
    ) -> None:
        self.directory = Path(directory).absolute()
        super().__init__(Directory(self.directory, sleep=sleep, link=link), clock=clock, sleep=sleep, node=node)


class Directory:
    """A medium: small files by link and rename, every change followed by fsync of the directory."""

    in_place = True
    lists_at_once = True

    def __init__(
        self, path: Path, *, sleep: Callable[[float], None] = time.sleep, link: Callable[[Path, Path], None] = os.link
    ) -> None:
        self.path = path
        self.uri = str(path)
        self._sleep = sleep
        self._link = link

    # --- reading

    def names(self) -> list[str]:
        """See Medium.names."""
        for delay in (*RETRY_DELAYS_S, None):
            try:
                return os.listdir(self.path)  # noqa: PTH208 - names, not paths
            except FileNotFoundError:
                return []
            except OSError as error:
                if error.errno != errno.ESTALE or delay is None:
                    raise
                self._sleep(delay)
        raise AssertionError("unreachable")

    def sizes(self) -> dict[str, int]:
        """See Medium.sizes; of a link its own."""
        found = {}
        for name in self.names():
            with suppress(FileNotFoundError):  # removed since
                found[name] = (self.path / name).lstat().st_size
        return found

    def read(self, name: str) -> bytes:
        """See Medium.read; ENOENT and ESTALE are retried."""
        for delay in (*RETRY_DELAYS_S, None):
            try:
                return (self.path / name).read_bytes()
            except OSError as error:
                if error.errno not in _VANISHING or delay is None:
                    raise
                if error.errno == errno.ENOENT and name not in self.names():
                    raise
                self._sleep(delay)
        raise AssertionError("unreachable")

    def examine(
        self, entry: FileEntry, *, committed: Callable[[], bool], keep: bool = False, reading: Reading | None = None
    ) -> Problem | None:
        """See Medium.examine; from the disk, not from memory."""
        problem: Problem | None = None
        mismatches = 0
        for delay in (*RETRY_DELAYS_S, None):
            try:
                words = _mismatch(self.path / entry.name, entry, reading)
            except OSError as error:
                if not committed():
                    raise Vanished(entry.name) from error
                # Of a name that is still listed, "no such file" says that a server is not well: that is no damage.
                gone = error.errno == errno.ENOENT and entry.name not in self.names()
                words = f"{entry.name} is missing" if gone else describe(error)
                problem = Problem(words, certain=gone, lasting=error.errno == errno.EIO)
            else:
                problem = None if words is None else Problem(words, certain=True)
                mismatches += problem is not None
            # A second look before a mismatch is believed: a network or memory error may have hit the first reading.
            if problem is None or mismatches == 2 or delay is None:
                break
            self._sleep(delay)
        return problem

    def fetch(self, entry: FileEntry, copy: BinaryIO, *, reading: Reading | None) -> str | None:
        """See Medium.fetch."""
        return _mismatch(self.path / entry.name, entry, reading, copy)

    def local(self, name: str) -> Path:
        """See Medium.local: the file itself."""
        return self.path / name

    # --- writing

    def prepare(self) -> None:
        """Create the directory and its parents, each made durable in its own parent."""
        missing = []
        directory = self.path
        while not directory.is_dir():
            missing.append(directory)
            directory = directory.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            fsync_dir(path.parent)

    def create(self, name: str, data: bytes, *, note: Trace, mine: Callable[[bytes], bool]) -> bool:
        """See Medium.create; by a hard link, where there are any."""
        target = self.path / name
        temporary = self.path / f".{name}.{os.urandom(6).hex()}.tmp"
        try:
            _write_exclusively(temporary, data)
            note("fence-link")
            try:
                self._link(temporary, target)
            except FileExistsError:
                # NFS: the link was made, the answer got lost, the client asked again and is told that the name exists.
                return mine(self.read(name))
            except FileNotFoundError:
                return False  # swept by an attempt that took this number: try the next one
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return self._create_without_link(target, data)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
        fsync_dir(self.path)
        return True

    def _create_without_link(self, target: Path, data: bytes) -> bool:
        try:
            _write_exclusively(target, data)
        except FileExistsError:
            return False
        fsync_dir(self.path)
        return True

    def replace(self, name: str, data: bytes) -> None:
        """See Medium.replace."""
        write_atomic(self.path / name, data)

    def write_data(self, name: str, write: Callable[[BinaryIO], object], *, note: Trace) -> FileEntry:
        """See Medium.write_data."""
        with open_atomic(self.path / name, trace=lambda op: note(f"data-{op}")) as raw:
            file = _DataFile(raw)
            stream = HashingWriter(file)
            note("data-write")
            try:
                stream.fill(write)
            except Exception:
                file.close()
                raise
            file.close()
        return FileEntry(name, stream.size, stream.sha256)

    def put(self, name: str, source: Path, *, reading: Reading | None) -> None:
        """See Medium.put."""
        with open_atomic(self.path / name) as copy, source.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                copy.write(chunk)
                if reading is not None:
                    reading(len(chunk))

    def write_manifest(self, name: str, data: bytes, *, note: Trace) -> None:
        """See Medium.write_manifest."""
        with open_atomic(self.path / name, trace=lambda op: note(f"manifest-{op}")) as handle:
            handle.write(data)

    def set_aside(self, names: Iterable[str]) -> None:
        """See Medium.set_aside."""
        for name in names:
            _set_aside(self.path / name)
        fsync_dir(self.path)

    def remove(self, names: Iterable[str]) -> list[str]:
        """See Medium.remove."""
        removed = []
        for name in names:
            with suppress(FileNotFoundError):
                (self.path / name).unlink()
                removed.append(name)
        return removed

    def sync(self) -> None:
        """See Medium.sync."""
        fsync_dir(self.path)

    # --- the pointer: a symbolic link, relative, so that it survives a moved directory

    def pointer(self) -> str | None:
        """See Medium.pointer."""
        try:
            return os.readlink(self.path / POINTER)  # noqa: PTH115 - a string, not a path
        except FileNotFoundError:
            return None

    def point_to(self, target: str, *, epoch: int, note: Trace) -> None:
        """See Medium.point_to."""
        temporary = self.path / f".{POINTER}.e{epoch:04d}.{os.urandom(6).hex()}.tmp"
        try:
            note("pointer-create")
            temporary.symlink_to(target)
            note("pointer-rename")
            temporary.replace(self.path / POINTER)
            note("pointer-dirsync")
            fsync_dir(self.path)
        except OSError:
            with suppress(OSError):  # swept by the next attempt
                temporary.unlink()
            raise

    # --- what is left, what went wrong

    def is_stale(self, name: str, epoch: int) -> bool:
        """See Medium.is_stale."""
        if temporary := CheckpointName.parse_temporary(name):
            return temporary.fence_epoch < epoch
        if match := _POINTER_TEMPORARY.fullmatch(name):
            return int(match["epoch"]) < epoch
        if match := _FENCE_TEMPORARY.fullmatch(name):
            return (parse_fence_name(match["final"]) or 0) <= epoch
        return False

    def abort_uploads(self, epoch: int) -> list[str]:
        """Nothing: what was not finished is a temporary file."""
        return []

    def failure(self, error: OSError, doing: str) -> CheckpointError:
        """See Medium.failure."""
        return CheckpointError(
            f"could not {doing} in {self.path}: {describe(error)}", hint=self._hint(error.errno or 0)
        )

    def _hint(self, code: int) -> str:
        if code in (errno.ENOSPC, errno.EDQUOT):
            room = "free some space"
            with suppress(OSError):  # the message matters more than the number in it
                room = f"{shutil.disk_usage(self.path).free / 2**20:.0f} MiB are free there; make room"
            kind = "your quota is used up" if code == errno.EDQUOT else room
            return f"{kind}, or lower checkpoint.keep_last; the previous checkpoint stands"
        return _HINTS.get(code, "check the file system; the previous checkpoint stands")


_HINTS = {
    errno.EIO: "the storage reports an error: check it before resuming; the previous checkpoint stands",
    errno.EFBIG: "the file size limit (ulimit -f) is too small for a checkpoint; the previous one stands",
    errno.EROFS: "the file system is mounted read-only; set checkpoint.uri to a directory that can be written",
    errno.EACCES: "set checkpoint.uri to a directory that the user of the job can write",
    errno.EPERM: "set checkpoint.uri to a directory that the user of the job can write",
    errno.ENOENT: "the directory has gone; was the run removed while it was running?",
    errno.ENOTDIR: "checkpoint.uri must name a directory",
    errno.EEXIST: "checkpoint.uri must name a directory",
}


def _mismatch(path: Path, entry: FileEntry, reading: Reading | None = None, copy: BinaryIO | None = None) -> str | None:
    """How the file differs from its entry, read from the disk rather than from memory; copied on its way. Raises
    OSError."""
    with path.open("rb", buffering=0) as handle:
        # What was just written is still in the page cache; reading that back would prove nothing about the disk.
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        size = os.fstat(handle.fileno()).st_size
        if size != entry.size:
            return f"{entry.name} has {size} bytes, its manifest says {entry.size}"
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while count := handle.readinto(buffer):
            digest.update(buffer[:count])
            if copy is not None:
                copy.write(buffer[:count])
            if reading is not None:
                reading(count)
    if digest.hexdigest() != entry.sha256:
        return f"the content of {entry.name} does not match its hash"
    return None


class _DataFile:
    """The file of a checkpoint, written without a detour through the page cache where the disk is this machine's own.

    There the cache only costs: pages to find, a copy, and whatever else was in them. What lies behind a network (and
    every file system without a block device) is written as usual, for there it is the cache that sends ahead.
    """

    def __init__(self, handle: BinaryIO) -> None:
        # Of its own: a save that is interrupted closes `handle` while the thread that writes may still be at it, and
        # the number could be another file's by then.
        self._fd = os.dup(handle.fileno())
        # For whoever knows that no thread is at it any more: a full disk gets its room back at once. Else it is closed
        # with the last thread.
        self.close = weakref.finalize(self, os.close, self._fd)
        device = os.fstat(self._fd).st_dev
        local = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").exists()
        self._direct = local and self._set_direct(True)
        self._written = self._begun = 0

    def write(self, block: memoryview) -> None:
        """See Sink.write."""
        while block:
            if self._direct and len(block) % _ALIGNMENT:  # the end of the file, or what is left of a write cut short
                self._direct = self._set_direct(False)
            try:
                count = os.write(self._fd, block)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = self._set_direct(False)  # a disk with larger blocks
                continue
            block = block[count:]
            self._written += count
        if not self._direct:
            self._begin_writeback()

    def _set_direct(self, on: bool) -> bool:
        """Whether the file is written past the page cache from now on."""
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
        except OSError:
            if not on:
                raise
            return False  # a file system that cannot
        return on

    def _begin_writeback(self) -> None:
        """One fsync at the end would wait for everything."""
        if self._written - self._begun >= _WRITEBACK_BYTES:
            # Linux starts to write a range that it is told to forget. It only forgets what is on the disk.
            os.posix_fadvise(self._fd, self._begun, self._written - self._begun, os.POSIX_FADV_DONTNEED)
            self._begun = self._written


def _set_aside(path: Path) -> None:
    """Rename to `*.corrupt` without overwriting what was set aside before. Raises OSError but for ENOENT."""
    target = path.with_name(path.name + CORRUPT_SUFFIX)
    number = 0
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}{CORRUPT_SUFFIX}.{number}")
    with suppress(FileNotFoundError):  # another reader was faster
        path.rename(target)


def _write_exclusively(path: Path, data: bytes) -> None:
    """Create `path` with durable content. Raises FileExistsError; on any other OSError nothing is left."""
    with path.open("xb") as handle:
        try:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise

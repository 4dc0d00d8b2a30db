"""Every system call of a take-over, two saves and a collection fails, one after the other and in every way it can.

Those on open files, too: a read or write in the middle of a file, and the close that brings a full disk to light.
Quotas, broken disks and stale handles cannot be had on every machine: these errors are put in the place of the call, in
this process. Full and read-only file systems, a file size limit and kills are real, in test_posix_commit.py.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import PosixStore, posix, stream, take_over
from orchestrator.errors import CheckpointError, Fenced
from tests.chaos.nursery import committer

SIZE = 10_000
STEP = int(os.environ.get("ORCH_CHAOS_FAULT_STEP", "3"))  # 1 = every call, n = every n-th
READING = [errno.EIO, errno.ESTALE, errno.ENOENT]
WRITING = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE]
FULL = [errno.ENOSPC, errno.EDQUOT, errno.EIO]
PIECE_BYTES = 4_096  # read and written at once: a page
CALLS: dict[str, list[int]] = {
    "listdir": [errno.EIO, errno.ESTALE],
    "readlink": READING,
    "open to read": READING,
    "read": [errno.EIO, errno.ESTALE],
    "readinto": [errno.EIO, errno.ESTALE],
    "create": WRITING,
    "write": [*FULL, errno.ESTALE],
    "flush": FULL,
    "close": FULL,
    "fsync": FULL,  # of files and of directories
    "open": WRITING,
    "replace": WRITING,
    "rename": WRITING,
    "link": WRITING,
    "symlink": WRITING,
    "unlink": [errno.EIO, errno.EROFS, errno.ESTALE],
}


@dataclass
class Disk:
    """The operating system's calls below one directory, of which some fail."""

    directory: Path
    fails: Callable[[str, int], int | None] = lambda call, number: None  # (call, how many before it) → errno
    calls: list[str] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)

    def meet(self, call: str, where: Path) -> None:
        """Raises what that call is to fail with."""
        number = len(self.calls)
        self.calls.append(call)
        code = self.fails(call, number)
        if code is not None:
            self.injected[f"{call} {errno.errorcode[code]}"] += 1
            raise OSError(code, os.strerror(code), str(where))

    def wrap(self, call: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def called(first: Any, *args: Any, **kwargs: Any) -> Any:
            where = Path(args[0]) if call == "symlink" else _place(first)  # of a symlink, `first` is what it says
            if where.is_relative_to(self.directory):
                self.meet(call, where)
            return original(first, *args, **kwargs)

        return called

    def wrap_write(self, original: Callable[[int, Any], int]) -> Callable[[int, Any], int]:
        def write(fd: int, data: Any) -> int:
            where = _place(fd)
            if where.is_relative_to(self.directory):
                try:
                    self.meet("write", where)
                except OSError:
                    original(fd, data[: len(data) // 2])  # for that much there was room
                    raise
            return original(fd, data)

        return write

    def wrap_open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def opened(first: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            where, writes = _place(first), not mode.startswith("r")
            if not where.is_relative_to(self.directory):
                return original(first, mode, *args, **kwargs)
            if not isinstance(first, int):  # else os.open has met it
                self.meet("create" if writes else "open to read", where)
            return OpenFile(self, where, original(first, mode, *args, **kwargs), writes)

        return opened


def _place(first: Any) -> Path:
    return Path(f"/proc/self/fd/{first}").resolve() if isinstance(first, int) else Path(first)


@dataclass
class OpenFile:
    """A file whose calls fail as the disk has it."""

    disk: Disk
    where: Path
    file: Any
    writes: bool

    def read(self, *args: Any) -> Any:
        self.disk.meet("read", self.where)
        return self.file.read(*args)

    def readinto(self, buffer: Any) -> Any:
        self.disk.meet("readinto", self.where)
        return self.file.readinto(buffer)

    def write(self, data: Any) -> Any:
        try:
            self.disk.meet("write", self.where)
        except OSError:
            self.file.write(data[: len(data) // 2])  # for that much there was room
            self.file.flush()
            raise
        return self.file.write(data)

    def flush(self) -> None:
        self.disk.meet("flush", self.where)
        self.file.flush()

    def fileno(self) -> int:
        return int(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.writes:
            self.disk.meet("close", self.where)

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


@contextmanager
def breaking(disk: Disk) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for call in CALLS:
            if hasattr(os, call) and call not in ("read", "write", "close"):
                patch.setattr(os, call, disk.wrap(call, getattr(os, call)))
        patch.setattr(os, "write", disk.wrap_write(os.write))
        patch.setattr(io, "open", disk.wrap_open(io.open))
        patch.setattr(posix, "_CHUNK_BYTES", PIECE_BYTES)
        patch.setattr(stream, "BLOCK_BYTES", PIECE_BYTES)
        yield


def failing_at(at: int, code: int, *, for_good: bool) -> Callable[[str, int], int | None]:
    return lambda call, number: code if number == at or (for_good and number > at) else None


def write_pieces(file: Any, data: bytes) -> None:
    for start in range(0, len(data), PIECE_BYTES):
        file.write(data[start : start + PIECE_BYTES])


class Run:
    """A run whose attempts meet one fault each. Its clock jumps, for years and backwards."""

    def __init__(self, directory: Path, *, first: int = 0) -> None:
        self.directory = directory
        self.chance = random.Random(1)
        self.attempts = itertools.count(first)
        self.saved = self.tried = 0  # the newest step that was acknowledged, and that was begun

    def store(self) -> PosixStore:
        return PosixStore(
            self.directory,
            clock=lambda: self.chance.uniform(-1e9, 1e11),
            sleep=lambda seconds: None,
            link=lambda a, b: os.link(a, b),
        )

    def attempt(self) -> None:
        """Take over, save twice, collect."""
        number = next(self.attempts)
        store = self.store()
        found, fence = take_over(store, attempt=number)
        first = found.manifest.step + 1 if found else 1
        for step in (first, first + 1):
            data = committer.content(step, number, SIZE)
            self.tried = max(self.tried, step)
            store.commit(fence, lambda f, d=data: write_pieces(f, d), step=step, epoch=0, world_size=1)
            self.saved = max(self.saved, step)
        store.collect_garbage(fence, keep_last=2)

    def copy(self, directory: Path) -> Run:
        """The same run somewhere else, with the stale temporary files of a dead attempt."""
        shutil.copytree(self.directory, directory, symlinks=True)
        other = Run(directory, first=2)
        other.saved, other.tried = self.saved, self.tried
        other.leave_temporaries()
        return other

    def leave_temporaries(self) -> None:
        end = f"{self.chance.randbytes(6).hex()}.tmp"
        stem = f"step-{self.tried + 1:09d}.e0001.0123abcd"
        for name in (f"{stem}.ckpt", f"{stem}.json", "epoch-0001.json"):
            (self.directory / f".{name}.{end}").write_bytes(b"half")
        (self.directory / f".last.ckpt.e0001.{end}").symlink_to("nothing")

    def check(self) -> None:
        """With the disk well again: nothing lost, nothing set aside, nothing half visible."""
        found = self.store().find()
        newest = 0
        if found is not None:
            newest, _ = committer.parse_content(found.path.read_bytes())
            assert newest == found.manifest.step
            assert found.skipped == ()
        assert self.saved <= newest <= self.tried
        self.saved = self.tried = newest
        names = [path.name for path in self.directory.iterdir()]
        assert not [name for name in names if "corrupt" in name]
        pointer = self.directory / "last.ckpt"
        if pointer.is_symlink():
            committer.parse_content(pointer.read_bytes())


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "from then on"])
def test_every_call_fails_in_every_way(tmp_path: Path, for_good: bool) -> None:
    before = Run(tmp_path / "before")
    before.attempt()
    before.attempt()
    quiet = before.copy(tmp_path / "quiet")
    disk = Disk(quiet.directory)
    with breaking(disk):
        quiet.attempt()
    assert {*CALLS} == {*disk.calls, "rename"}  # which only setting aside needs
    faults = [(at, code) for at, call in enumerate(disk.calls) for code in CALLS[call]]
    assert len(faults) > 400
    for at, code in faults[::STEP]:
        run = before.copy(tmp_path / f"{at}-{code}")
        disk = Disk(run.directory, failing_at(at, code, for_good=for_good))
        try:
            with breaking(disk):
                run.attempt()
        except CheckpointError as error:  # most faults end the attempt, some are survived
            assert not isinstance(error, Fenced)
            assert error.hint
        assert sum(disk.injected.values()) >= 1
        run.check()
        run.attempt()  # nothing keeps the next attempt from starting, and it removes what was left
        assert not [path.name for path in run.directory.iterdir() if path.name.endswith(".tmp")]
        run.check()


@pytest.mark.parametrize("code", READING)
def test_a_checkpoint_that_cannot_be_opened_for_a_while_is_not_set_aside(tmp_path: Path, code: int) -> None:
    """Its name is listed; whatever the server says of opening it, that proves no damage."""
    run = Run(tmp_path / "checkpoints")
    run.attempt()
    original = io.open

    def opening(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith(".ckpt"):
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError) as caught:
        patch.setattr(io, "open", opening)
        run.store().find()
    assert "nothing was changed" in (caught.value.hint or "")
    run.check()

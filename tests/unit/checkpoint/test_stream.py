"""The file given to serialisers: counts, hashes, and does not forget an error."""

from __future__ import annotations

import array
import errno
import hashlib
import io
import random
import threading
from contextlib import nullcontext
from typing import BinaryIO

import pytest

from orchestrator.checkpoint.stream import BLOCK_BYTES, HashingWriter, _Stage
from tests.polling import poll


def test_hashes_and_counts_what_goes_through() -> None:
    raw = io.BytesIO()
    stream = HashingWriter(raw)
    parts = [b"abc", bytearray(b"de"), memoryview(b"fgh"), array.array("d", [1.0, 2.0])]
    sizes = []
    stream.fill(lambda file: sizes.extend(file.write(part) for part in parts))
    written = raw.getvalue()
    assert sizes == [3, 2, 3, 16]  # bytes, not items
    assert stream.size == stream.tell() == len(written) == 24
    assert stream.sha256 == hashlib.sha256(written).hexdigest()


@pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, 4 << 20, (13 << 20) + 7])
def test_hashes_beside_the_writing_what_its_owner_changes_afterwards(size: int) -> None:
    content = random.Random(size).randbytes(size)
    raw, memory, begin = io.BytesIO(), bytearray(3 << 20), 0
    stream = HashingWriter(raw)

    def write(file: BinaryIO) -> None:
        nonlocal begin
        while piece := content[begin : begin + len(memory)]:
            memory[: len(piece)] = piece
            file.write(memoryview(memory)[: len(piece)])
            memory[: len(piece)] = bytes(len(piece))
            begin += len(piece)

    stream.fill(write)
    assert raw.getvalue() == content
    assert stream.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("fails", [False, True])
def test_its_threads_end_with_the_save(fails: bool) -> None:
    def write(file: BinaryIO) -> None:
        file.write(bytes(20 << 20))
        assert {"orch-hash", "orch-write"} <= threads()
        if fails:
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose") if fails else nullcontext():
        HashingWriter(io.BytesIO()).fill(write)
    assert not {"orch-hash", "orch-write"} & threads()


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_a_small_save_needs_no_threads() -> None:
    def write(file: BinaryIO) -> None:
        file.write(bytes(BLOCK_BYTES - 1))
        assert not {"orch-hash", "orch-write"} & threads()

    HashingWriter(io.BytesIO()).fill(write)


def test_holds_a_few_blocks_however_slowly_they_are_written() -> None:
    size = 12 * BLOCK_BYTES
    written = 0

    class Slow(io.BytesIO):
        def write(self, data: object, /) -> int:
            nonlocal written
            ahead = min(written + 4 * BLOCK_BYTES, size)
            poll(lambda: stream.size >= ahead, "the serialiser to fill all blocks")
            assert stream.size == ahead
            written += BLOCK_BYTES
            return super().write(data)  # type: ignore[arg-type]

    raw = Slow()
    stream = HashingWriter(raw)
    stream.fill(lambda file: [file.write(bytes(BLOCK_BYTES // 4)) for _ in range(48)])
    assert len(raw.getvalue()) == size


def test_is_a_file_that_can_only_be_written() -> None:
    stream = HashingWriter(io.BytesIO())
    assert stream.writable()
    assert not stream.readable()
    assert not stream.seekable()
    with pytest.raises(io.UnsupportedOperation):
        stream.fileno()


class Full(io.BytesIO):
    """No room from the second block on, until somebody makes some."""

    full = True

    def write(self, data: object, /) -> int:
        if self.full and self.tell():
            raise OSError(errno.ENOSPC, "full")
        return super().write(data)  # type: ignore[arg-type]


@pytest.mark.parametrize("hidden", [False, True], ids=["raised", "behind another"])
def test_the_first_error_stays(hidden: bool) -> None:
    """Also when space becomes free again (the hole stays a hole) and when the serialiser says something else."""
    raw = Full()
    stream = HashingWriter(raw)

    def write(file: BinaryIO) -> None:
        try:
            while True:
                file.write(bytes(BLOCK_BYTES))
        except OSError as error:
            raw.full = False
            with pytest.raises(OSError, match="full"):
                file.write(b"more")
            raise (RuntimeError("PytorchStreamWriter failed") if hidden else error) from None

    with pytest.raises(OSError, match="full"):
        stream.fill(write)
    assert stream.error is not None
    assert raw.getvalue() == bytes(BLOCK_BYTES)


def test_an_error_of_the_last_block_is_raised() -> None:
    raw = Full(b"something")
    raw.seek(1)
    with pytest.raises(OSError, match="full"):
        HashingWriter(raw).fill(lambda file: file.write(b"x"))


def test_ctrl_c_leaves_no_thread_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the serialiser nor while the last blocks are hashed and written."""
    interruptions = iter([True])

    def interrupted(stage: _Stage) -> None:
        stop(stage)
        if next(interruptions, False):
            raise KeyboardInterrupt

    stop = _Stage.stop
    monkeypatch.setattr(_Stage, "stop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        HashingWriter(io.BytesIO()).fill(lambda file: file.write(bytes(20 << 20)))
    poll(lambda: not {"orch-hash", "orch-write"} & threads(), "the threads to end")


def test_where_no_thread_can_start_it_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    content, raw = random.Random(1).randbytes(9 << 20), io.BytesIO()
    stream = HashingWriter(raw)
    stream.fill(lambda file: file.write(content))
    assert raw.getvalue() == content
    assert stream.sha256 == hashlib.sha256(content).hexdigest()


def test_nothing_is_written_to_a_finished_one() -> None:
    stream = HashingWriter(io.BytesIO())
    stream.fill(lambda file: file.write(b"x"))
    with pytest.raises(ValueError, match="finished"):
        stream.write(b"y")

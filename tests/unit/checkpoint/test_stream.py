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

from orchestrator.checkpoint.stream import HashingWriter


def test_hashes_and_counts_what_goes_through() -> None:
    raw = io.BytesIO()
    stream = HashingWriter(raw)
    parts = [b"abc", bytearray(b"de"), memoryview(b"fgh"), array.array("d", [1.0, 2.0])]
    sizes = [stream.write(part) for part in parts]
    stream.flush()
    written = raw.getvalue()
    assert sizes == [3, 2, 3, 16]  # bytes, not items
    assert stream.size == stream.tell() == len(written) == 24
    assert stream.sha256 == hashlib.sha256(written).hexdigest()


@pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, 4 << 20, (13 << 20) + 7])
def test_hashes_beside_the_writing_what_its_owner_changes_afterwards(size: int) -> None:
    content = random.Random(size).randbytes(size)
    stream, memory, begin = HashingWriter(io.BytesIO()), bytearray(3 << 20), 0

    def write(file: BinaryIO) -> None:
        nonlocal begin
        while piece := content[begin : begin + len(memory)]:
            memory[: len(piece)] = piece
            file.write(memoryview(memory)[: len(piece)])
            memory[: len(piece)] = bytes(len(piece))
            begin += len(piece)

    stream.fill(write)
    assert stream.sha256 == hashlib.sha256(content).hexdigest()
    stream.write(b"more")
    assert stream.sha256 == hashlib.sha256(content + b"more").hexdigest()


@pytest.mark.parametrize("fails", [False, True])
def test_the_thread_that_hashes_ends_with_the_save(fails: bool) -> None:
    def write(file: BinaryIO) -> None:
        file.write(bytes(20 << 20))
        if fails:
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose") if fails else nullcontext():
        HashingWriter(io.BytesIO()).fill(write)
    assert "orch-hash" not in [thread.name for thread in threading.enumerate()]


def test_is_a_file_that_can_only_be_written() -> None:
    stream = HashingWriter(io.BytesIO())
    assert stream.writable()
    assert not stream.readable()
    assert not stream.seekable()
    with pytest.raises(io.UnsupportedOperation):
        stream.fileno()


def test_the_first_error_stays() -> None:
    class Full(io.BytesIO):
        full = True

        def write(self, data: object, /) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "full")
            return super().write(data)  # type: ignore[arg-type]

    raw = Full()
    stream = HashingWriter(raw)
    for _ in range(2):
        with pytest.raises(OSError, match="full"):
            stream.write(b"x")
        raw.full = False  # space has become free: the hole stays a hole
    assert stream.error is not None
    assert stream.size == 0

"""Hashing and writing beside the serialiser, so that a checkpoint is neither held in memory twice nor read again."""

from __future__ import annotations

import hashlib
import io
import mmap
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES = 4 << 20
_BLOCKS = 4  # one is filled, one hashed, one written; the fourth keeps them from waiting for each other


class Sink(Protocol):
    """Where a `HashingWriter` writes to."""

    def write(self, data: memoryview, /) -> object:
        """Write all of `data`, which begins at the start of a page; only the last one is not a whole block."""
        ...


class HashingWriter(io.BufferedIOBase):
    """A write-only, unseekable file in front of `raw` that counts and hashes (SHA-256) what goes through it.

    Serialising, hashing and writing take about as long as each other, so each has a thread of its own: the serialiser
    fills blocks, which are then hashed, then written. What it gave is copied; it may change its memory at once.
    `torch.save` writes a file-like object strictly in order and only calls `write` and `flush`. There is no `fileno` on
    purpose: a caller that wrote to the descriptor would bypass the hash.
    """

    def __init__(self, raw: Sink | BinaryIO) -> None:
        self._digest = hashlib.sha256()
        self._free: queue.SimpleQueue[_Block] = queue.SimpleQueue()
        self._writing = _Stage("orch-write", raw.write, self._free.put)
        self._hashing = _Stage("orch-hash", self._digest.update, self._writing.put)
        self._block: _Block | None = None
        self._blocks = 0
        self.size = 0

    def fill(self, write: Callable[[BinaryIO], object]) -> None:
        """Let `write` write everything; hashed and handed to `raw` on return.

        Raises what `write` raises, or the OSError behind that: "disk full" says more than "PytorchStreamWriter failed".
        """
        try:
            write(self)  # type: ignore[arg-type]  # the part of BinaryIO that serialisers use
            if self._block is not None:
                self._hashing.put(self._block)
        except Exception as error:
            self._stop()
            if self.error is not None and error is not self.error:
                raise self.error from error
            raise
        finally:
            self._stop()
        if self.error is not None:
            raise self.error

    def _stop(self) -> None:
        self.close()
        try:
            self._hashing.stop()
        finally:  # Ctrl-C in the middle must leave neither thread waiting for ever
            self._writing.stop()

    @property
    def error(self) -> BaseException | None:
        """The first failure; serialisers hide it behind their own."""
        return self._hashing.error or self._writing.error

    def write(self, data: Buffer, /) -> int:
        """Take all of `data`. Raises the first failure of an earlier write, again on every call: a hole in the middle
        of the file would otherwise go unnoticed."""
        if self.closed:
            raise ValueError("write to a checkpoint that is finished")
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")  # nothing in several dimensions cannot be cast
        left = view
        while left:
            if self.error is not None:
                raise self.error
            block = self._block = self._block or self._next_block()
            left = left[block.take(left) :]
            if block.is_full:
                self._hashing.start()
                self._writing.start()
                self._hashing.put(block)
                self._block = None
        self.size += len(view)
        return len(view)

    def _next_block(self) -> _Block:
        if self._blocks < _BLOCKS and self._free.empty():
            block = _Block()  # before it is counted: one that there was no memory for would be waited for
            self._blocks += 1
            return block
        block = self._free.get()
        block.clear()
        return block

    def flush(self) -> None:
        """Nothing to do: the bytes are made durable once, when the writer is done."""

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        """Bytes taken so far."""
        return self.size

    @property
    def sha256(self) -> str:
        """Hash of everything, in hex, once `fill` has returned."""
        return self._digest.hexdigest()


class _Block:
    """Memory that begins at the start of a page, as writing past the page cache demands."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        self._filled = 0

    def take(self, data: memoryview) -> int:
        """Copy as much as there is room for; how much that was."""
        count = min(len(data), BLOCK_BYTES - self._filled)
        self._memory[self._filled : self._filled + count] = data[:count]
        self._filled += count
        return count

    @property
    def is_full(self) -> bool:
        return self._filled == BLOCK_BYTES

    @property
    def content(self) -> memoryview:
        return self._memory[: self._filled]

    def clear(self) -> None:
        self._filled = 0


class _Stage:
    """Does one thing with every block, then hands it on; in a thread once there is one, else in the caller's.

    Whatever fails is kept for the caller, and blocks go on to flow: a stage that stood still would hang the others.
    """

    def __init__(self, name: str, act: Callable[[memoryview], object], hand_on: Callable[[_Block], object]) -> None:
        self._name = name
        self._act = act
        self._hand_on = hand_on
        self._waiting: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def start(self) -> None:
        """A save of less than one block needs no threads; where there can be no more of them, it goes without."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            with suppress(RuntimeError):  # a limit of processes
                thread.start()
                self._thread = thread

    def put(self, block: _Block) -> None:
        if self._thread is None:
            self._do(block)
        else:
            self._waiting.put(block)

    def stop(self) -> None:
        """Return when all that was put is done; the thread has ended."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (block := self._waiting.get()) is not None:
            self._do(block)

    def _do(self, block: _Block) -> None:
        if self.error is None:
            try:
                self._act(block.content)
            except BaseException as error:  # noqa: BLE001 - raised by `fill`, in the thread of whoever saves
                self.error = error
        self._hand_on(block)

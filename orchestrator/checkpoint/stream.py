"""Hashing while writing, so that a checkpoint is neither held in memory twice nor read again to be hashed."""

from __future__ import annotations

import hashlib
import io
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from typing_extensions import Buffer


_CHUNK_BYTES = 4 << 20
_CHUNKS = 3  # one is filled while one is hashed; the third bridges their different paces


class ParallelHash:
    """SHA-256 beside the thread that reads or writes: hashlib lets go of the interpreter lock, so both go on at once.

    What is small is hashed in the calling thread. Call `stop` when done: the thread ends then.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._chunk, self._used = bytearray(_CHUNK_BYTES), 0
        self._chunks = 1
        self._full: queue.SimpleQueue[bytearray | None] = queue.SimpleQueue()
        self._empty: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def update(self, data: memoryview) -> None:
        """Hash `data` sometime; it is copied, for its owner may use the memory again."""
        while data:
            count = min(len(data), _CHUNK_BYTES - self._used)
            self._chunk[self._used : self._used + count] = data[:count]
            self._used += count
            data = data[count:]
            if self._used == _CHUNK_BYTES:
                self._hand_over()

    def _hand_over(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="orch-hash", daemon=True)
            self._thread.start()
        self._full.put(self._chunk)
        if self._chunks < _CHUNKS:
            self._chunks += 1
            self._empty.put(bytearray(_CHUNK_BYTES))
        self._chunk, self._used = self._empty.get(), 0

    def _run(self) -> None:
        while (chunk := self._full.get()) is not None:
            self._digest.update(chunk)
            self._empty.put(chunk)

    def stop(self) -> None:
        """Wait until all that was handed over is hashed; the thread ends."""
        if self._thread is not None:
            self._full.put(None)
            self._thread.join()
            self._thread = None

    def hexdigest(self) -> str:
        """Of everything so far."""
        self.stop()
        digest = self._digest.copy()
        digest.update(memoryview(self._chunk)[: self._used])
        return digest.hexdigest()


class HashingWriter(io.BufferedIOBase):
    """A write-only, unseekable file around `raw` that counts and hashes (SHA-256) what goes through it.

    `torch.save` writes a file-like object strictly in order and only calls `write` and `flush`. There is no `fileno` on
    purpose: a caller that wrote to the descriptor would bypass the hash.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._hash = ParallelHash()
        self.size = 0
        self.error: OSError | None = None  # the first write that failed; serialisers hide it behind their own errors

    def write(self, data: Buffer, /) -> int:
        """Write all of `data`. Raises OSError, the same one again on every call after the first failure."""
        if self.error is not None:
            raise self.error  # a hole in the middle of the file would otherwise go unnoticed
        view = memoryview(data).cast("B")
        try:
            self._raw.write(view)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(view)
        self.size += len(view)
        return len(view)

    def fill(self, write: Callable[[BinaryIO], object]) -> None:
        """Let `write` write. Raises what it raises, or the OSError behind that: "disk full" says more than
        "PytorchStreamWriter failed"."""
        try:
            write(self)  # type: ignore[arg-type]  # the part of BinaryIO that serialisers use
        except Exception as error:
            if self.error is not None and error is not self.error:
                raise self.error from error
            raise
        finally:
            self._hash.stop()
        if self.error is not None:
            raise self.error

    def flush(self) -> None:
        """Nothing to do: the bytes are made durable once, when the writer is done."""

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    @property
    def sha256(self) -> str:
        """Hash of everything written so far, in hex."""
        return self._hash.hexdigest()

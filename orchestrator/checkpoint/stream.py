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


_WORTH_A_THREAD = 256 << 10  # bytes; to hash less takes no longer than to wake another thread


class ParallelHash:
    """SHA-256 beside the thread that reads or writes: hashlib lets go of the interpreter lock, so both go on at once.

    Call `stop` when done: the thread ends then.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._begun: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waiting = False
        self._thread: threading.Thread | None = None

    def begin(self, data: memoryview) -> None:
        """Start to hash `data`, which must stay as it is until `wait` has returned."""
        self.wait()
        if len(data) < _WORTH_A_THREAD:
            self._digest.update(data)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="orch-hash", daemon=True)
            self._thread.start()
        self._waiting = True
        self._begun.put(data)

    def wait(self) -> None:
        """Until all that was begun is hashed."""
        if self._waiting:
            self._done.get()
            self._waiting = False

    def _run(self) -> None:
        while (data := self._begun.get()) is not None:
            self._digest.update(data)
            del data  # else it would be kept until the next
            self._done.put(None)

    def stop(self) -> None:
        """As `wait`; the thread ends."""
        self.wait()
        if self._thread is not None:
            self._begun.put(None)
            self._thread.join()
            self._thread = None

    def hexdigest(self) -> str:
        """Of everything so far."""
        self.wait()
        return self._digest.hexdigest()


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
        self._hash.begin(view)
        try:
            self._raw.write(view)
        except OSError as error:
            self.error = error
            raise
        finally:
            self._hash.wait()  # the memory is its owner's again
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

"""Hashing while writing, so that a checkpoint is neither held in memory twice nor read again to be hashed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from typing_extensions import Buffer


class HashingWriter(io.BufferedIOBase):
    """A write-only, unseekable file around `raw` that counts and hashes (SHA-256) what goes through it.

    `torch.save` writes a file-like object strictly in order and only calls `write` and `flush`. There is no `fileno` on
    purpose: a caller that wrote to the descriptor would bypass the hash.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._hash = hashlib.sha256()
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

"""What an object store honours, found out by trying it, and which guarantee is lost where it does not (PROTOCOLS 4)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from orchestrator.checkpoint.objects import Bucket

PREFIX = ".orch-probe-"


@dataclass(frozen=True)
class Abilities:
    """True = the store does it."""

    create_exclusively: bool  # If-None-Match
    replace_conditionally: bool  # If-Match
    read_after_write: bool
    list_after_write: bool
    remove: bool

    @property
    def usable(self) -> bool:
        """Whether checkpoints can be kept there at all."""
        return self.read_after_write and self.list_after_write and self.remove

    def lost(self, *, claims_on_disk: bool = False) -> tuple[str, ...]:
        """One sentence for every guarantee that does not hold there; none when all do."""
        told = {
            "create_exclusively": "two attempts that start at the same moment may both believe that they own the run; "
            "checkpoint.fence: disk keeps the claims on the shared disk instead",
            "replace_conditionally": "last.json may name the checkpoint of a replaced attempt until the next commit; "
            "orch never follows it",
            "read_after_write": "what was just written cannot be read: a committed checkpoint would be missed",
            "list_after_write": "what was just written is not listed: a committed checkpoint would be missed",
            "remove": "what was removed is still listed: old checkpoints would stay for ever",
        }
        return tuple(
            sentence
            for name, sentence in told.items()
            if not (getattr(self, name) or (claims_on_disk and name == "create_exclusively"))
        )


def probe(bucket: Bucket) -> Abilities:
    """Write, read, list and remove a small object there. Raises OSError when not even that is possible."""
    name = PREFIX + os.urandom(6).hex()
    try:
        bucket.replace(name, b"one")
        read = bucket.read(name) == b"one"
        listed = name in bucket.names()
        exclusive = not bucket.create(name, b"two", note=_quiet, mine=lambda content: content == b"two")
        conditional = not bucket.replace_if(name, b"three", tag='"0123456789abcdef0123456789abcdef"')
    finally:
        bucket.remove([name])
    return Abilities(
        create_exclusively=exclusive and bucket.creates_atomically,
        replace_conditionally=conditional,
        read_after_write=read,
        list_after_write=listed,
        remove=name not in bucket.names(),
    )


def _quiet(operation: str) -> None:
    """The trace of a caller that wants none."""

"""Who may still be believed: fence epochs and the lineage rule (PROTOCOLS 4). Pure: no file is touched here.

A process that was paused between asking "am I still the newest?" and renaming cannot be stopped, so nobody tries.
Instead every attempt that starts opens an *epoch* and writes down its *base*: the step it goes on from. A checkpoint
of epoch e at step s is *live* only if every later epoch's base is at step >= s; what an older attempt publishes
beyond the point where a newer one took over is ignored by all readers, with no clock and no lock.

Refinements, each for a failure that happens:

* An attempt that was slow to start (a node that hung while Python was importing) may open its epoch *after* a newer
  attempt did. Its epoch is **void**: it bounds nobody, its checkpoints are dead, and it is told that it is fenced.
  Without this the older, already replaced attempt would win. Whether an epoch is void is decided by the epochs below
  it, which exist when it is created, so the answer never changes.
* A fence that was **withdrawn** by its own attempt (it could not start after all) is void as well.
* A fence that cannot be read has lost its base. Copies are in the manifests of its epoch and in the next fences; when
  there is none, that attempt never committed anything and no later one started, and the epoch bounds nobody: to go on
  from a checkpoint of the older attempt is a consistent history, to throw all of them away is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.checkpoint.manifest import MALFORMED, integer

FENCE_VERSION = 1
FROM_SCRATCH = -1

_FENCE_NAME = re.compile(r"epoch-(?P<epoch>\d{4,9})\.json")


@dataclass(frozen=True)
class Fence:
    """One attempt's claim on a run: "from `base_step` on, only what I publish counts"."""

    epoch: int
    attempt: int
    base_step: int  # FROM_SCRATCH (-1) when it started with nothing
    base: str | None = None  # manifest file name of the checkpoint it resumed from
    node: str = ""
    pid: int = 0
    nonce: str = ""
    opened_at: float = 0.0  # unix seconds, for people
    withdrawn: bool = False
    bases: Mapping[int, int] = field(default_factory=dict)  # of the epochs just below, should their files be damaged

    @property
    def file_name(self) -> str:
        """Name of the file whose exclusive creation is the claim."""
        return fence_name(self.epoch)

    @property
    def holder(self) -> str:
        """Who opened it, for messages."""
        return f"attempt {self.attempt}" + (f" on node {self.node}" if self.node else "")

    def render(self) -> bytes:
        """The bytes of the fence file (pure)."""
        fields: dict[str, Any] = {
            "version": FENCE_VERSION,
            "epoch": self.epoch,
            "attempt": self.attempt,
            "base_step": self.base_step,
            "base": self.base,
            "node": self.node,
            "pid": self.pid,
            "nonce": self.nonce,
            "opened_at": self.opened_at,
            "withdrawn": self.withdrawn,
            "bases": {str(epoch): step for epoch, step in sorted(self.bases.items())},
        }
        return json.dumps(fields, indent=1).encode() + b"\n"


def fence_name(epoch: int) -> str:
    """File name of an epoch's fence (pure)."""
    return f"epoch-{epoch:04d}.json"


def parse_fence_name(file_name: str) -> int | None:
    """The epoch in a fence's file name; None for any other file (pure)."""
    match = _FENCE_NAME.fullmatch(file_name)
    return None if match is None else int(match["epoch"])


def parse_fence(data: bytes, *, epoch: int) -> Fence:
    """The fence in `data` (pure). Raises ValueError when it is damaged or belongs to another epoch."""
    try:
        fields = json.loads(data)
        fence = Fence(
            epoch=integer(fields["epoch"]),
            attempt=integer(fields["attempt"]),
            base_step=integer(fields["base_step"]),
            base=fields.get("base"),
            node=str(fields.get("node", "")),
            pid=integer(fields.get("pid", 0)),
            nonce=str(fields.get("nonce", "")),
            opened_at=float(fields.get("opened_at", 0.0)),
            withdrawn=bool(fields.get("withdrawn", False)),
            bases={int(key): integer(step) for key, step in fields.get("bases", {}).items()},
        )
    except MALFORMED as error:
        raise ValueError(f"{fence_name(epoch)} is damaged: {type(error).__name__}: {error}") from error
    if fence.epoch != epoch:
        raise ValueError(f"{fence_name(epoch)} says it is epoch {fence.epoch}")
    return fence


class Lineage:
    """All epochs of one run, and what follows from them. Immutable."""

    def __init__(self, fences: Iterable[Fence], *, damaged: Mapping[int, str] | None = None) -> None:
        self.fences = {fence.epoch: fence for fence in fences}
        self.damaged = dict(damaged or {})  # epoch → what is wrong with its file
        self._bases = self._known_bases()

    def _known_bases(self) -> dict[int, int]:
        """Base step of every epoch that bounds the older ones."""
        bases: dict[int, int] = {}
        newest_attempt = -1
        for epoch in sorted(self.fences):
            fence = self.fences[epoch]
            if fence.withdrawn or fence.attempt < newest_attempt:
                continue
            newest_attempt = fence.attempt
            bases[epoch] = fence.base_step
        for epoch in sorted(self.fences):
            for damaged, step in self.fences[epoch].bases.items():
                if damaged in self.damaged:
                    bases.setdefault(damaged, step)
        return bases

    def recovered(self, bases: Mapping[int, int]) -> Lineage:
        """The same lineage with the bases of damaged fences that manifests remember."""
        known = Lineage(self.fences.values(), damaged=self.damaged)
        for epoch, step in bases.items():
            if epoch in self.damaged:
                known._bases.setdefault(epoch, step)
        return known

    @property
    def bases(self) -> dict[int, int]:
        """Epoch → base step, of all epochs that count."""
        return dict(self._bases)

    @property
    def highest(self) -> int:
        """The highest epoch number taken, 0 when there is none."""
        return max((*self.fences, *self.damaged), default=0)

    @property
    def unknown(self) -> list[int]:
        """Damaged epochs whose base is remembered nowhere."""
        return sorted(epoch for epoch in self.damaged if epoch not in self._bases)

    def is_void(self, epoch: int) -> bool:
        """True for an epoch that never counted: withdrawn, or opened by an attempt that was already replaced."""
        return epoch in self.fences and epoch not in self._bases

    def bound(self, epoch: int) -> int | None:
        """The highest step that still counts of `epoch`; None = no later epoch limits it."""
        return min((step for later, step in self._bases.items() if later > epoch), default=None)

    def is_live(self, epoch: int, step: int) -> bool:
        """The lineage rule for a manifest of `epoch` at `step`."""
        return not self.is_void(epoch) and all(base >= step for later, base in self._bases.items() if later > epoch)

    def explain(self, epoch: int, step: int) -> str:
        """Why the manifest is not live, in words."""
        if self.is_void(epoch):
            return f"epoch {epoch} never counted: {self.fences[epoch].holder} had been replaced before it began"
        later = min(e for e, base in self._bases.items() if e > epoch and base < step)
        base = self._bases[later]
        start = "from scratch" if base == FROM_SCRATCH else f"at step {base}"
        return f"published by an attempt that had been replaced: epoch {later} started {start}"

    def successor(self, fence: Fence) -> Fence | None:
        """The newest fence that took the run over from `fence`, or None while it still owns the run.

        A damaged fence above counts (somebody created it); it is returned with an unknown attempt (-1).
        """
        if self.is_void(fence.epoch):
            return self.newer_attempt(fence.attempt) or self.fences[fence.epoch]
        for epoch in sorted((*self.fences, *self.damaged), reverse=True):
            if epoch <= fence.epoch:
                return None
            if not self.is_void(epoch):
                return self.fences.get(epoch) or Fence(epoch, attempt=-1, base_step=FROM_SCRATCH)
        return None

    def newer_attempt(self, attempt: int) -> Fence | None:
        """A fence that counts and belongs to a later attempt, or None."""
        newer = [fence for epoch, fence in self.fences.items() if fence.attempt > attempt and epoch in self._bases]
        return max(newer, key=lambda fence: fence.epoch, default=None)

"""Where a save goes: to the store, or beside an object store to the run directory (docs/object-stores.md)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from orchestrator.checkpoint import CheckpointStore, Fence, Manifest, Refuge, Retention
from orchestrator.errors import CheckpointCorrupt, CheckpointError, Fenced
from orchestrator.worker.stop import StopRequest

log = logging.getLogger("orchestrator.worker")

T = TypeVar("T")

OWNER_WAIT_S = 5.0


class _Leaving(Exception):
    """The process is about to end: what can be left to the next attempt is."""


class Places:
    """The store of a run and, where that is an object store, the refuge: where a save goes whose time is limited."""

    def __init__(self, store: CheckpointStore, refuge: Refuge | None, stop: StopRequest) -> None:
        self.store = store
        self.refuge = refuge
        self.leaving = False  # the last save has begun
        self._stop = stop

    @property
    def hurried(self) -> bool:
        """Whether this process is about to end: the time it has is for saving."""
        return self.leaving or self._stop.requested

    def choose(self, emergency: bool) -> CheckpointStore:
        """The place that is meant. Raises CheckpointError."""
        return self.refuge.open() if self.refuge is not None and emergency else self.store

    def in_either(self, save: Callable[[CheckpointStore], T], emergency: bool) -> tuple[T, bool]:
        """What `save` makes of the place that is meant, and where that fails of the other one; was it the refuge?

        A store that is down, or a full disk, must not end a run that could save. Raises Fenced, and the first failure.
        """
        try:
            return save(self.choose(emergency)), emergency
        except Fenced:
            raise
        except CheckpointError as error:
            if self.refuge is None or (self.leaving and not emergency):  # the last save has the disk to itself
                raise
            there = "object store" if emergency else "run directory"
            log.warning("%s; the save goes to the %s instead", error, there)
            try:
                return save(self.choose(not emergency)), not emergency
            except Fenced:
                raise
            except CheckpointError as second:
                log.warning("and that failed: %s", second)
                raise error from None

    def require_newest(self, fence: Fence) -> None:
        """After the last save, on the disk, where no claim is seen: ask the store, too. One that does not answer soon
        is not waited for: the next attempt decides what counts. Raises Fenced."""
        if self.refuge is None:
            return
        owners: list[Fence | None] = []

        def ask() -> None:
            try:
                owners.append(self.store.owner())
            except CheckpointError as error:
                log.warning("whether a newer attempt owns this run is not known: %s", error)

        asking = threading.Thread(target=ask, name="orch-owner", daemon=True)
        asking.start()
        left = self._stop.seconds_left()
        asking.join(OWNER_WAIT_S if left is None else min(OWNER_WAIT_S, max(0.0, left / 2)))
        if owners and owners[0] is not None and owners[0].epoch > fence.epoch:
            raise Fenced(
                f"attempt {fence.attempt} no longer owns this run: {owners[0].holder} took over",
                hint="this attempt stops and is not restarted; the run goes on in the other one",
            )

    def tidy_up(self, fence: Fence, retention: Retention, *, newest: Manifest | None) -> None:
        """Remove old checkpoints where the newest went, if there is time. Raises Fenced, CheckpointCorrupt."""
        if self.hurried:  # the grace period is for saving, not for tidying up
            return
        try:
            if self.refuge is not None and newest is not None and newest.directory != self.store.uri:
                self.refuge.keep_newest(fence, retention.keep_last)
                return
            self.store.collect_garbage(
                fence,
                keep_last=retention.keep_last,
                keep_every=retention.keep_every,
                keep_best=retention.keep_best,
                trace=self._unless_leaving,
            )
        except _Leaving:
            return
        except (Fenced, CheckpointCorrupt):
            raise
        except CheckpointError as error:  # the checkpoint stands, and the next save tries again
            log.warning("old checkpoints were not removed: %s", error)

    def _unless_leaving(self, _operation: str) -> None:
        # The last save does not wait for the removal of old checkpoints; left alone, that could turn last.ckpt back.
        if self.leaving:
            raise _Leaving

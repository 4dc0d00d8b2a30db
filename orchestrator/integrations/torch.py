"""For plain torch: ranks that agree, and a loop that stops, saves and resumes exactly (docs/exact-resume.md)."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # public, not listed in __all__

from orchestrator.errors import CheckpointError
from orchestrator.worker.session import CheckpointSettings, Session

_agreements = itertools.count()


@functools.cache
def _rendezvous_store() -> Any:
    """torchrun's key-value store. Kept for the life of the process: where rank 0 hosts it, it is the server."""
    store, _rank, _world_size = next(iter(rendezvous("env://")))
    return store


def agree(value: str) -> str:
    """Rank 0's `value` on every rank. Collective, blocking; needs no process group, so it works before a trainer."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return value
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"orch/agree/{restart}", _rendezvous_store())
    key = str(next(_agreements))
    if os.environ["RANK"] == "0":
        store.set(key, value)
    return str(store.get(key).decode())


def resume_path(session: Session) -> str | None:
    """The checkpoint every rank starts from; None = from the beginning. Collective. Rank 0 opens the fence epoch."""
    found = session.resume()
    agreed = agree("" if found is None else str(found.path))
    return agreed or None


class Agreement:
    """The maximum over all ranks of a few small numbers, on an own gloo group; overlaps with the step in between.

    Collective: every rank makes the same calls in the same order. One rank alone pays nothing.
    """

    def __init__(self, size: int, world_size: int) -> None:
        self._group: Any = dist.new_group(backend="gloo") if world_size > 1 else None
        self._values = torch.zeros(size, dtype=torch.int64)
        self._work: Any = None
        self._alone: list[int] = [0] * size

    def begin(self, values: Sequence[int]) -> None:
        """Start to agree; returns at once."""
        if self._group is None:
            self._alone = list(values)
            return
        self._values = torch.tensor(values, dtype=torch.int64)
        self._work = dist.all_reduce(self._values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def finish(self) -> list[int]:
        """The maxima; waits for the slowest rank."""
        if self._group is None:
            return self._alone
        if self._work is None:
            raise CheckpointError("Agreement.finish without begin", hint="every step begins and finishes one agreement")
        self._work.wait()
        self._work = None
        return [int(value) for value in self._values]

    def minimum(self, value: int) -> int:
        """The smallest `value` of all ranks. Collective, blocking."""
        self.begin([-value] + [0] * (len(self._alone) - 1))
        return -self.finish()[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, by rank. Collective, blocking."""
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self._group is not None:
            dist.barrier(group=self._group)


class SaveSchedule:
    """When the next periodic save is due. Steps and epochs every rank counts alike; minutes only rank 0 measures."""

    def __init__(self, settings: CheckpointSettings) -> None:
        self._settings = settings
        self._saved_at = time.monotonic()
        self._saved_step: int | None = None

    def saved(self, step: int) -> None:
        """Restart the clock: a checkpoint of `step` exists."""
        self._saved_at = time.monotonic()
        self._saved_step = step

    def is_saved(self, step: int) -> bool:
        """True when `step` needs no further save."""
        return self._saved_step == step

    def due_by_time(self) -> bool:
        """Rank 0's opinion; the others must be told."""
        every = self._settings.every_minutes
        return every is not None and time.monotonic() - self._saved_at >= 60 * every

    def due_at_step(self, step: int) -> bool:
        """Depends on the step number alone, so that an interrupted run saves at the same steps."""
        every = self._settings.every_steps
        return every is not None and step % every == 0

    def due_after_epoch(self, epochs_done: int) -> bool:
        """Depends on the number of finished epochs alone."""
        every = self._settings.every_epochs
        return every is not None and epochs_done % every == 0


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class ResumableLoop:
    """Saves and restores what has a `state_dict` at step boundaries of a hand-written training loop.

    `step`, `epoch` and `batch` say where to go on. Call `step_done()` after each optimizer step and `epoch_done()`
    after each epoch: they save when due, and do not return when the run was asked to stop. Every call is collective.
    """

    def __init__(self, session: Session, parts: Mapping[str, _Stateful], *, max_steps: int | None = None) -> None:
        self.session = session
        self.step, self.epoch, self.batch = 0, 0, 0
        self._parts = parts
        self._max_steps = max_steps
        self._schedule = SaveSchedule(session.settings)
        self._agreement = Agreement(2, session.world_size)
        session.install_signal_handlers()
        path = resume_path(session)
        if path is not None:
            self._restore(Path(path))

    def _restore(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self._schedule.saved(self.step)

    def step_done(self) -> None:
        """One optimizer step is complete. Saves when due; after a signal to any rank, saves and leaves."""
        self.step += 1
        self.batch += 1
        self.session.report(self.step, self.epoch, self._max_steps)
        by_time = self.session.is_chief and self._schedule.due_by_time()
        self._agreement.begin([int(self.session.stop_requested), int(by_time)])
        stop, save = self._agreement.finish()
        if stop or save or self._schedule.due_at_step(self.step):
            self.save()
        if stop:
            self.session.stopped(step=self.step, epoch=self.epoch, barrier=self._agreement.barrier)

    def epoch_done(self) -> None:
        """All batches of the epoch are done: the next step belongs to a new one."""
        self.epoch += 1
        self.batch = 0
        if self._schedule.due_after_epoch(self.epoch):
            self.save()

    def save(self) -> None:
        """Make this point a checkpoint, unless it is one already."""
        state = {
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
        }
        if self.session.is_chief:
            self.session.commit(lambda file: torch.save(state, file), step=self.step, epoch=self.epoch)
        self._schedule.saved(self.step)
        self._agreement.barrier()

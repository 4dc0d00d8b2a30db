"""For plain torch: ranks that agree, and a loop that stops, saves and resumes exactly (docs/exact-resume.md)."""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # public, not listed in __all__

from orchestrator.checkpoint import Found
from orchestrator.errors import CheckpointError
from orchestrator.integrations.saving import StateSaver
from orchestrator.worker.session import CheckpointSettings, Session

FETCH_LIMIT_S = 3600.0  # a large checkpoint over a slow network; the scheduler's limits end what takes longer

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
    store.wait([key], timedelta(seconds=FETCH_LIMIT_S))  # rank 0 may be reading a large checkpoint
    return str(store.get(key).decode())


def resume_path(session: Session) -> str | None:
    """The checkpoint this rank starts from, the same on all; None = from the beginning. Collective.

    Rank 0 opens the fence epoch. From an object store the first rank of every node fetches a copy for its node.
    """
    return _resume(session)[1]


def resume_state(session: Session) -> Any:
    """What `torch.load` makes of `resume_path`, on the CPU. Rank 0 loads while it compares: a damaged file is no
    danger, for nothing but tensors and plain types are loaded. Collective."""

    def load(path: Path) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True)

    found, path = _resume(session, load)
    if path is None:
        return None
    return load(Path(path)) if found is None else found.loaded


def _resume(session: Session, load: Callable[[Path], Any] | None = None) -> tuple[Found | None, str | None]:
    """What rank 0 found (None on the others), and where this rank can load it."""
    found = session.resume(load)
    if found is not None and found.manifest.sharded:
        raise CheckpointError(
            f"the checkpoint of step {found.manifest.step} lies in shards; this program loads one file",
            hint="resume it with orchestrator.integrations.sharded.ShardedLoop",
        )
    mine = None if found is None else {"manifest": found.manifest.name.manifest, "path": str(found.path)}
    chosen = json.loads(agree(json.dumps(mine)))
    if chosen is None:
        return None, None
    if session.shares_files:
        return found, str(chosen["path"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    first = session.rank - local_rank  # torchrun numbers the ranks of a node in a row
    if first == 0:
        return found, str(chosen["path"])
    return None, _tell_node(lambda: str(session.fetch(chosen["manifest"])), first_rank=first, is_first=local_rank == 0)


def _tell_node(fetch: Callable[[], str], *, first_rank: int, is_first: bool) -> str:
    """What `fetch` returns on a node's first rank, on all of its ranks; a failure there is a failure on all."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"orch/fetched/{restart}", _rendezvous_store())
    key = str(first_rank)
    if is_first:
        try:
            path = fetch()
        except CheckpointError as error:
            store.set(key, json.dumps({"error": str(error)}))
            raise
        store.set(key, json.dumps({"path": path}))
        return path
    store.wait([key], timedelta(seconds=FETCH_LIMIT_S))
    told = json.loads(store.get(key))
    if "error" in told:
        raise CheckpointError(f"the first rank of this node could not fetch the checkpoint: {told['error']}")
    return str(told["path"])


class Agreement:
    """The maximum over all ranks of a few small numbers, on an own gloo group; overlaps with the step in between.

    Each rank's own step time travels along. Collective: every rank makes the same calls in the same order. One rank
    alone pays nothing.
    """

    def __init__(self, size: int, world_size: int, rank: int = 0) -> None:
        self._group: Any = dist.new_group(backend="gloo") if world_size > 1 else None
        self._size = size
        self._world_size = world_size
        self._rank = rank
        self._values: Any = [0] * size
        self._work: Any = None
        self.rank_seconds: list[float] = []  # of the last agreement, by rank

    def begin(self, values: Sequence[int], own_seconds: float = 0.0) -> None:
        """Start to agree; returns at once."""
        if self._group is None:
            self._values = [*values, round(own_seconds * 1e6)]
            return
        self._values = torch.zeros(self._size + self._world_size, dtype=torch.int64)
        self._values[: self._size] = torch.tensor(values, dtype=torch.int64)
        self._values[self._size + self._rank] = round(own_seconds * 1e6)
        self._work = dist.all_reduce(self._values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def finish(self) -> list[int]:
        """The maxima; waits for the slowest rank."""
        if self._group is not None:
            if self._work is None:
                raise CheckpointError("Agreement.finish without begin", hint="every step begins and finishes one")
            self._work.wait()
            self._work = None
        numbers = [int(value) for value in self._values]
        self.rank_seconds = [value / 1e6 for value in numbers[self._size :]]
        return numbers[: self._size]

    def minimum(self, value: int) -> int:
        """The smallest `value` of all ranks. Collective, blocking."""
        self.begin([-value] + [0] * (self._size - 1))
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


class RankTimes:
    """The ranks' own step times, averaged over windows of about a second: who makes the others wait?"""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._sums: list[float] = []
        self._count = 0
        self._means: list[float] | None = None

    def add(self, seconds: Sequence[float]) -> list[float] | None:
        """Add one step's times by rank; returns the means of the last full window, None during the first."""
        self._sums = [a + b for a, b in zip(self._sums or [0.0] * len(seconds), seconds, strict=True)]
        self._count += 1
        now = time.monotonic()
        if now - self._since >= 1.0:
            self._means = [round(total / self._count, 6) for total in self._sums]
            self._since, self._sums, self._count = now, [], 0
        return self._means


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


class Stateful(Protocol):
    """What a loop saves and restores."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class ResumableLoop:
    """Saves and restores what has a `state_dict` at step boundaries of a hand-written training loop.

    `step`, `epoch` and `batch` say where to go on. Call `step_done()` after each optimizer step and `epoch_done()`
    after each epoch: they save when due, and do not return when the run was asked to stop. Every call is collective.
    """

    def __init__(self, session: Session, parts: Mapping[str, Stateful], *, max_steps: int | None = None) -> None:
        self.session = session
        self.step, self.epoch, self.batch = 0, 0, 0
        self._parts = parts
        self._metrics: dict[str, float] = {}
        self._max_steps = max_steps
        self._schedule = SaveSchedule(session.settings)
        self._saver = StateSaver(session)
        self._agreement = Agreement(2, session.world_size, session.rank)
        self._rank_times = RankTimes()
        self._step_began = time.monotonic()
        session.install_signal_handlers()
        self._resume()

    def _resume(self) -> None:
        state = resume_state(self.session)
        if state is not None:
            self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self._schedule.saved(self.step)

    def step_done(self, metrics: Mapping[str, float] | None = None) -> None:
        """One optimizer step is complete. Saves when due; after a signal to any rank, saves and leaves.

        `metrics`: rank 0's new numbers; each stays until there is a newer one (`checkpoint.keep_best`).
        """
        self._metrics.update(metrics or {})
        self.step += 1
        self.batch += 1
        by_time = self.session.is_chief and self._schedule.due_by_time()
        own_seconds = time.monotonic() - self._step_began
        self._agreement.begin([int(self.session.stop_requested), int(by_time)], own_seconds)
        stop, save = self._agreement.finish()
        rank_seconds = self._rank_times.add(self._agreement.rank_seconds)
        self.session.report(self.step, self.epoch, self._max_steps, rank_seconds=rank_seconds, stopping=bool(stop))
        if stop or save or self._schedule.due_at_step(self.step):
            self._save(leaving=bool(stop))
        if stop:
            self.session.stopped(step=self.step, epoch=self.epoch, barrier=self._agreement.barrier)
        self._step_began = time.monotonic()

    def epoch_done(self, metrics: Mapping[str, float] | None = None) -> None:
        """All batches of the epoch are done: the next step belongs to a new one. `metrics` as in `step_done`."""
        self._metrics.update(metrics or {})
        self.epoch += 1
        self.batch = 0
        if self._schedule.due_after_epoch(self.epoch):
            self.save()

    def save(self) -> None:
        """Make this point a checkpoint."""
        self._save(leaving=False)

    def _save(self, *, leaving: bool) -> None:
        state = self._state()
        if self.session.is_chief:
            self._saver.save(state, step=self.step, epoch=self.epoch, metrics=self._metrics, leaving=leaving)
        self._schedule.saved(self.step)
        self._agreement.barrier()

    def _state(self) -> dict[str, Any]:
        return {
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
        }

"""Randomness that is derived, not stored: every draw is seeded by what it is for, so a resume has nothing to restore.

A key hashes (seed, purpose, epoch, …) to 32 bits: the CPU generator uses only the low 32 bits of a seed, so packing
values side by side would make different keys draw the same numbers.
"""

from __future__ import annotations

import hashlib
import multiprocessing.context
import random
import signal
import sys
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

Item = TypeVar("Item", covariant=True)


def derive_key(*parts: int | str) -> int:
    """A well mixed 32-bit seed for the tuple `parts`. Pure; the same on every machine and Python."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def seed_torch(*parts: int | str) -> None:
    """Seed torch's CPU generator, and the current CUDA device's if CUDA is in use, from the tuple `parts`."""
    key = derive_key(*parts)
    torch.default_generator.manual_seed(key)  # torch.manual_seed is 100 times slower where CUDA is built in but unused
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(key)


def seed_everything(*parts: int | str) -> None:
    """Seed torch, Python's `random` and, if it is loaded, NumPy from the tuple `parts`."""
    seed_torch(*parts)
    key = derive_key(*parts)
    random.seed(key)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(key)


def seed_step(seed: int, *, epoch: int, batch: int, rank: int, purpose: str = "step") -> None:
    """Seed everything one training step draws. `batch` and not the step number: that is constant while accumulating."""
    seed_everything(seed, purpose, epoch, batch, rank)


class _MapDataset(Protocol[Item]):
    def __getitem__(self, index: int) -> Item: ...
    def __len__(self) -> int: ...


class SeededDataset(torch.utils.data.Dataset[Item], Generic[Item]):
    """Wraps a map-style dataset: each sample's random transforms are seeded by (seed, epoch, index).

    Takes the `(index, epoch)` keys of `ExactBatchSampler`; prefetching and persistent workers cannot hold a stale
    epoch, because it travels with the index. A plain index counts as epoch 0.
    """

    def __init__(self, dataset: _MapDataset[Item], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        seed_everything(self.seed, "sample", epoch, index)
        return self.dataset[index]


_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def ignore_stop_signals(_worker_id: int, signals: Sequence[signal.Signals] = ()) -> None:
    """`worker_init_fn` of a DataLoader: a signal sent to the whole process group must not kill the workers, because the
    main process would then fail instead of saving."""
    for number in signals or _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)  # what came while it was born is dropped


class _DeafWorker(multiprocessing.context.ForkProcess):
    """Is born with the stop signals blocked: torch gives a worker back its default SIGTERM before `worker_init_fn`."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _DeafWorkers(multiprocessing.context.ForkContext):
    Process = _DeafWorker


def loader_generator() -> torch.Generator:
    """A DataLoader's own generator: without one it draws its base seed from the global generator at every `iter()`."""
    return torch.Generator().manual_seed(0)


def exact_loader_options(num_workers: int) -> dict[str, Any]:
    """Keyword arguments a DataLoader needs so that stops and restarts leave no trace."""
    return {
        "num_workers": num_workers,
        "worker_init_fn": ignore_stop_signals,
        "multiprocessing_context": _DeafWorkers() if num_workers else None,
        "generator": loader_generator(),
    }

from __future__ import annotations

import os
import random
import signal

import pytest
import torch

from orchestrator.integrations.randomness import (
    SeededDataset,
    derive_key,
    exact_loader_options,
    ignore_stop_signals,
    seed_step,
)
from orchestrator.integrations.sampler import ExactBatchSampler


def test_keys_are_the_same_everywhere_and_use_every_part() -> None:
    assert derive_key(0, "order", 3) == 2905030650
    assert derive_key(1, "x") != derive_key(1 + 2**32, "x")  # the CPU generator alone would not tell these apart
    assert derive_key(1, 23) != derive_key(12, 3)
    assert len({derive_key(0, "step", epoch, batch) for epoch in range(20) for batch in range(50)}) == 1000


def test_a_seeded_step_draws_the_same_again() -> None:
    draws = []
    for _ in range(2):
        torch.rand(3)
        seed_step(0, epoch=1, batch=2, rank=0)
        draws.append((torch.rand(2).tolist(), random.random()))
    assert draws[0] == draws[1]
    seed_step(0, epoch=1, batch=2, rank=1)
    assert torch.rand(2).tolist() != draws[0][0]


class _Random:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        return float(torch.rand(1)) + index


def test_a_sample_depends_on_seed_epoch_and_index_only() -> None:
    data = SeededDataset(_Random(), seed=1)
    first = data[2, 0]
    assert data[3, 0] - 3 != first - 2
    assert data[2, 0] == first
    assert data[2, 1] != first
    assert data[2] == first


def test_workers_ignore_what_stops_the_main_process() -> None:
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        ignore_stop_signals(0)
        assert {signal.getsignal(number) for number in numbers} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_order_is_a_permutation_that_changes_with_epoch_and_seed() -> None:
    sampler = ExactBatchSampler(12, 4, seed=0, rank=0, world_size=1)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append([key for batch in sampler for key in batch])
    assert sorted(index for index, _ in epochs[0]) == list(range(12))
    assert {epoch for _, epoch in epochs[1]} == {1}
    assert epochs[0] == epochs[2]
    assert [i for i, _ in epochs[0]] != [i for i, _ in epochs[1]]
    other = ExactBatchSampler(12, 4, seed=1, rank=0, world_size=1)
    assert [key for batch in other for key in batch] != epochs[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_global_batch_is_the_same_at_any_world_size(world_size: int) -> None:
    whole = list(ExactBatchSampler(50, 8, seed=3, rank=0, world_size=1))
    ranks = [list(ExactBatchSampler(50, 8, seed=3, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [[key for part in parts for key in part] for parts in zip(*ranks, strict=True)] == whole
    assert len(whole) == 6


def test_seeking_skips_batches_without_changing_the_length() -> None:
    sampler = ExactBatchSampler(40, 4, seed=0, rank=0, world_size=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.seek(2, 7)
    sampler.set_epoch(2)  # what Lightning calls at the start of the resumed epoch
    assert list(sampler) == whole[7:]
    assert len(sampler) == 10
    sampler.set_epoch(3)
    assert len(list(sampler)) == 10
    sampler.seek(2, 10)
    assert list(sampler) == []


@pytest.mark.parametrize(("size", "batch", "message"), [(10, 3, "does not divide"), (3, 4, "do not fill")])
def test_batches_that_cannot_be_formed_are_refused(size: int, batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExactBatchSampler(size, batch, seed=0, rank=0, world_size=2)


def test_rank_and_world_size_come_from_torchrun() -> None:
    sampler = ExactBatchSampler(8, 4, seed=0, environ={"RANK": "1", "WORLD_SIZE": "2"})
    assert (sampler.rank, sampler.world_size, len(next(iter(sampler)))) == (1, 2, 2)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_data_worker_survives_a_signal_at_its_birth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's SIGTERM hits every process of a step, and workers are born at the start of every epoch."""
    handling = torch.utils.data._utils.signal_handling
    set_handlers = handling._set_worker_signal_handlers

    def told_too_early() -> None:
        set_handlers()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(handling, "_set_worker_signal_handlers", told_too_early)
    loader = torch.utils.data.DataLoader(list(range(6)), batch_size=2, **exact_loader_options(2))  # type: ignore[arg-type]
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5]]

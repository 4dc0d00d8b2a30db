"""The order of samples as a pure function of (seed, epoch): a resume seeks, it does not replay."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch

from orchestrator.integrations.randomness import derive_key


class ExactBatchSampler:
    """Batch sampler whose order depends on (seed, epoch) alone and which can start in mid-epoch.

    Yields lists of `(index, epoch)`. `len()` is always the full epoch, as Lightning expects it of a resumed loader. The
    global batch is split contiguously over the ranks, so the same samples form step n at any world size. The tail that
    fills no global batch is left out (it changes with the shuffle).
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        rank: int | None = None,
        world_size: int | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """`size`: number of samples; `batch_size`: the *global* batch, of all ranks together (must divide by them)."""
        self.rank = int(environ.get("RANK", "0")) if rank is None else rank
        self.world_size = int(environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
        if batch_size < 1 or batch_size % self.world_size:
            raise ValueError(f"the global batch size {batch_size} does not divide by {self.world_size} ranks")
        if size < batch_size:
            raise ValueError(f"{size} samples do not fill one global batch of {batch_size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.epoch, self.start = 0, 0
        self.sampler = self  # Lightning looks for set_epoch on `batch_sampler.sampler`

    def seek(self, epoch: int, batch: int) -> None:
        """Let the next iteration begin at `batch` of `epoch`."""
        self.epoch, self.start = epoch, batch

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch` from its first batch; the epoch sought keeps its position."""
        if epoch != self.epoch:
            self.seek(epoch, 0)

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, start = self.epoch, self.start
        generator = torch.Generator().manual_seed(derive_key(self.seed, "order", epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        local = self.batch_size // self.world_size
        for batch in range(start, len(self)):
            first = batch * self.batch_size + self.rank * local
            yield [(index, epoch) for index in order[first : first + local]]

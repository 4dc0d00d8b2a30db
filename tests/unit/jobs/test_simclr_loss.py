"""NT-Xent against a float64 reference written as the paper's formula, alone and over ranks."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from jobs.methods.simclr.loss import distributed_nt_xent, nt_xent
from tests.integration.forked import run_ranks

IMAGES, WIDTH, TEMPERATURE = 12, 5, 0.3


def reference(z_2ND: Tensor, temperature: float) -> Tensor:
    """Equation 1 of Chen et al., 2020, with loops."""
    z = z_2ND.reshape(-1, z_2ND.shape[-1])
    images = z_2ND.shape[1]
    losses = []
    for i in range(2 * images):
        j = (i + images) % (2 * images)
        similarity = [(z[i] @ z[k] / temperature).exp() for k in range(2 * images) if k != i]
        losses.append(-torch.log((z[i] @ z[j] / temperature).exp() / torch.stack(similarity).sum()))
    return torch.stack(losses).mean()


def embeddings(weight: Tensor) -> Tensor:
    x = torch.randn(2, IMAGES, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return F.normalize(x @ weight, dim=2)


def weight() -> Tensor:
    return torch.randn(7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()


def test_value_and_gradient_on_one_rank() -> None:
    ours, theirs = weight(), weight()
    z = embeddings(ours)
    loss = nt_xent(z, z, first=0, temperature=TEMPERATURE)
    expected = reference(embeddings(theirs), TEMPERATURE)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def _one_rank(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shared = weight()
    local = IMAGES // world_size
    z = embeddings(shared)[:, rank * local : (rank + 1) * local]
    loss = distributed_nt_xent(z, temperature=TEMPERATURE)
    loss.backward()
    assert shared.grad is not None
    results = torch.cat([loss.detach()[None], shared.grad.flatten()]) / world_size  # what DDP's mean does
    dist.all_reduce(results)
    if rank == 0:
        torch.save(results, out / "results.pt")
    dist.barrier()
    os._exit(0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_negatives_of_all_ranks_give_the_gradient_of_the_whole_batch(tmp_path: Path, world_size: int) -> None:
    codes = run_ranks(partial(_one_rank, tmp_path), tmp_path, world_size=world_size, attempt=0)
    assert set(codes) == {0}, (tmp_path / "output-0-0.txt").read_text()
    whole = weight()
    loss = reference(embeddings(whole), TEMPERATURE)
    loss.backward()
    assert whole.grad is not None
    expected = torch.cat([loss.detach()[None], whole.grad.flatten()])
    torch.testing.assert_close(torch.load(tmp_path / "results.pt"), expected, rtol=1e-10, atol=1e-12)

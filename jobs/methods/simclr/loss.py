"""NT-Xent, the loss of SimCLR, with the negatives of all ranks.

Shapes: B local batch, W ranks, D embedding, N = W·B images. All embeddings are of unit length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def nt_xent(own_2BD: Tensor, all_2ND: Tensor, *, first: int, temperature: float) -> Tensor:
    """Mean cross-entropy of this rank's anchors against all candidates but themselves. Pure, differentiable.

    Args:
        own_2BD: the two views of this rank's B images.
        all_2ND: the two views of all N images; `own` are the images `first` to `first + B` of them.
    """
    _two, batch, width = own_2BD.shape
    images = all_2ND.shape[1]
    anchors = own_2BD.reshape(2 * batch, width)
    candidates = all_2ND.reshape(2 * images, width)
    logits = anchors @ candidates.T / temperature
    mine = torch.arange(first, first + batch, device=logits.device)
    itself = torch.cat([mine, mine + images])
    positive = torch.cat([mine + images, mine])
    logits = logits.scatter(1, itself[:, None], float("-inf"))
    return F.cross_entropy(logits, positive)


class _GatherRanks(torch.autograd.Function):
    """All ranks' tensors, stacked in front; the gradient of each comes back summed over the ranks that used it."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.contiguous()
        dist.all_reduce(summed)
        return summed[dist.get_rank()]


def gather_ranks(local: Tensor) -> Tensor:
    """[W, *local.shape], in the order of ranks. Collective, differentiable.

    With the mean of DDP over the ranks' gradients, mean-over-own-anchors losses add up to exactly the gradient of the
    mean over all anchors.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local[None]
    gathered: Tensor = _GatherRanks.apply(local)
    return gathered


def distributed_nt_xent(own_2BD: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent of this rank's images against those of all ranks. Collective."""
    gathered_W2BD = gather_ranks(own_2BD)
    world, _two, batch, width = gathered_W2BD.shape
    all_2ND = gathered_W2BD.transpose(0, 1).reshape(2, world * batch, width)
    first = batch * (dist.get_rank() if world > 1 else 0)
    return nt_xent(own_2BD, all_2ND, first=first, temperature=temperature)

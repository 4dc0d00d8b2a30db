"""DistributedDataParallel lays its gradient buckets out anew after the first backward of every *process*.

The first backward sums buckets in registration order, later ones in the order gradients became ready. With three or
more ranks the two layouts add the same numbers in another order, so the first step after a restart differs in the last
bits. The cure: let every process, the very first included, do its first backward before its first real step.
"""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch.nn.parallel import DistributedDataParallel


def settle_buckets(wrapped: DistributedDataParallel, module: LightningModule) -> None:
    """One backward through `wrapped` that touches every parameter and changes none. Collective.

    The user's forward is not run: no buffers, random numbers or logs are touched. Gradients become ready in reverse
    order of registration, the order DDP's own first guess assumes.
    """

    def touch_parameters() -> torch.Tensor:
        total = torch.zeros((), device=module.device)
        for parameter in module.parameters():
            if parameter.requires_grad:
                total = total + (parameter * 0).sum().to(total.dtype)
        return total

    module.forward = touch_parameters  # type: ignore[method-assign]
    try:
        with torch.enable_grad():
            wrapped().backward()
    finally:
        del module.forward  # the class's forward shows again
    module.zero_grad(set_to_none=True)


def needs_settling(strategy_model: object) -> bool:
    """False where DDP does not rebuild its buckets (one rank, `find_unused_parameters`) or may not (`static_graph`)."""
    return (
        isinstance(strategy_model, DistributedDataParallel)
        and not strategy_model.find_unused_parameters
        and not strategy_model.static_graph
    )

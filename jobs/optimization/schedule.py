"""Learning-rate schedules as pure functions of the step: nothing of them needs to be saved but the step."""

from __future__ import annotations

import functools
import math

import torch


def warmup_cosine_factor(step: int, *, warmup_steps: int, steps: int) -> float:
    """Factor of the peak rate at `step` (0-based): a line up to 1, then half a cosine to 0 (SGDR, Loshchilov 2017)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    span = max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / span)))


def warmup_cosine(
    optimizer: torch.optim.Optimizer, *, warmup_steps: int, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler to be stepped after each optimizer step."""
    factor = functools.partial(warmup_cosine_factor, warmup_steps=warmup_steps, steps=steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step))

"""Optimizers by name; weight decay spares biases and norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerPlan:
    """Everything an optimizer and its schedule need to know. `lr` is the peak, after warm-up."""

    name: str
    lr: float
    weight_decay: float
    momentum: float
    betas: tuple[float, float]
    steps: int
    warmup_steps: int


def build_optimizer(module: nn.Module, plan: OptimizerPlan) -> torch.optim.Optimizer:
    """SGD or AdamW; parameters with one dimension or less (biases, norms) are not decayed."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    if plan.name == "sgd":
        return torch.optim.SGD(groups, lr=plan.lr, momentum=plan.momentum)
    return torch.optim.AdamW(groups, lr=plan.lr, betas=plan.betas)

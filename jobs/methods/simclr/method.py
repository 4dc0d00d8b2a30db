"""SimCLR as a LightningModule: two views, one forward, NT-Xent across ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from jobs.augmentation.views import RandomViews
from jobs.methods.simclr.defaults import DEFAULT_LR, DEFAULT_WEIGHT_DECAY, REFERENCE_BATCH, SimCLRArgs
from jobs.methods.simclr.loss import distributed_nt_xent
from jobs.models import build_backbone
from jobs.optimization.optimizers import OptimizerPlan, build_optimizer
from jobs.optimization.schedule import warmup_cosine
from jobs.pretrain.settings import parse_section
from orchestrator.integrations.randomness import seed_torch

if TYPE_CHECKING:
    from jobs.pretrain.settings import PretrainSettings


class SimCLR(LightningModule):
    """`backbone` is what is exported; `projector` is thrown away after training."""

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        args: SimCLRArgs,
        *,
        views: RandomViews,
        plan: OptimizerPlan,
        seed: int,
        rank: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(width, args.hidden_dim, bias=False),
            nn.BatchNorm1d(args.hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(args.hidden_dim, args.output_dim),
        )
        self._temperature = args.temperature
        self._views = views
        self._plan = plan
        self._seed = seed
        self._rank = rank

    def training_step(self, images_BCHW: Tensor, batch_idx: int) -> Tensor:
        key = (self.current_epoch, batch_idx, self._rank)
        views = []
        for view in ("view0", "view1"):
            seed_torch(self._seed, view, *key)
            views.append(self._views(images_BCHW))
        seed_torch(self._seed, "model", *key)  # dropout and the like draw after the augmentation, whatever that drew
        z = F.normalize(self.projector(self.backbone(torch.cat(views))), dim=1)
        loss = distributed_nt_xent(z.reshape(2, len(images_BCHW), -1), temperature=self._temperature)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(images_BCHW), sync_dist=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=True, on_epoch=False)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self, self._plan)
        scheduler = warmup_cosine(optimizer, warmup_steps=self._plan.warmup_steps, steps=self._plan.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def build_simclr(settings: PretrainSettings, *, seed: int, image_size: int, steps_per_epoch: int, rank: int) -> SimCLR:
    """Weights are drawn from (seed, "init"), so every rank and every attempt starts with the same."""
    args = parse_section(SimCLRArgs, settings.method_args, prefix="method_args")
    optim = "sgd" if settings.optim == "auto" else settings.optim
    given = settings.optim_args
    warmup = min(10.0, settings.epochs / 10) if settings.warmup_epochs is None else settings.warmup_epochs
    plan = OptimizerPlan(
        name=optim,
        lr=given.lr if given.lr is not None else DEFAULT_LR[optim] * settings.batch_size / REFERENCE_BATCH,
        weight_decay=given.weight_decay if given.weight_decay is not None else DEFAULT_WEIGHT_DECAY[optim],
        momentum=0.9 if given.momentum is None else given.momentum,
        betas=given.betas or (0.9, 0.999),
        steps=settings.epochs * steps_per_epoch,
        warmup_steps=round(warmup * steps_per_epoch),
    )
    seed_torch(seed, "init")
    backbone, width = build_backbone(settings.model, settings.model_args)
    views = RandomViews(settings.transform_args, image_size=image_size)
    return SimCLR(backbone, width, args, views=views, plan=plan, seed=seed, rank=rank)

"""One folder per method: the loss, the forward, the defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.methods.simclr.method import SimCLR
    from jobs.pretrain.settings import PretrainSettings


def build_method(settings: PretrainSettings, *, seed: int, image_size: int, steps_per_epoch: int, rank: int) -> SimCLR:
    """The LightningModule of `settings.method` with freshly initialised weights, the same on every rank."""
    from jobs.methods.simclr.method import build_simclr

    return build_simclr(settings, seed=seed, image_size=image_size, steps_per_epoch=steps_per_epoch, rank=rank)

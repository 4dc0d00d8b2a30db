"""What this integration relies on, and what a trainer still lacks for an exact resume, in words."""

from __future__ import annotations

from collections.abc import Iterator

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from orchestrator.errors import CheckpointError
from orchestrator.integrations.randomness import SeededDataset
from orchestrator.integrations.sampler import ExactBatchSampler

SUPPORTED_LIGHTNING = (2, 6)


def check_lightning_version(version: str = lightning.__version__) -> None:
    """Refuse a Lightning whose loops this was not proven on: it leans on private names and on the order of hooks."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) != SUPPORTED_LIGHTNING:
        wanted = ".".join(str(part) for part in SUPPORTED_LIGHTNING)
        raise CheckpointError(
            f"exact resume is proven for Lightning {wanted}.x; this is {version}",
            hint=f"pip install 'lightning>={wanted},<{SUPPORTED_LIGHTNING[0]}.{SUPPORTED_LIGHTNING[1] + 1}'",
        )


def missing_for_exactness(trainer: Trainer, module: LightningModule, *, seeded: bool) -> list[str]:
    """One sentence for each thing that keeps a resume of this trainer from being exact; empty when nothing is known."""
    return [
        *_data_gaps(trainer),
        *([] if seeded else ["no seed was given: pass ExactResume(seed=…) so that every step is seeded"]),
        *_model_gaps(trainer, module),
        *_trainer_gaps(trainer),
    ]


def _data_gaps(trainer: Trainer) -> Iterator[str]:
    combined = trainer.fit_loop._combined_loader
    for loader in [] if combined is None else combined.flattened:
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, IterableDataset):
            yield "the training data is an IterableDataset: its position is not saved; use a map-style dataset"
            continue
        sampler = getattr(loader, "batch_sampler", None)
        if not isinstance(sampler, ExactBatchSampler):
            yield (
                f"the training loader draws its batches with {type(sampler).__name__}: a resume in mid-epoch starts "
                "the epoch's data over; use batch_sampler=exact.batch_sampler(…)"
            )
        elif not (isinstance(dataset, SeededDataset) or getattr(dataset, "takes_epoch_keys", False)):
            yield "the dataset is not a SeededDataset: random transforms in it are not tied to (seed, epoch, index)"
        workers = getattr(loader, "num_workers", 0)
        if workers and getattr(loader, "worker_init_fn", None) is None:
            yield (
                "the loader's workers do not ignore stop signals: one sent to the process group kills them before the "
                "save; pass worker_init_fn=ignore_stop_signals"
            )


def _model_gaps(trainer: Trainer, module: LightningModule) -> Iterator[str]:
    if any(isinstance(part, torch.nn.SyncBatchNorm) for part in module.modules()):
        yield "SyncBatchNorm: exactness is not proven with it"
    wrapped = trainer.strategy.model
    if isinstance(wrapped, DistributedDataParallel):
        if not wrapped.broadcast_buffers and any(True for _ in module.buffers()):
            yield "DDP with broadcast_buffers=False: the other ranks' buffers come back as rank 0's"
        if wrapped.static_graph and trainer.world_size > 2:
            yield "DDP with static_graph on three or more ranks: the first step after a restart sums in another order"
    if not module.automatic_optimization:
        yield "manual optimization: saves assume that one batch makes at most one optimizer step"
    if next(module.parameters()).is_cuda and torch.backends.cudnn.benchmark:
        yield "cudnn.benchmark may choose other kernels after a restart; switch it off"


def _trainer_gaps(trainer: Trainer) -> Iterator[str]:
    if not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
        yield f"strategy {type(trainer.strategy).__name__}: only single-device and DDP are proven"
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        yield "a plateau scheduler: the metric it watches is not restored"
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        yield "val_check_interval given as a time: validations fall on other steps after a restart"
    if getattr(trainer, "reload_dataloaders_every_n_epochs", 0):
        yield "reload_dataloaders_every_n_epochs: exactness is not proven with it"

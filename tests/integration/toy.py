"""A small trainer that uses everything a restart could break: batch norm, dropout, a queue that is updated in the
module's own `on_train_batch_end`, a running average, validation, epoch means, a torchmetrics attribute, DataLoader
workers."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from orchestrator.integrations.lightning import ExactResume, RunLogger, SeededDataset, exact_loader_options
from orchestrator.worker.session import CheckpointSettings

SIZE, WIDTH, BATCH, EPOCHS = 100, 12, 12, 3  # 8 batches an epoch
BATCHES = SIZE // BATCH
BEFORE_THE_FIRST_STEP = -1


@dataclass(frozen=True)
class Toy:
    """What to train and where to be interrupted (`at`: index of the batch over all epochs)."""

    accumulate: int = 1
    validate_every: int | None = None  # batches; None: at the end of the epoch
    validation: bool = True
    max_steps: int = -1
    workers: int = 0
    every_steps: int | None = None
    every_epochs: int | None = 1
    every_minutes: float | None = None
    asynchronous: bool = False
    slow_disk_s: float = 0.0  # that every data file takes longer
    at: int | None = None
    at_validation_batch: int | None = None  # of the validation that follows `at`
    rank: int = 0
    signal: int = signal.SIGUSR1  # 0: raise an error instead; -1: hang
    in_hook_save: int | None = None  # a checkpoint saved in on_train_batch_end of this batch, as ModelCheckpoint does
    start_from: str | None = None
    find_unused_parameters: bool = False
    deep: bool = False
    queue_in_hook: bool = True  # in the module's own on_train_batch_end, which runs after every callback's


class Noisy(torch.utils.data.Dataset[Tensor]):
    """Samples with a random part that is drawn in the worker."""

    def __init__(self) -> None:
        self._data = torch.randn(SIZE, WIDTH, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Tensor:
        return self._data[index] + 0.1 * torch.randn(WIDTH)


class ToyModule(pl.LightningModule):
    def __init__(self, toy: Toy, run_dir: Path) -> None:
        super().__init__()
        self._toy, self._run_dir = toy, run_dir
        torch.manual_seed(0)
        hidden = [nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(6 if toy.deep else 0)]
        self.net = nn.Sequential(
            nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), *hidden, nn.Linear(32, 8)
        )
        self.register_buffer("queue", torch.zeros(16, 8))
        self.register_buffer("average", torch.zeros(32, WIDTH))
        self.mean_loss = torchmetrics.MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x), dim=1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self._note("train", batch_idx)
        z = self(batch)
        loss = (z @ z.T).square().mean() + (z @ self.queue.clone().T).square().mean()
        self._latest = z.detach()
        if not self._toy.queue_in_hook:
            self._enqueue()
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(batch))
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True)
        self.mean_loss.update(loss.detach())
        self.log("mean_loss", self.mean_loss, on_step=False, on_epoch=True)
        if self._batch_number() == self._toy.at and self._toy.at_validation_batch is None:
            self._interrupt()
        return loss

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.average.lerp_(self.net[0].weight.detach(), 0.1)

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if self._toy.queue_in_hook:
            self._enqueue()

    def _enqueue(self) -> None:
        latest = self._latest
        if self.trainer.world_size > 1:
            latest = self.all_gather(latest).flatten(0, 1)
        self.queue.copy_(torch.cat([latest, self.queue])[: len(self.queue)])

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._note("validate", batch_idx)
        self.log("val_loss", (self(batch) + torch.rand(1)).square().mean(), batch_size=len(batch), sync_dist=True)
        if self._batch_number() == self._toy.at and self._toy.at_validation_batch == batch_idx:
            self._interrupt()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _batch_number(self) -> int:
        return int(self.trainer.fit_loop.epoch_loop.total_batch_idx)

    def _interrupt(self) -> None:
        if self._toy.signal == -1:  # both are asked to stop, and one of them hangs
            os.kill(os.getpid(), signal.SIGTERM)
        if self.global_rank != self._toy.rank:
            return
        if self._toy.signal == 0:
            raise ArithmeticError("on purpose")
        if self._toy.signal == -1:
            threading.Event().wait()
        os.kill(os.getpid(), self._toy.signal)

    def _note(self, kind: str, batch_idx: int) -> None:
        if self.global_rank == 0:
            with (self._run_dir / "steps.txt").open("a") as file:
                file.write(f"{kind} {self.current_epoch} {batch_idx}\n")


class SaveInHook(pl.Callback):
    """Saves where ModelCheckpoint(every_n_train_steps=…) does, then the process dies two batches later."""

    def __init__(self, toy: Toy, run_dir: Path) -> None:
        self._toy, self._path = toy, run_dir / "in_hook.ckpt"

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        if number == self._toy.in_hook_save:
            trainer.save_checkpoint(self._path)
        if self._toy.in_hook_save is not None and number == self._toy.in_hook_save + 2:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_options(toy: Toy, run_dir: Path, world_size: int) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "devices": world_size,
        "strategy": DDPStrategy(process_group_backend="gloo") if world_size > 1 else "auto",
        "max_steps": toy.max_steps,
        "accumulate_grad_batches": toy.accumulate,
        "val_check_interval": toy.validate_every,
        "limit_val_batches": 1.0 if toy.validation else 0,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": run_dir,
    }


def _slow_down(store: Any, seconds: float) -> None:
    write_data = store.medium.write_data

    def slowly(name: str, write: Any, *, note: Any) -> Any:
        time.sleep(seconds)
        return write_data(name, write, note=note)

    store.medium.write_data = slowly


def train(toy: Toy, run_dir: Path) -> None:
    """One attempt, in this process; ends it when interrupted."""
    torch.set_num_threads(1)
    settings = CheckpointSettings(toy.every_steps, toy.every_minutes, toy.every_epochs, asynchronous=toy.asynchronous)
    exact = ExactResume(seed=7, settings=settings)
    if toy.slow_disk_s:
        _slow_down(exact.session.store, toy.slow_disk_s)
    sampler = exact.batch_sampler(SIZE, BATCH)
    loader = torch.utils.data.DataLoader(
        SeededDataset(Noisy(), seed=7), batch_sampler=sampler, **exact_loader_options(toy.workers)
    )
    validation = torch.utils.data.DataLoader(Noisy(), batch_size=20)
    trainer = pl.Trainer(
        **trainer_options(toy, run_dir, exact.session.world_size),
        max_epochs=EPOCHS if toy.max_steps < 0 else -1,
        logger=RunLogger(exact.session),
        callbacks=[exact, SaveInHook(toy, run_dir)],
        enable_checkpointing=False,
    )
    module = ToyModule(toy, run_dir)
    if toy.at == BEFORE_THE_FIRST_STEP:
        os.kill(os.getpid(), toy.signal)
    trainer.fit(module, loader, validation, ckpt_path=toy.start_from or exact.ckpt_path)
    if exact.session.is_chief:
        torch.save(
            {
                "model": module.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict(),
                "step": trainer.global_step,
                "epoch": trainer.current_epoch,
            },
            run_dir / "final.pt",
        )
        exact.session.verdict("completed", step=trainer.global_step, epoch=trainer.current_epoch)


def verdict(run_dir: Path, attempt: int) -> dict[str, Any]:
    return dict(json.loads((run_dir / f"verdict-{attempt:03d}.json").read_text()))

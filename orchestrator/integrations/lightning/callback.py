"""The one callback: stops at a step boundary all ranks agree on, saves there, and resumes there exactly.

Saves happen in the first hook after a step is *wholly* done (optimizer, schedulers, every `on_train_batch_end`, its
log row, a due validation): `on_train_batch_start` of the next batch, `on_train_epoch_start` of the next epoch,
`on_train_end`.
A stop uses Lightning's own SIGTERMException, which is raised at the same boundary without waiting for another batch.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from orchestrator.errors import CheckpointError
from orchestrator.integrations.lightning.accumulators import dump_accumulators, load_accumulators
from orchestrator.integrations.lightning.checkpoint_io import SessionCheckpointIO
from orchestrator.integrations.lightning.checks import check_lightning_version, missing_for_exactness
from orchestrator.integrations.lightning.ddp import needs_settling, settle_buckets
from orchestrator.integrations.lightning.logger import RunLogger
from orchestrator.integrations.lightning.loop_state import (
    adopt_fit_loop,
    boundary,
    canonical_fit_loop,
    count_steps,
    epoch_is_open,
    forget_finished_epoch,
    position,
)
from orchestrator.integrations.lightning.signals import LightningSignals
from orchestrator.integrations.lightning.starting_point import Start, explain, starting_point
from orchestrator.integrations.randomness import seed_step
from orchestrator.integrations.sampler import ExactBatchSampler
from orchestrator.integrations.torch import Agreement, RankTimes, SaveSchedule, agree
from orchestrator.worker.session import CheckpointSettings, Session

log = logging.getLogger("orchestrator.integrations.lightning")

STATE_KEY = "orch"  # our part of a checkpoint
VALIDATION_SAFETY = 1.5  # a validation is finished only if this many times its last duration is left


class ExactResume(Callback):
    """Makes a Trainer stoppable and exactly resumable. Pass `ckpt_path=exact.ckpt_path` to `fit`.

    Args:
        seed: seeds every training step and validation by (seed, epoch, batch, rank); None leaves seeding to you.
        session: where this process runs; by default as the environment says (collective where `orch` did not start it).
        out: run directory outside `orch submit`; by default `./orch_runs/runs/<run id>`.
        settings: when to save outside `orch submit`.
        start_from: a checkpoint of a plain Lightning Trainer, or the directory it lies in: where a run begins that has
            no checkpoint of its own yet.
        data: a fingerprint of the training data; to go on with other data than a checkpoint's is refused.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        session: Session | None = None,
        out: Path | str | None = None,
        settings: CheckpointSettings | None = None,
        start_from: Path | str | None = None,
        data: str | None = None,
    ) -> None:
        check_lightning_version()
        self.session = session or Session.start(
            default_dir=None if out is None else Path(out), agree=agree, settings=settings
        )
        if data is not None:
            self.session.declare_data(data)
        self.session.install_signal_handlers()
        self.seed = seed
        self._start_from = start_from
        self._foreign_loaded = False
        self._schedule = SaveSchedule(self.session.settings)
        self._throughput = _StepRate()
        self._rank_times = RankTimes()
        self._own = _OwnTime()
        self._samplers: list[ExactBatchSampler] = []
        self._trainer: Trainer | None = None
        self._agreement: Agreement | None = None
        self._signals: LightningSignals | None = None
        self._io: SessionCheckpointIO | None = None
        self._restored: dict[str, Any] | None = None  # this rank's accumulators, until on_train_start
        self._step = 0  # optimizer steps done
        self._max_steps: int | None = None
        self._at_step = False  # the last batch ended with an optimizer step
        self._commit_due = False
        self._stop_after_validation = False
        self._validation = _ValidationClock()

    # --- what a stranger calls

    @cached_property
    def ckpt_path(self) -> str | None:
        """The checkpoint to start from, the same on every rank; None for a fresh start. Collective when first read."""
        return self._start.path

    @cached_property
    def _start(self) -> Start:
        return starting_point(self.session, self._start_from)

    def batch_sampler(self, size: int, batch_size: int, *, seed: int | None = None) -> ExactBatchSampler:
        """A batch sampler (global `batch_size`) that this callback puts at the right position."""
        chosen = self.seed if seed is None else seed
        if chosen is None:
            raise ValueError("the sampler needs a seed: ExactResume(seed=…) or batch_sampler(…, seed=…)")
        sampler = ExactBatchSampler(
            size, batch_size, seed=chosen, rank=self.session.rank, world_size=self.session.world_size
        )
        if self._trainer is not None:  # made in train_dataloader(), after the loops were restored
            sampler.seek(*position(self._trainer))
        self._samplers.append(sampler)
        return sampler

    # --- begin

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if (trainer.world_size, trainer.global_rank) != (self.session.world_size, self.session.rank):
            raise CheckpointError(
                f"the trainer has {trainer.world_size} ranks and this is number {trainer.global_rank}, but the "
                f"environment says {self.session.world_size} and {self.session.rank}",
                hint="start the ranks with torchrun (or `orch submit`), and tell the trainer how many there are: "
                'devices=, num_nodes=, strategy="ddp" (docs/exact-resume.md)',
            )
        # Lightning cannot know that the exact sampler seeks; where there is another one, on_train_start says so.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        self._trainer = trainer
        self._signals = LightningSignals(trainer)
        self._signals.take_over()
        # `_start` opens the fence, even where the caller passes another checkpoint
        self._io = SessionCheckpointIO(self.session, trainer.strategy.checkpoint_io, self._start)
        trainer.strategy.checkpoint_io = self._io

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        begins_elsewhere = self._trainer is not None and self._start.foreign  # else it is no fit
        if begins_elsewhere:
            self._begin_elsewhere(checkpoint)
        saved = checkpoint.get(STATE_KEY)
        if saved is None:
            return
        if not begins_elsewhere:
            self._schedule.saved(checkpoint["global_step"])
        for sampler in self._samplers:
            sampler.seek(*saved["position"])
        for logger in _run_loggers(trainer):
            logger.load_state_dict(saved["log"])
        if saved["world_size"] == self.session.world_size:
            self._restored = saved["accumulators"][self.session.rank]
        else:
            log.warning(
                "saved with %d ranks, resumed with %d: epoch means cover only the part after the resume",
                saved["world_size"],
                self.session.world_size,
            )

    def _begin_elsewhere(self, checkpoint: dict[str, Any]) -> None:
        """The run's first checkpoint is somebody else's: before the loops are restored from it."""
        self._foreign_loaded = True
        path = str(self._start.path)
        step, epoch = checkpoint["global_step"], checkpoint["epoch"]
        self.session.started_from(path, step=step, epoch=epoch)
        if STATE_KEY in checkpoint:
            return
        loops = checkpoint["loops"]
        loops["fit_loop"], at = adopt_fit_loop(loops["fit_loop"])
        for sampler in self._samplers:
            sampler.seek(*at)
        if self.session.is_chief:
            version = checkpoint.get("legacy_pytorch-lightning_version", checkpoint["pytorch-lightning_version"])
            log.warning("%s", explain(path, step=step, position=at, version=version))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in _run_loggers(trainer):
            logger.open()  # cut back even where nothing more is logged

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._start.foreign:
            self._check_start(trainer)
        self._agreement = Agreement(3, trainer.world_size, self.session.rank)
        self._step = trainer.global_step
        self._max_steps = _max_steps(trainer)
        if self._restored is not None and trainer.fit_loop.restarting and epoch_is_open(trainer):
            load_accumulators(self._restored, trainer, pl_module)
        self._restored = None
        forget_finished_epoch(trainer)
        if needs_settling(trainer.strategy.model):
            settle_buckets(trainer.strategy.model, pl_module)  # type: ignore[arg-type]
        if self.session.is_chief:
            for gap in missing_for_exactness(trainer, pl_module, seeded=self.seed is not None):
                log.warning("a resume will not be exact: %s", gap)

    def _check_start(self, trainer: Trainer) -> None:
        if not self._foreign_loaded:
            raise CheckpointError(
                f"start_from was given, but the trainer did not load {self._start.path}",
                hint="pass it on: trainer.fit(…, ckpt_path=exact.ckpt_path)",
            )
        _epoch, batch = position(trainer)
        if batch > trainer.num_training_batches:
            raise CheckpointError(
                f"{self._start.path} was saved after {batch} batches of an epoch that has "
                f"{trainer.num_training_batches} here",
                hint="use the batch size and the data it was made with, or one that was saved at an epoch's end",
            )
        count_steps(trainer)

    # --- step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step and self._schedule.due_after_epoch(trainer.current_epoch):
            self._commit_due = True
        self._commit_if_due(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._own.pause()  # a save is not the rank's own slowness
        self._commit_if_due(trainer)
        if self.seed is not None:
            seed_step(self.seed, epoch=trainer.current_epoch, batch=batch_idx, rank=self.session.rank)
        self._begin_agreement()
        self._own.go_on()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self._own.finish()  # from here on it may wait for other ranks

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stop, save, give_up = self._finish_agreement()
        assert self._agreement is not None
        rank_seconds = self._rank_times.add(self._agreement.rank_seconds)
        self._own.start()
        self._at_step = trainer.global_step != self._step  # else gradients accumulate, and those are not saved
        if not self._at_step:
            return
        self._step = trainer.global_step
        throughput = self._samples_per_second()
        self.session.report(
            self._step,
            trainer.current_epoch,
            self._max_steps,
            throughput,
            rank_seconds=rank_seconds,
            stopping=bool(stop),
        )
        if save or self._schedule.due_at_step(self._step):
            self._commit_due = True
        if not stop:
            return
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if give_up or not trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher):
            self._ask_to_stop()
        else:
            self._stop_after_validation = True

    # --- validation: one that does not fit before the deadline is given up, and run again in full after the resume

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._agreement is None or trainer.sanity_checking:
            return
        if self.seed is not None:
            seed_step(
                self.seed, epoch=trainer.current_epoch, batch=self._step, rank=self.session.rank, purpose="validation"
            )
        self._validation.begin(self._agreement.minimum(_validation_batches(trainer)))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._validation.agree_on_next_batch():
            self._begin_agreement()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._validation.agreeing:
            return
        stop, _save, give_up = self._finish_agreement()
        if stop and self._at_step:
            self._stop_after_validation = True
            if give_up:
                self._ask_to_stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation.end()
        if self._stop_after_validation:
            self._ask_to_stop()

    # --- end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._commit_due = self._step > 0
        self._commit_if_due(trainer)
        self.session.finish_save()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._agreement is not None:
            with suppress(
                RuntimeError
            ):  # no rank ends its process while another is inside the last save; see stopped()
                self._agreement.barrier()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, SIGTERMException):
            self.session.record_failure(exception)
            return
        with self.session.guard():  # a save that fails now must say so: nobody handles what this hook raises
            self._commit(trainer, leaving=True)
            for logger in trainer.loggers:
                logger.finalize("preempted")
        assert self._agreement is not None
        self.session.stopped(step=self._step, epoch=trainer.current_epoch, barrier=self._agreement.barrier)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._signals is not None:
            self._signals.give_back()
            self._signals = None
        self._trainer = None

    # --- saving

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Also for saves of others (ModelCheckpoint): every checkpoint of this trainer has the canonical form."""
        at = boundary(trainer, validation_given_up=trainer.validating and self._stop_after_validation)
        loops = checkpoint["loops"]
        loops["fit_loop"] = canonical_fit_loop(loops["fit_loop"], at)
        mine = dump_accumulators(trainer, pl_module) if at.batches is not None else {"logged": {}, "metrics": {}}
        checkpoint[STATE_KEY] = {
            "world_size": self.session.world_size,
            "position": position(trainer),
            "log": next((logger.state_dict() for logger in _run_loggers(trainer)), {"rows": None}),
            "accumulators": [mine] if self._agreement is None else self._agreement.gather(mine),
        }

    def _commit_if_due(self, trainer: Trainer) -> None:
        if self._commit_due:
            self._commit(trainer)

    def _commit(self, trainer: Trainer, *, leaving: bool = False) -> None:
        """Collective. `leaving`: the process is about to end."""
        self._commit_due = False
        if self._schedule.is_saved(self._step) and not trainer.validating:
            if leaving:
                self.session.finish_commit()
            return
        assert self._io is not None
        self._io.leaving = leaving
        self._io.metrics = _published(trainer)
        trainer.save_checkpoint(self._io.target)
        self._schedule.saved(self._step)

    def _samples_per_second(self) -> float | None:
        """Of all ranks together; None while unknown, and without a sampler of ours."""
        rate = self._throughput.after(self._step)
        if rate is None or not self._samplers or self._trainer is None:
            return None
        return rate * self._samplers[-1].batch_size * self._trainer.accumulate_grad_batches

    # --- agreeing

    def _begin_agreement(self) -> None:
        assert self._agreement is not None
        stop = self.session.stop_requested
        save = self.session.is_chief and self._schedule.due_by_time()
        self._agreement.begin(
            [int(stop), int(save), int(stop and not self._validation.fits(self.session.seconds_left()))],
            self._own.last_s,
        )

    def _finish_agreement(self) -> Sequence[int]:
        assert self._agreement is not None
        return self._agreement.finish()

    def _ask_to_stop(self) -> None:
        assert self._signals is not None
        self._signals.ask_to_stop()


class _ValidationClock:
    """How long a validation takes, and which of its batches all ranks have."""

    def __init__(self) -> None:
        self.agreeing = False
        self._left = 0
        self._started_at = 0.0
        self._seconds: float | None = None

    def begin(self, common_batches: int) -> None:
        self._left = common_batches
        self._started_at = time.monotonic()

    def agree_on_next_batch(self) -> bool:
        """True while every rank still has a batch: an agreement without some rank would hang the others."""
        self.agreeing = self._left > 0
        self._left -= 1
        return self.agreeing

    def end(self) -> None:
        self.agreeing = False
        self._left = 0
        self._seconds = time.monotonic() - self._started_at

    def fits(self, seconds_left: float | None) -> bool:
        """Whether a whole validation can still be run; no when its length or the deadline is unknown."""
        return (
            self._seconds is not None and seconds_left is not None and seconds_left > VALIDATION_SAFETY * self._seconds
        )


class _OwnTime:
    """How long a step keeps this rank busy before it may have to wait for others: its data and its forward pass."""

    def __init__(self) -> None:
        self._running_since: float | None = None
        self._total_s = 0.0
        self.last_s = 0.0

    def start(self) -> None:
        self._running_since, self._total_s = time.monotonic(), 0.0

    def pause(self) -> None:
        if self._running_since is not None:
            self._total_s += time.monotonic() - self._running_since
            self._running_since = None

    def go_on(self) -> None:
        self._running_since = time.monotonic()

    def finish(self) -> None:
        """Only the first backward pass of a step counts: further ones follow collectives."""
        if self._running_since is not None:
            self.pause()
            self.last_s = self._total_s


class _StepRate:
    """Optimizer steps per second, averaged over windows of about a second."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._step: int | None = None
        self._rate: float | None = None

    def after(self, step: int) -> float | None:
        """The rate known when `step` is done; None during the first window."""
        now = time.monotonic()
        if self._step is None:
            self._since, self._step = now, step
        elif now - self._since >= 1.0:
            self._rate = (step - self._step) / (now - self._since)
            self._since, self._step = now, step
        return self._rate


def _run_loggers(trainer: Trainer) -> list[RunLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]


def _validation_batches(trainer: Trainer) -> int:
    batches = sum(trainer.num_val_batches)
    return int(batches) if batches != float("inf") else 0


def _published(trainer: Trainer) -> dict[str, float]:
    """`trainer.callback_metrics` without what it does when asked: it would compute the means of an open epoch."""
    metrics = trainer._logger_connector._callback_metrics
    return {name: float(value) for name, value in metrics.items() if value.numel() == 1}


def _max_steps(trainer: Trainer) -> int | None:
    total = trainer.estimated_stepping_batches
    return None if isinstance(total, float) and total == float("inf") else int(total)

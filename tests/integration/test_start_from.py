"""A run that begins with a checkpoint of a plain Lightning Trainer: the right file, the same weights and step, every
remaining batch once, and from there on as exact as any other run."""

from __future__ import annotations

import logging
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from orchestrator.integrations.lightning import (
    AtomicCheckpointIO,
    ExactResume,
    RunLogger,
    SeededDataset,
    exact_loader_options,
)
from orchestrator.integrations.lightning.starting_point import find_checkpoint
from orchestrator.paths import RunPaths
from orchestrator.registry import read_events
from orchestrator.worker.session import CheckpointSettings
from tests.integration.forked import outputs, run_ranks
from tests.integration.test_exact_loops import differences
from tests.integration.toy import BATCH, BATCHES, EPOCHS, SIZE, Noisy, Toy, ToyModule, trainer_options, verdict

pytestmark = pytest.mark.slow

STEPS = EPOCHS * BATCHES


class PlainModule(ToyModule):
    """Saves in the middle of a step as well, as Lightning's signal handler does."""

    def __init__(self, toy: Toy, run_dir: Path, in_step: int | None) -> None:
        super().__init__(toy, run_dir)
        self._in_step = in_step

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self._batch_number() == self._in_step:
            self.trainer.save_checkpoint(self.trainer._checkpoint_connector.hpc_save_path(self._run_dir))
        return super().training_step(batch, batch_idx)


class SaveAt(pl.Callback):
    """A requeue checkpoint at the end of these batches, by the name that Lightning gives it."""

    def __init__(self, run_dir: Path, batches: tuple[int, ...]) -> None:
        self._run_dir, self._batches = run_dir, batches

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx in self._batches:
            trainer.save_checkpoint(trainer._checkpoint_connector.hpc_save_path(self._run_dir))


@dataclass(frozen=True)
class Plain:
    """How the Trainer that knows nothing of us saves."""

    epochs: int = 1
    batch_ends: tuple[int, ...] = ()
    in_step: int | None = None
    last: bool = False
    validate_every: int | None = None
    plugin: bool = False
    weights_only: bool = False


def train_plainly(plain: Plain, run_dir: Path) -> None:
    torch.set_num_threads(1)
    toy = Toy(validate_every=plain.validate_every)
    callbacks: list[pl.Callback] = [SaveAt(run_dir, plain.batch_ends)]
    if plain.last:
        callbacks.append(ModelCheckpoint(run_dir, save_last=True, save_weights_only=plain.weights_only))
    trainer = pl.Trainer(
        **trainer_options(toy, run_dir, 1),
        max_epochs=plain.epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=plain.last,
        plugins=[AtomicCheckpointIO()] if plain.plugin else [],
    )
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=BATCH, shuffle=True, drop_last=True)
    validation = torch.utils.data.DataLoader(Noisy(), batch_size=20)
    trainer.fit(PlainModule(toy, run_dir, plain.in_step), loader, validation)


class NoteTheStart(pl.Callback):
    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = {"step": trainer.global_step, "model": pl_module.state_dict(), "epoch": trainer.current_epoch}
        torch.save(state, self._run_dir / f"started-{trainer.global_rank}.pt")


def go_on(toy: Toy, run_dir: Path, start_from: Path, *, pass_on: bool = True, batch_size: int = BATCH) -> None:
    """The same training under ExactResume."""
    torch.set_num_threads(1)
    logging.basicConfig(force=True)
    exact = ExactResume(seed=7, settings=CheckpointSettings(every_epochs=1), start_from=start_from)
    with exact.session.guard():
        path = exact.ckpt_path
        world_size = exact.session.world_size
        loader = torch.utils.data.DataLoader(
            SeededDataset(Noisy(), seed=7),
            batch_sampler=exact.batch_sampler(SIZE, batch_size),
            **exact_loader_options(0),
        )
        trainer = pl.Trainer(
            **trainer_options(toy, run_dir, world_size),
            max_epochs=EPOCHS,
            callbacks=[exact, NoteTheStart(run_dir)],
            logger=RunLogger(exact.session),
            enable_checkpointing=False,
        )
        module = ToyModule(toy, run_dir)
        validation = torch.utils.data.DataLoader(Noisy(), batch_size=20)
        trainer.fit(module, loader, validation, ckpt_path=path if pass_on else None)
    if exact.session.is_chief:
        state = {"model": module.state_dict(), "step": trainer.global_step, "epoch": trainer.current_epoch}
        torch.save(state, run_dir / "final.pt")
        exact.session.verdict("completed", step=trainer.global_step, epoch=trainer.current_epoch)


def plainly(plain: Plain, run_dir: Path) -> Path:
    assert run_ranks(partial(train_plainly, plain, run_dir), run_dir, world_size=1, attempt=0) == [0], outputs(
        run_dir, 0
    )
    return run_dir


def attempt(body: Callable[[], object], run_dir: Path, number: int = 0, *, world_size: int = 1) -> str:
    codes = run_ranks(body, run_dir, world_size=world_size, attempt=number)
    assert set(codes) == {0}, outputs(run_dir, number)
    return outputs(run_dir, number)


def loaded(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


def trained(run_dir: Path) -> list[str]:
    return [line for line in (run_dir / "steps.txt").read_text().splitlines() if line.startswith("train")]


def remaining(step: int) -> list[str]:
    return [f"train {number // BATCHES} {number % BATCHES}" for number in range(step, STEPS)]


def logged_steps(run_dir: Path) -> list[int]:
    rows = [row.split(",") for row in (run_dir / "metrics.csv").read_text().splitlines()[1:]]
    return [int(step) for step, _epoch, name, _value in rows if name == "loss_step"]


CASES = {
    "in the hook of a batch": (Plain(batch_ends=(3,)), 4),
    "in the hook of an epoch's last batch": (Plain(batch_ends=(7,)), 8),
    "in the hook of a batch of the second epoch": (Plain(epochs=2, batch_ends=(12,)), 13),
    "in the middle of a step": (Plain(in_step=5), 5),
    "in the first step of an epoch": (Plain(epochs=2, in_step=8), 8),
    "at the end of an epoch": (Plain(last=True), 8),
    "before a validation within the epoch": (Plain(batch_ends=(4,), validate_every=5), 5),
    "in the step after a validation": (Plain(in_step=5, validate_every=5), 5),
}


@pytest.mark.parametrize(("plain", "step"), CASES.values(), ids=CASES)
def test_every_remaining_batch_once(tmp_path: Path, plain: Plain, step: int) -> None:
    theirs, ours = plainly(plain, tmp_path / "plain"), tmp_path / "ours"
    said = attempt(partial(go_on, Toy(validate_every=plain.validate_every), ours, theirs), ours)
    saved = loaded(find_checkpoint(theirs))
    started = loaded(ours / "started-0.pt")
    assert saved["global_step"] == started["step"] == step
    assert differences(saved["state_dict"], started["model"]) == []
    assert trained(ours) == remaining(step)
    assert logged_steps(ours) == list(range(step + 1, STEPS + 1))
    final = loaded(ours / "final.pt")
    assert (final["step"], final["epoch"]) == (STEPS, EPOCHS)
    after = re.search(r"after (\d+) batches of epoch (\d+)\. Not carried over", said)
    assert after is not None
    assert int(after[1]) + BATCHES * int(after[2]) == step
    [resumed] = [event for event in read_events(RunPaths(ours)) if event["event"] == "resumed"]
    assert (resumed["step"], resumed["start_from"]) == (step, str(find_checkpoint(theirs)))


def test_the_highest_requeue_checkpoint_is_taken(tmp_path: Path) -> None:
    theirs = plainly(Plain(epochs=2, batch_ends=tuple(range(10)), last=True), tmp_path / "plain")
    assert find_checkpoint(theirs).name == "hpc_ckpt_10.ckpt"
    ours = tmp_path / "ours"
    attempt(partial(go_on, Toy(), ours, theirs), ours)
    assert loaded(ours / "started-0.pt")["step"] == 10


def as_lightning_1(checkpoint: dict[str, Any], version: str) -> None:
    """What 1.9 called differently; 1.4 kept no loops."""
    checkpoint["pytorch-lightning_version"] = version
    if version < "1.5":
        del checkpoint["loops"]
        checkpoint["epoch"] = 1  # the next one
        return
    loop = checkpoint["loops"]["fit_loop"]
    for new, old in (
        ("automatic_optimization", "batch_loop.optimizer_loop"),
        ("manual_optimization", "batch_loop.manual_loop"),
    ):
        for key in [key for key in loop if key.startswith(f"epoch_loop.{new}.")]:
            loop[key.replace(new, old)] = loop.pop(key)
    loop["epoch_loop.batch_loop.state_dict"] = {}


@pytest.mark.parametrize(("version", "plain"), [("1.9.5", Plain(batch_ends=(3,))), ("1.4.9", Plain(last=True))])
def test_lightning_migrates_what_an_older_one_wrote(tmp_path: Path, version: str, plain: Plain) -> None:
    theirs, ours = plainly(plain, tmp_path / "plain"), tmp_path / "ours"
    file = find_checkpoint(theirs)
    checkpoint = loaded(file)
    as_lightning_1(checkpoint, version)
    torch.save(checkpoint, file)
    said = attempt(partial(go_on, Toy(), ours, theirs), ours)
    assert f"of Lightning {version}" in said
    assert trained(ours) == remaining(checkpoint["global_step"])
    assert logged_steps(ours) == list(range(checkpoint["global_step"] + 1, STEPS + 1))


@pytest.mark.parametrize(("world_size", "step"), [(1, 4), (2, 4), (1, BATCHES)])
def test_its_own_checkpoint_wins_and_resumes_exactly(tmp_path: Path, world_size: int, step: int) -> None:
    theirs = plainly(Plain(batch_ends=(step - 1,), plugin=True), tmp_path / "plain")
    untouched, stopped = tmp_path / "untouched", tmp_path / "stopped"
    attempt(partial(go_on, Toy(), untouched, theirs), untouched, world_size=world_size)
    starts = [loaded(untouched / f"started-{rank}.pt") for rank in range(world_size)]
    assert all(differences(starts[0], start) == [] for start in starts)
    interrupted = Toy(at=9, signal=signal.SIGTERM, rank=world_size - 1)
    attempt(partial(go_on, interrupted, stopped, theirs), stopped, world_size=world_size)
    assert verdict(stopped, 0)["outcome"] == "saved"
    shutil.rmtree(theirs)  # it is needed once
    attempt(partial(go_on, Toy(), stopped, theirs), stopped, 1, world_size=world_size)
    steps = [loaded(run / "started-0.pt")["step"] for run in (untouched, stopped)]
    assert steps == [step, verdict(stopped, 0)["step"]]
    assert steps[1] > step
    assert differences(loaded(untouched / "final.pt"), loaded(stopped / "final.pt")) == []
    assert trained(stopped) == trained(untouched) == remaining(step)
    assert (stopped / "metrics.csv").read_text() == (untouched / "metrics.csv").read_text()


def test_a_checkpoint_of_another_run_of_ours_keeps_its_epoch_means(tmp_path: Path) -> None:
    theirs = plainly(Plain(batch_ends=(3,)), tmp_path / "plain")
    first, second, whole = tmp_path / "first", tmp_path / "second", tmp_path / "whole"
    attempt(partial(go_on, Toy(), whole, theirs), whole)
    attempt(partial(go_on, Toy(at=12), first, theirs), first)
    said = attempt(partial(go_on, Toy(), second, first / "checkpoints"), second)
    assert "Not carried over" not in said
    assert differences(loaded(whole / "final.pt"), loaded(second / "final.pt")) == []
    rows = [(run / "metrics.csv").read_text().splitlines()[1:] for run in (whole, second)]
    assert rows[1] == [row for row in rows[0] if int(row.split(",")[0]) > verdict(first, 0)["step"]]


def refused(body: Callable[[], object], run_dir: Path, *, world_size: int = 1) -> str:
    """It ends by itself, with a verdict, and has made no step."""
    codes = run_ranks(body, run_dir, world_size=world_size, attempt=0)
    assert 0 not in codes, outputs(run_dir, 0)
    said = verdict(run_dir, 0)
    assert (said["outcome"], said["reason"]) == ("failed", "checkpoint_failure"), said
    assert not (run_dir / "steps.txt").exists()
    assert list((run_dir / "checkpoints").glob("step-*")) == []
    return str(said["message"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_missing_file_is_no_fresh_start(tmp_path: Path, world_size: int) -> None:
    said = refused(partial(go_on, Toy(), tmp_path, tmp_path / "gone.ckpt"), tmp_path, world_size=world_size)
    assert "there is no such file" in said


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_file_is_no_fresh_start(tmp_path: Path, damage: str) -> None:
    theirs, ours = plainly(Plain(batch_ends=(3,)), tmp_path / "plain"), tmp_path / "ours"
    file = theirs / "hpc_ckpt_1.ckpt"
    content = bytearray(file.read_bytes())
    value = loaded(file)["state_dict"]["net.0.weight"].numpy().tobytes()
    content[content.index(value)] ^= 1
    damaged = {"cut": content[: len(content) // 2], "flipped": content, "empty": b"", "text": b"hello"}[damage]
    file.write_bytes(damaged)
    said = refused(partial(go_on, Toy(), ours, file), ours)
    assert ("is damaged" if damage == "flipped" else "cannot be loaded") in said


def test_weights_alone_are_refused(tmp_path: Path) -> None:
    theirs, ours = plainly(Plain(last=True, weights_only=True), tmp_path / "plain"), tmp_path / "ours"
    assert "holds weights only" in refused(partial(go_on, Toy(), ours, theirs), ours)


def test_a_trainer_that_does_not_load_it_is_told(tmp_path: Path) -> None:
    theirs, ours = plainly(Plain(last=True), tmp_path / "plain"), tmp_path / "ours"
    assert "did not load" in refused(partial(go_on, Toy(), ours, theirs, pass_on=False), ours)


def test_a_position_beyond_the_epoch_is_refused(tmp_path: Path) -> None:
    theirs, ours = plainly(Plain(batch_ends=(6,)), tmp_path / "plain"), tmp_path / "ours"
    said = refused(partial(go_on, Toy(), ours, theirs, batch_size=20), ours)
    assert "saved after 7 batches of an epoch that has 5 here" in said

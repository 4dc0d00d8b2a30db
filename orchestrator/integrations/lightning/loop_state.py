"""One canonical form of Lightning's saved loop state: "this optimizer step is wholly done", plus "a validation is due".

Lightning's counters mean different things at different save points, and its resume code guesses which from their
differences (docs/exact-resume.md, section 5). So the counters are rewritten at every save; names of Lightning's source
files are abbreviated as there: FL fit_loop, TEL training_epoch_loop, EL evaluation_loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from lightning.pytorch import Trainer


class Validation(Enum):
    """What the step at which we save has to do with validation."""

    NOT_DUE = auto()
    DONE = auto()
    PENDING = auto()  # due, but not (wholly) run: it must run in full after the resume


@dataclass(frozen=True)
class Boundary:
    """A point between two steps, seen independently of the hook it is reached from.

    `batches` of the open epoch are done (None: between two epochs); `stepped` is Lightning's number for the next row.
    """

    batches: int | None
    is_last_batch: bool
    stepped: int
    validation: Validation
    accumulating: bool


def epoch_is_open(trainer: Trainer) -> bool:
    """True from an epoch's start until its batches are used up and its end has begun."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return bool(progress.started > progress.processed)


def position(trainer: Trainer) -> tuple[int, int]:
    """(epoch, batches of it that are done): where a sampler has to go on. Valid as soon as the loops are restored."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batch: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return epoch.processed, batch.processed if epoch_is_open(trainer) else 0


def boundary(trainer: Trainer, *, validation_given_up: bool) -> Boundary:
    """Where the live trainer stands, at any hook from which a checkpoint may be saved."""
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    current: Any = progress.current
    stepped = loop._batches_that_stepped
    if not epoch_is_open(trainer) or trainer.fit_loop._data_fetcher is None:
        return Boundary(None, progress.is_last_batch, stepped, Validation.NOT_DUE, accumulating=False)
    next_has_begun = current.ready > current.processed  # on_train_batch_start of the following batch
    in_batch_end = current.processed > current.completed  # on_train_batch_end
    due, accumulating = _looking_back(trainer, next_has_begun)
    if in_batch_end or trainer.validating or validation_given_up:
        stepped += not accumulating  # TEL counts the step only after its validation
    unfinished = in_batch_end or validation_given_up
    return Boundary(
        batches=current.processed,
        is_last_batch=progress.is_last_batch and not next_has_begun,
        stepped=stepped,
        validation=Validation.NOT_DUE if not due else Validation.PENDING if unfinished else Validation.DONE,
        accumulating=accumulating,
    )


def _looking_back(trainer: Trainer, next_has_begun: bool) -> tuple[bool, bool]:
    """(was a validation due, were gradients left accumulating) after the last batch that is done."""
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    was_last = progress.is_last_batch
    if next_has_begun:  # Lightning's questions are about the batch that is `ready`: ask them of the one before
        progress.current.ready -= 1
        progress.total.ready -= 1
        progress.is_last_batch = False
    try:
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        return loop._should_check_val_fx(fetcher), loop._should_accumulate()
    finally:
        if next_has_begun:
            progress.current.ready += 1
            progress.total.ready += 1
            progress.is_last_batch = was_last


def canonical_fit_loop(state: dict[str, Any], at: Boundary) -> dict[str, Any]:
    """`checkpoint["loops"]["fit_loop"]` rewritten so that Lightning resumes right at `at`. Pure."""
    if at.batches is None:
        return {**state, "epoch_progress": _between_epochs(state["epoch_progress"])}
    fixed = dict(state)
    batch = state["epoch_loop.batch_progress"]
    fixed["epoch_loop.batch_progress"] = {
        **batch,
        "total": _all_equal(batch["total"], batch["total"]["processed"]),
        "current": _all_equal(batch["current"], at.batches),
        "is_last_batch": at.is_last_batch,
    }
    stepped = at.stepped
    if at.validation is not Validation.NOT_DUE and not at.accumulating:
        stepped -= 1  # the resume goes through TEL.on_advance_end of this step once more, which counts it
    fixed["epoch_loop.state_dict"] = {**state["epoch_loop.state_dict"], "_batches_that_stepped": stepped}
    if at.validation is Validation.PENDING:
        # reads as "killed in the first validation batch" (EL.update_restart_stage): the resume runs it in full
        started = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        fixed["epoch_loop.val_loop.batch_progress"] = {
            "total": started,
            "current": dict.fromkeys(started, 0),
            "is_last_batch": False,
        }
    return fixed


def adopt_fit_loop(state: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, int]]:
    """The loop state of a plain Trainer in the canonical form, and its position. Pure.

    Lightning's own reading leaves out the end of an epoch that was saved in the hook of its last batch, and counts a
    step too many after a save in mid-step.
    """
    epoch, batch = state["epoch_progress"]["current"], state["epoch_loop.batch_progress"]
    if (
        epoch["completed"] > epoch["processed"]
    ):  # Lightning's migration of 1.5 and older sets the one and reads the other
        epoch = _all_equal(epoch, epoch["completed"])
        state = {**state, "epoch_progress": {"total": epoch, "current": epoch}}
    done = batch["current"]["processed"] if epoch["started"] > epoch["processed"] else None
    next_has_begun = batch["current"]["ready"] > batch["current"]["processed"]
    at = Boundary(
        batches=done,
        is_last_batch=batch["is_last_batch"] and not next_has_begun,
        stepped=state["epoch_loop.state_dict"].get("_batches_that_stepped", 0),  # see count_steps
        validation=Validation.NOT_DUE,
        accumulating=False,
    )
    return canonical_fit_loop(state, at), (epoch["processed"], done or 0)


def count_steps(trainer: Trainer) -> None:
    """Number log rows by the optimizer steps done, after `adopt_fit_loop`; for on_train_start.

    Whether a validation was due is only known now: then the resume counts its step once more.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    counted_again = epoch_is_open(trainer) and loop._should_check_val_fx(fetcher) and not loop._should_accumulate()
    loop._batches_that_stepped = trainer.global_step - counted_again


def _all_equal(tracker: dict[str, int], value: int) -> dict[str, int]:
    return dict.fromkeys(tracker, value)


def _between_epochs(progress: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """All counters at the number of epochs whose batches are done."""
    return {part: _all_equal(tracker, tracker["processed"]) for part, tracker in progress.items()}


def forget_finished_epoch(trainer: Trainer) -> None:
    """With `max_steps` Lightning takes a checkpoint between two epochs for one in mid-epoch (FL.restarting) and runs an
    empty epoch, after which all epoch numbers, and with them the sample order, are off by one. For on_train_start."""
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if epoch.restarting and not epoch_is_open(trainer):
        for loop in (fit, epoch, epoch.val_loop):
            loop._restarting = False
            loop.reset_restart_stage()

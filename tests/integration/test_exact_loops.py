"""The cases in which Lightning's own resume goes wrong (docs/exact-resume.md, section 5): each must be exact here.

An exact run ends with the same weights, optimizer state and metrics.csv as the run that nobody touched, bit for bit,
and after a signal it executes no training step twice.
"""

from __future__ import annotations

import json
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint import open_store
from orchestrator.paths import RunPaths
from orchestrator.registry import iter_metrics, read_events
from tests.integration.forked import outputs, run_ranks
from tests.integration.toy import BEFORE_THE_FIRST_STEP, Toy, train, verdict

pytestmark = pytest.mark.slow

Reference = Callable[[Toy, int], Path]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The untouched run of given options and world size; run once for each."""

    @cache
    def untouched(toy: Toy, world_size: int) -> Path:
        run_dir = tmp_path_factory.mktemp("reference")
        codes = run_ranks(partial(train, toy, run_dir), run_dir, world_size=world_size, attempt=0)
        assert set(codes) == {0}, outputs(run_dir, 0)
        return run_dir

    return untouched


def attempt(toy: Toy, run_dir: Path, number: int, *, world_size: int = 1) -> list[int]:
    return run_ranks(partial(train, toy, run_dir), run_dir, world_size=world_size, attempt=number)


def interrupted(toy: Toy, run_dir: Path, stops: list[Toy], *, world_size: int = 1) -> None:
    """One attempt for each of `stops`, each stopped and saved, then one to the end."""
    for number, stop in enumerate(stops):
        codes = attempt(stop, run_dir, number, world_size=world_size)
        assert set(codes) == {0}, outputs(run_dir, number)
        assert verdict(run_dir, number)["outcome"] == "saved", outputs(run_dir, number)
    codes = attempt(toy, run_dir, len(stops), world_size=world_size)
    assert set(codes) == {0}, outputs(run_dir, len(stops))
    assert verdict(run_dir, len(stops))["outcome"] == "completed"


def differences(expected: Any, actual: Any, path: str = "") -> list[str]:
    if isinstance(expected, dict):
        if expected.keys() != actual.keys():
            return [f"{path}: keys differ"]
        return [line for key in expected for line in differences(expected[key], actual[key], f"{path}/{key}")]
    if isinstance(expected, list | tuple):
        pairs = zip(expected, actual, strict=True)
        return [line for index, (a, b) in enumerate(pairs) for line in differences(a, b, f"{path}/{index}")]
    same = torch.equal(expected, actual) if isinstance(expected, torch.Tensor) else expected == actual
    return [] if same else [path]


def assert_exact(expected: Path, actual: Path, *, repeated: bool = False) -> None:
    finals = [torch.load(run / "final.pt", weights_only=True) for run in (expected, actual)]
    assert differences(*finals) == []
    assert (actual / "metrics.csv").read_text().splitlines() == (expected / "metrics.csv").read_text().splitlines()
    done = [Counter((run / "steps.txt").read_text().splitlines()) for run in (expected, actual)]
    assert set(done[1]) == set(done[0])  # validations included
    twice = [line for line, count in done[1].items() if line.startswith("train") and count != done[0][line]]
    assert repeated or not twice, "a training step was executed twice"


@pytest.mark.parametrize("at", [0, 3, 7, 8, 12])  # first, middle, last of an epoch, first of the next, middle
def test_a_stop_anywhere_in_an_epoch(reference: Reference, tmp_path: Path, at: int) -> None:
    toy = Toy()
    interrupted(toy, tmp_path, [replace(toy, at=at)])
    assert_exact(reference(toy, 1), tmp_path)


@pytest.mark.parametrize("world_size", [1, 2])
def test_checkpoints_know_what_was_measured_when_they_were_saved(reference: Reference, world_size: int) -> None:
    run_dir = reference(Toy(validate_every=5), world_size)
    measured: dict[tuple[str, int], float] = {}
    for row in iter_metrics(RunPaths(run_dir).metrics):
        measured[row.name, row.step] = row.value
    manifests = open_store(str(RunPaths(run_dir).checkpoints)).manifests()
    assert len(manifests) >= 2
    for manifest in manifests:
        validated = max(step for name, step in measured if name == "val_loss" and step <= manifest.step)
        assert manifest.metrics["val_loss"] == measured["val_loss", validated]
        assert manifest.metrics["loss_step"] == measured["loss_step", manifest.step]


def test_a_signal_before_the_first_step_waits_for_one(reference: Reference, tmp_path: Path) -> None:
    toy = Toy()
    interrupted(toy, tmp_path, [replace(toy, at=BEFORE_THE_FIRST_STEP)] * 2)  # each attempt makes progress
    assert [verdict(tmp_path, number)["step"] for number in (0, 1)] == [1, 2]
    assert_exact(reference(toy, 1), tmp_path)


def test_three_stops_with_workers_whose_number_changes(reference: Reference, tmp_path: Path) -> None:
    toy = Toy()
    stops = [Toy(at=2, workers=2), Toy(at=5, workers=0, signal=signal.SIGTERM), Toy(at=17, workers=1)]
    interrupted(Toy(workers=2), tmp_path, stops)
    assert_exact(reference(toy, 1), tmp_path)


@pytest.mark.parametrize("at", [3, 4])  # a validation is due after batch 4: before it, and at it
def test_a_stop_near_a_validation_within_the_epoch(reference: Reference, tmp_path: Path, at: int) -> None:
    toy = Toy(validate_every=5)
    interrupted(toy, tmp_path, [replace(toy, at=at)])
    assert_exact(reference(toy, 1), tmp_path)


@pytest.mark.parametrize(("at", "batch"), [(4, 1), (4, 4), (7, 2)])  # its middle, its last batch, at the epoch's end
def test_a_validation_is_given_up_and_run_again_in_full(
    reference: Reference, tmp_path: Path, at: int, batch: int
) -> None:
    toy = Toy(validate_every=5) if at == 4 else Toy()
    interrupted(toy, tmp_path, [replace(toy, at=at, at_validation_batch=batch)])
    assert_exact(reference(toy, 1), tmp_path)


@pytest.mark.parametrize("at", [2, 3, 6])  # inside an accumulation window, at its end, in the last one
def test_a_stop_waits_for_the_optimizer_step(reference: Reference, tmp_path: Path, at: int) -> None:
    toy = Toy(accumulate=2)
    interrupted(toy, tmp_path, [replace(toy, at=at)])
    assert_exact(reference(toy, 1), tmp_path)


@pytest.mark.parametrize("at", [4, 7])
def test_runs_limited_by_steps_get_no_phantom_epoch(reference: Reference, tmp_path: Path, at: int) -> None:
    toy = Toy(max_steps=20)
    interrupted(toy, tmp_path, [replace(toy, at=at)])
    assert_exact(reference(toy, 1), tmp_path)


@pytest.mark.parametrize("at", [6, 11, 17])
def test_after_a_kill_at_most_the_steps_since_the_last_save_are_repeated(
    reference: Reference, tmp_path: Path, at: int
) -> None:
    toy = Toy(validate_every=5, every_steps=5, workers=1)
    assert attempt(replace(toy, at=at, signal=signal.SIGKILL), tmp_path, 0) == [-signal.SIGKILL]
    assert attempt(toy, tmp_path, 1) == [0], outputs(tmp_path, 1)
    assert_exact(reference(toy, 1), tmp_path, repeated=True)
    steps = Counter((tmp_path / "steps.txt").read_text().splitlines())
    assert sum(count - 1 for line, count in steps.items() if "train" in line) <= 5


@pytest.mark.parametrize(("at", "validate_every"), [(3, None), (4, 5), (7, None), (15, None)])
def test_a_checkpoint_saved_in_a_hook_by_others_is_exact_too(
    reference: Reference, tmp_path: Path, at: int, validate_every: int | None
) -> None:
    toy = Toy(validate_every=validate_every, validation=at != 15, queue_in_hook=False)
    assert attempt(replace(toy, in_hook_save=at), tmp_path, 0) == [-signal.SIGKILL]
    resumed = replace(toy, start_from=str(tmp_path / "in_hook.ckpt"))
    assert attempt(resumed, tmp_path, 1) == [0], outputs(tmp_path, 1)
    finals = [torch.load(run / "final.pt", weights_only=True) for run in (reference(toy, 1), tmp_path)]
    assert differences(*finals) == []
    done = [set((run / "steps.txt").read_text().splitlines()) for run in (reference(toy, 1), tmp_path)]
    assert done[0] == done[1]  # a validation that was due is not skipped


def test_rank_zeros_clock_makes_all_ranks_save(reference: Reference, tmp_path: Path) -> None:
    toy = Toy(every_minutes=1e-9, every_epochs=None)
    killed = replace(toy, at=6, signal=signal.SIGKILL)
    assert attempt(killed, tmp_path, 0, world_size=2)[0] == -signal.SIGKILL  # the other follows, killed or by itself
    assert attempt(toy, tmp_path, 1, world_size=2) == [0, 0], outputs(tmp_path, 1)
    assert_exact(reference(Toy(), 2), tmp_path, repeated=True)
    resumed = [event["step"] for event in read_events(RunPaths(tmp_path)) if event["event"] == "resumed"]
    assert resumed in ([5], [6])


def test_a_resume_saves_nothing_that_is_saved_already(tmp_path: Path) -> None:
    attempt(replace(Toy(), at=7), tmp_path, 0)
    attempt(replace(Toy(), at=9), tmp_path, 1)
    saved = [event["step"] for event in read_events(RunPaths(tmp_path)) if event["event"] == "checkpoint_committed"]
    assert len(saved) == len(set(saved)), saved


def test_a_signal_to_one_rank_stops_all_at_the_same_step(reference: Reference, tmp_path: Path) -> None:
    toy = Toy(validate_every=5, workers=1)
    stops = [replace(toy, at=2, rank=1), replace(toy, at=4, rank=1, at_validation_batch=0), replace(toy, at=15, rank=0)]
    interrupted(toy, tmp_path, stops, world_size=2)
    assert_exact(reference(toy, 2), tmp_path)


@pytest.mark.parametrize("world_size", [1, 2])
def test_saves_beside_the_training_are_exact(reference: Reference, tmp_path: Path, world_size: int) -> None:
    toy = Toy(validate_every=5, every_steps=2, asynchronous=True, slow_disk_s=0.05, workers=1)
    stops = [replace(toy, at=2), replace(toy, at=6), replace(toy, at=9, rank=world_size - 1), replace(toy, at=15)]
    interrupted(toy, tmp_path, stops, world_size=world_size)
    assert_exact(reference(Toy(validate_every=5), world_size), tmp_path)
    verified = [event["step"] for event in read_events(RunPaths(tmp_path)) if event["event"] == "checkpoint_committed"]
    assert {verdict(tmp_path, number)["step"] for number in range(5)} <= set(verified)


def test_a_kill_during_a_save_beside_the_training_costs_that_save(reference: Reference, tmp_path: Path) -> None:
    toy = Toy(every_steps=3, every_epochs=None, asynchronous=True)
    stuck = replace(toy, at=7, slow_disk_s=30.0, signal=signal.SIGKILL)  # step 6 is in flight when step 8 is killed
    assert attempt(replace(toy, at=3), tmp_path, 0) == [0]
    killed = attempt(replace(stuck, every_steps=6), tmp_path, 1)
    assert killed == [-signal.SIGKILL], outputs(tmp_path, 1)
    assert attempt(toy, tmp_path, 2) == [0], outputs(tmp_path, 2)
    resumed = [event["step"] for event in read_events(RunPaths(tmp_path)) if event["event"] == "resumed"]
    assert len(resumed) == 2
    assert resumed[0] == resumed[1] < 6
    assert_exact(reference(Toy(), 1), tmp_path, repeated=True)


def _with_small_files(toy: Toy, run_dir: Path) -> None:
    """As on a full disk: no file can grow beyond what everything but a checkpoint needs."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    train(toy, run_dir)


@pytest.mark.parametrize(
    "toy",
    [Toy(every_steps=3), Toy(every_epochs=None, at=4), Toy(every_steps=3, asynchronous=True)],
    ids=["periodic", "on a signal", "async"],
)
def test_a_save_that_fails_ends_the_run_and_says_why(tmp_path: Path, toy: Toy) -> None:
    attempt(replace(Toy(), at=1), tmp_path, 0, world_size=2)
    codes = run_ranks(partial(_with_small_files, toy, tmp_path), tmp_path, world_size=2, attempt=1)
    assert codes[0] == 1, outputs(tmp_path, 1)
    said = verdict(tmp_path, 1)
    assert (said["outcome"], said["reason"]) == ("failed", "checkpoint_failure")
    assert "too large" in said["message"]
    assert not (tmp_path / "verdict-001.rank1.json").exists()  # what broke there is the connection to rank 0
    assert attempt(Toy(), tmp_path, 2, world_size=2) == [0, 0], outputs(tmp_path, 2)


def test_a_rank_that_fails_leaves_its_own_verdict(tmp_path: Path) -> None:
    codes = attempt(Toy(at=3, rank=1, signal=0), tmp_path, 0, world_size=2)
    assert codes[1] == 1, outputs(tmp_path, 0)
    said = json.loads((tmp_path / "verdict-000.rank1.json").read_text())
    assert (said["outcome"], said["message"]) == ("failed", "ArithmeticError: on purpose")


def test_the_deadline_ends_ranks_that_hang(tmp_path: Path) -> None:
    """Rank 1 never comes back from its step; rank 0 waits for it in a collective."""
    (tmp_path / "deadline-0.json").write_text(json.dumps({"deadline": time.time() + 12}))
    codes = attempt(Toy(at=3, rank=1, signal=-1), tmp_path, 0, world_size=2)
    assert codes == [0, 0], outputs(tmp_path, 0)
    said = verdict(tmp_path, 0)
    assert (said["outcome"], said["reason"]) == ("unsaved", "deadline_missed")
    assert "no checkpoint yet" in said["message"]
    assert not (tmp_path / "verdict-000.rank1.json").exists()


def test_three_ranks_sum_gradients_in_the_same_order_after_a_restart(reference: Reference, tmp_path: Path) -> None:
    toy = Toy(deep=True)
    interrupted(toy, tmp_path, [replace(toy, at=2, rank=2), replace(toy, at=11, rank=1)], world_size=3)
    assert_exact(reference(toy, 3), tmp_path)

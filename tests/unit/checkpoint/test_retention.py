"""Which checkpoints stay, whatever was saved."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoint import Best, FileEntry, Manifest, Retention, kept
from orchestrator.checkpoint.retention import best, milestones


def saved(step: int, loss: float | None = None, *, epoch: int = 1, sequence: int = 0) -> Manifest:
    return Manifest(
        step=step,
        epoch=0,
        attempt=epoch - 1,
        fence_epoch=epoch,
        world_size=1,
        nonce=f"{epoch:04x}{sequence:04x}",
        files=(FileEntry("x", 1, "0" * 64),),
        code_hash=None,
        image=None,
        committed_at=0.0,
        sequence=sequence,
        metrics={} if loss is None else {"loss": loss},
    )


def left(manifests: list[Manifest], retention: Retention) -> list[int]:
    names = kept(manifests, retention)
    return sorted(m.step for m in manifests if m.name in names)


losses = st.one_of(st.none(), st.floats(allow_nan=True), st.sampled_from([0.0, 1.0, 2.0]))
histories = st.dictionaries(st.integers(0, 400), losses, max_size=25).map(
    lambda of: [saved(step, loss) for step, loss in of.items()]
)
retentions = st.builds(
    Retention,
    keep_last=st.integers(0, 6),
    keep_every=st.none() | st.integers(1, 100),
    keep_best=st.none() | st.builds(Best, st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 4)),
)


@given(histories, retentions)
def test_the_newest_two_always_stay_and_what_stays_was_there(manifests: list[Manifest], retention: Retention) -> None:
    names = kept(manifests, retention)
    newest = sorted(manifests, key=lambda m: m.rank, reverse=True)
    assert {m.name for m in newest[: max(2, retention.keep_last)]} <= names <= {m.name for m in manifests}


@given(histories, retentions)
def test_asking_again_about_what_stayed_removes_nothing(manifests: list[Manifest], retention: Retention) -> None:
    names = kept(manifests, retention)
    assert kept([m for m in manifests if m.name in names], retention) == names


@given(histories, retentions)
def test_collecting_after_each_save_keeps_what_collecting_once_keeps(
    manifests: list[Manifest], retention: Retention
) -> None:
    there: list[Manifest] = []
    for manifest in sorted(manifests, key=lambda m: m.rank):
        there.append(manifest)
        names = kept(there, retention)
        there = [m for m in there if m.name in names]
    assert {m.name for m in there} == kept(manifests, retention)


@given(histories, st.integers(1, 100))
def test_of_every_so_many_steps_the_first_stays(manifests: list[Manifest], every: int) -> None:
    chosen = {m.step for m in milestones(manifests, every)}
    for multiple in range(every, 401, every):
        after = [m.step for m in manifests if m.step >= multiple]
        if after:
            assert min(after) in chosen
    assert len(chosen) == len({step // every for step in chosen})


@given(histories, st.sampled_from(["min", "max"]), st.integers(1, 4))
def test_no_better_one_is_left_out(manifests: list[Manifest], mode: str, k: int) -> None:
    chosen = best(manifests, Best("loss", mode, k))
    rivals = [m for m in manifests if math.isfinite(m.metrics.get("loss", math.nan))]
    assert len(chosen) == min(k, len(rivals))
    better = min if mode == "min" else max
    for out in (m for m in rivals if m not in chosen):
        worst = better([-m.metrics["loss"] for m in chosen])
        assert better(-worst, out.metrics["loss"]) == -worst


@pytest.mark.parametrize(
    ("retention", "steps"),
    [
        (Retention(keep_last=2), [5, 6]),
        (Retention(keep_last=2, keep_every=2), [2, 4, 5, 6]),
        (Retention(keep_last=0, keep_best=Best("loss", "min", 1)), [2, 5, 6]),
        (Retention(keep_last=0, keep_best=Best("loss", "max", 2)), [1, 4, 5, 6]),
        (Retention(keep_last=0, keep_best=Best("accuracy", "max", 2)), [5, 6]),
    ],
)
def test_each_rule(retention: Retention, steps: list[int]) -> None:
    found = {1: 9.0, 2: 1.0, 3: 1.0, 4: 8.0, 5: math.inf, 6: 2.0}
    assert left([saved(step, loss) for step, loss in found.items()], retention) == steps


def test_of_two_saves_of_a_milestone_the_newer_stays() -> None:
    twice = [saved(10), saved(10, sequence=1), saved(11), saved(12), saved(13)]
    assert kept(twice, Retention(2, keep_every=10)) == {twice[1].name, twice[3].name, twice[4].name}


def test_a_plan_of_an_older_version_keeps_the_newest() -> None:
    assert Retention.from_plan({"keep_last": 5, "uri": "/x"}) == Retention(5)
    plan = {"keep_last": 2, "keep_every": 9, "keep_best": {"metric": "a", "mode": "max", "k": 3}}
    assert Retention.from_plan(plan) == Retention(2, 9, Best("a", "max", 3))

"""The lineage rule against a tiny reference model, and against what it is for: one consistent history."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.checkpoint.lineage import Fence, Lineage, fence_name, parse_fence, parse_fence_name

FENCES = st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 6), st.booleans()), max_size=6).map(
    lambda rows: [Fence(n + 1, attempt, base, withdrawn=gone) for n, (attempt, base, gone) in enumerate(rows)]
)


def counts(fences: list[Fence], fence: Fence) -> bool:
    """The rule as the documentation words it."""
    return not fence.withdrawn and not any(
        earlier.epoch < fence.epoch and earlier.attempt > fence.attempt and counts(fences, earlier)
        for earlier in fences
    )


def live(fences: list[Fence], epoch: int, step: int) -> bool:
    own = [fence for fence in fences if fence.epoch == epoch]
    later = [fence for fence in fences if fence.epoch > epoch and counts(fences, fence)]
    return all(counts(fences, f) for f in own) and all(fence.base_step >= step for fence in later)


@given(FENCES, st.integers(0, 7), st.integers(0, 7), st.randoms())
def test_matches_the_reference_model(fences: list[Fence], epoch: int, step: int, random: object) -> None:
    shuffled = list(fences)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    lineage = Lineage(shuffled)
    assert lineage.is_live(epoch, step) == live(fences, epoch, step)
    if not lineage.is_live(epoch, step):
        assert lineage.explain(epoch, step)
    bound = lineage.bound(epoch)
    if not lineage.is_void(epoch):
        assert lineage.is_live(epoch, step) == (bound is None or step <= bound)


@given(FENCES)
def test_exactly_the_newest_epoch_that_counts_owns_the_run(fences: list[Fence]) -> None:
    lineage = Lineage(fences)
    owners = [fence for fence in fences if lineage.successor(fence) is None]
    counting = [fence for fence in fences if counts(fences, fence)]
    assert owners == counting[-1:]
    for fence in fences:
        successor = lineage.successor(fence)
        if successor is not None and counting:
            assert counts(fences, successor) or fence.withdrawn


@given(FENCES, st.data())
def test_a_damaged_fence_is_replaced_by_what_later_ones_remember(fences: list[Fence], data: st.DataObject) -> None:
    written: list[Fence] = []
    for fence in fences:  # every attempt writes down the bases it found
        written.append(replace(fence, bases=Lineage(written).bases))
    if len(written) < 2:
        return
    lost = data.draw(st.sampled_from(written[:-1]))
    if not counts(written, lost):
        return
    rest = [fence for fence in written if fence is not lost]
    damaged = Lineage(rest, damaged={lost.epoch: "unreadable"})
    assert damaged.unknown == []
    assert damaged.bases[lost.epoch] == lost.base_step


def test_an_unknown_base_bounds_nobody_until_a_manifest_remembers_it() -> None:
    lineage = Lineage([Fence(1, 0, -1)], damaged={2: "empty"})
    assert lineage.unknown == [2]
    assert lineage.is_live(1, 100)
    recovered = lineage.recovered({2: 50, 7: 1})
    assert recovered.unknown == []
    assert recovered.is_live(1, 50)
    assert not recovered.is_live(1, 51)
    assert recovered.bound(0) == -1


def test_a_damaged_fence_above_mine_still_means_that_somebody_took_over() -> None:
    mine = Fence(1, 0, -1)
    successor = Lineage([mine], damaged={2: "empty"}).successor(mine)
    assert successor is not None
    assert successor.epoch == 2


def test_a_late_start_of_an_older_attempt_changes_nothing() -> None:
    newer, late = Fence(1, attempt=1, base_step=50), Fence(2, attempt=0, base_step=10)
    lineage = Lineage([newer, late])
    assert lineage.is_live(1, 70)
    assert not lineage.is_live(2, 5)
    assert lineage.successor(newer) is None
    assert lineage.successor(late) == newer
    assert lineage.newer_attempt(0) == newer


def test_an_attempt_that_never_committed_bounds_the_older_ones() -> None:
    lineage = Lineage([Fence(1, 0, -1), Fence(2, 1, 100), Fence(3, 2, 100)])
    assert lineage.is_live(1, 100)
    assert not lineage.is_live(1, 101)
    assert lineage.is_live(3, 101)


def test_a_base_that_was_quarantined_later_leaves_the_older_ones_live() -> None:
    # Epoch 2 went on from step 120 and committed nothing; step 120 was then found damaged, so epoch 3 starts at 100.
    lineage = Lineage([Fence(1, 0, -1), Fence(2, 1, 120), Fence(3, 2, 100)])
    assert lineage.is_live(1, 100)
    assert not lineage.is_live(1, 120)
    assert not lineage.is_live(2, 130)


@dataclass(frozen=True)
class Commit:
    epoch: int
    step: int


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(["start", "commit", "late", "lose"]), st.integers(0, 5)), max_size=30))
def test_readers_see_one_consistent_history(actions: list[tuple[str, int]]) -> None:
    """Attempts start, commit, die, publish late and lose checkpoints: what is live is what the newest one came from."""
    fences: list[Fence] = []
    base_of: dict[int, Commit | None] = {}
    published: list[Commit] = []
    reached: dict[int, int] = {}

    def readable() -> list[Commit]:
        lineage = Lineage(fences)
        return sorted((c for c in published if lineage.is_live(c.epoch, c.step)), key=lambda c: (c.step, c.epoch))

    def history(epoch: int) -> set[int]:
        """Steps whose checkpoint, of whatever epoch, lies on the way to where `epoch` is."""
        base = base_of[epoch]
        before = {s for s in history(base.epoch) if s <= base.step} | {base.step} if base else set()
        return before | {c.step for c in published if c.epoch == epoch}

    for action, pick in actions:
        if action == "start" or not fences:
            newest = readable()[-1:]
            base = newest[0] if newest else None
            epoch = len(fences) + 1
            fences.append(Fence(epoch, epoch, base.step if base else -1))
            base_of[epoch], reached[epoch] = base, base.step if base else 0
        elif action == "lose" and readable():
            published.remove(readable()[-1])
        elif action != "lose":
            # "late": any attempt that was ever alive publishes, as if it had been paused since its last check
            epoch = len(fences) if action == "commit" else 1 + pick % len(fences)
            reached[epoch] += 1 + pick
            published.append(Commit(epoch, reached[epoch]))
        on_the_way = history(len(fences))
        assert {c.step for c in readable()} <= on_the_way
        own = [c for c in published if c.epoch == len(fences)]
        assert all(c in readable() for c in own)


def test_fences_read_back() -> None:
    fence = Fence(2, 1, 100, "step-x.json", "n17", 4, "abc", 1.5, False, {1: -1})
    assert parse_fence(fence.render(), epoch=2) == fence
    assert parse_fence_name(fence.file_name) == 2
    assert fence_name(12345) == "epoch-12345.json"
    assert parse_fence_name("epoch-2.json") is None
    assert parse_fence_name("epoch-0002.json.tmp") is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"7",
        b"\xff",
        b'{"epoch": 2, "attempt": 0}',
        Fence(3, 0, 1).render(),
        b'{"epoch": 2, "attempt": 0, "base_step": Infinity}',
        b'{"epoch": 2, "attempt": 0, "base_step": 1.5}',
        b'{"epoch": 2, "attempt": true, "base_step": 1}',
        b"[" * 100_000,
    ],
)
def test_damaged_fences_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"epoch-0002\.json"):
        parse_fence(data, epoch=2)

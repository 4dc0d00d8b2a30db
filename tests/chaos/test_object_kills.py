"""Attempts killed at every point of what they do in an object store, and at any time: nothing acknowledged is lost.

`ORCH_CHAOS_OBJECT_KILLS` sets how many there are in each place, `ORCH_CHAOS_PUSH_KILLS` how many of attempts that bring
in an emergency save.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.checkpoint import CheckpointName, Refuge, take_over
from tests.chaos.buckets import LARGE, PLACES, BucketRun, Place, place_called, save
from tests.chaos.kills import Kill, at, kill_plan, run_until_killed
from tests.chaos.nursery import SIZE, Nursery, committer, nursery
from tests.objects.servers import KINDS

KILLS = int(os.environ.get("ORCH_CHAOS_OBJECT_KILLS", "42"))
PUSH_KILLS = int(os.environ.get("ORCH_CHAOS_PUSH_KILLS", "24"))
KILLS_PER_RUN = 24  # who starts reads the claims of all before it
ATTEMPT_S = 2.0  # what an attempt takes for a few saves

CLAIM = [at("start"), *(at(f"fence-{what}") for what in ("directory", "create", "put", "check")), at("started")]
COMMIT = [
    at(point, nth=(1, 1, 2, 3))
    for point in (
        "check-before",
        "data-write",
        "data-piece",
        "data-upload",
        "manifest-put",
        "check-after",
        "pointer-put",
        "check-last",
        "saved",
    )
]
PARTS = [
    at("request create_multipart_upload"),
    *(at("request upload_part", nth=(part,)) for part in (1, 2, 3)),
    at("request complete_multipart_upload"),
]
GARBAGE = [
    at(f"gc-{what}", nth=(1, 1, 2, 3)) for what in ("verify", "unlink-manifest", "dirsync", "unlink-data", "sweep")
]
REQUESTS = at("request", after="started", nth=range(1, 40))
POINTS = [*CLAIM, *COMMIT, *PARTS, *GARBAGE, at("collected"), REQUESTS, REQUESTS]

# An attempt that finds an emergency save in its run directory, brings it in, trains, and leaves with one of its own.
PUSH = [
    at("request", after="adopt", nth=range(1, 10)),
    at("request put_file", after="adopt"),
    at("manifest-put"),
    at("request pipe_file", after="adopt", nth=(1, 2)),
    at("adopted"),
    at("fence-put"),
    at("fence-check"),
    *(at("refuge-remove", nth=(nth,)) for nth in (1, 2, 3)),
    at("started"),
    at("training", nth=(1, 2)),
    *(at(f"refuge-{point}") for point in ("check-before", "data-create", "data-fsync", "data-rename")),
    at("data-piece", after="refuge-data-write"),
    *(at(f"refuge-{point}") for point in ("manifest-create", "manifest-rename", "check-after", "pointer-rename")),
]
PUSH_PARTS = [
    at("request create_multipart_upload", after="adopt"),
    *(at("request upload_part", after="adopt", nth=(part,)) for part in (1, 2, 3)),
    at("request complete_multipart_upload", after="adopt"),
]


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place_called(request.param, tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture(scope="module")
def attempts() -> Iterator[Nursery]:
    with nursery() as opened:
        yield opened


def points(place: Place) -> list[Kill]:
    claimed_by = {"fence-put": "fence-link"} if place.fences_on_disk else {}
    return [point | {"at": claimed_by.get(point["at"], point["at"])} for point in POINTS]


def test_kills_at_every_point_and_at_any_time(place: Place, attempts: Nursery, tmp_path: Path) -> None:
    plan = list(kill_plan(KILLS, points(place), longest_s=ATTEMPT_S))
    for first in range(0, len(plan), KILLS_PER_RUN):
        run = BucketRun(place, place.new_bucket(), tmp_path / f"run-{first}")
        kill_attempts_of_one_run(attempts, run, plan[first : first + KILLS_PER_RUN])


def kill_attempts_of_one_run(attempts: Nursery, run: BucketRun, plan: list[Kill]) -> None:
    acknowledged = 0
    for attempt, kill in enumerate(plan):
        lanes = 1 if attempt % 2 else 10
        order = {"bucket": run.order(max_concurrency=lanes), "large": LARGE}
        child = run_until_killed(attempts, run.folder, attempt, kill, **order)
        acknowledged = max([acknowledged, *child.saved])
        found = run.find()
        newest = found.manifest.step if found else 0
        # What was committed is there, and at most the one save more whose commit had not returned yet.
        assert acknowledged <= newest <= acknowledged + 1, kill
        assert not found or found.skipped == ()  # a kill is not damage
        pointed = run.pointed()
        assert (pointed.step if pointed else 0) >= newest - 1
        acknowledged = newest
    assert_freed(run, len(plan))


def test_these_are_all_points(place: Place, tmp_path: Path) -> None:
    run = BucketRun(place, place.new_bucket(), tmp_path / "run")
    done: set[str] = set()
    store = committer.traced(run.store(), done.add)
    _, fence = take_over(store, attempt=0)
    for step in (1, 2, 3):
        save(store, fence, step, LARGE)
    store.collect_garbage(fence, keep_last=2)
    known = {point["at"] for point in points(place)}
    assert {operation for operation in done if not operation.startswith("request")} <= known
    assert known <= done | {"start", "started", "data-piece", "saved", "collected"}


def assert_freed(run: BucketRun, attempt: int) -> None:
    """What killed attempts have left goes with the next one's collection."""
    store = run.store()
    found, fence = take_over(store, attempt=attempt)
    step = found.manifest.step if found else 0
    for new in (step + 1, step + 2):
        save(store, fence, new)
    store.collect_garbage(fence, keep_last=2)
    run.assert_tidy()
    assert [manifest.step for manifest in store.manifests()] == [step + 2, step + 1]
    pointed = run.pointed()
    assert pointed is not None
    assert pointed.step == step + 2


class LeavingRun(BucketRun):
    """A run that is told to stop: its last save goes to the run directory."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.run_dir = folder / "run-dir"
        super().__init__(place, place.new_bucket(), folder, run_dir=self.run_dir)
        folder.mkdir()
        self.refuge = Refuge(self.run_dir / "checkpoints")

    def newest_of_both(self) -> int:
        """Step of what the next attempt has to go on from, wherever it lies. Changes nothing."""
        found = self.find()
        assert not found or found.skipped == ()
        listed = [each for each in self.store().inventory(waiting=self.refuge.store.medium) if each.problem is None]
        if not listed:
            return 0
        name = listed[0].name
        if not found or name != found.manifest.name:
            data = self.refuge.store.medium.local(name.data).read_bytes()
            assert committer.parse_content(data)[0] == name.step
        return name.step

    def waits(self) -> bool:
        """Whether the next attempt has something to bring in."""
        names = self.refuge.store.medium.names()
        return any(CheckpointName.parse(name, ".json") for name in names)


@pytest.mark.parametrize("place", KINDS, indirect=True)
@pytest.mark.parametrize("large", [False, True], ids=["small", "in parts"])
def test_kills_of_attempts_that_bring_in_an_emergency_save(
    place: Place, attempts: Nursery, tmp_path: Path, large: bool
) -> None:
    operations = [*PUSH_PARTS, at("refuge-data-rename"), at("training")] if large else PUSH
    plan = list(kill_plan(PUSH_KILLS // 3 if large else PUSH_KILLS, operations, longest_s=ATTEMPT_S))
    for first in range(0, len(plan), KILLS_PER_RUN):
        run = LeavingRun(place, tmp_path / f"run-{first}")
        kill_leaving_attempts(attempts, run, plan[first : first + KILLS_PER_RUN], LARGE if large else SIZE)


def kill_leaving_attempts(attempts: Nursery, run: LeavingRun, plan: list[Kill], size: int) -> None:
    numbers = itertools.count()
    acknowledged = 0
    for kill in plan:
        order = {
            "bucket": run.order(max_concurrency=1),
            "saving": "beside the training",
            "run_dir": str(run.run_dir),
            "refuge": True,
            "leaves": True,
            "steps": 2,
            "size": size,
        }
        if not run.waits():
            leaver = attempts.start(run.folder, next(numbers), **order)
            leaver.wait_for("exited")
            assert leaver.status == 0
            acknowledged = max([acknowledged, *leaver.saved])
            assert run.newest_of_both() == acknowledged
            assert run.waits()
        child = run_until_killed(attempts, run.folder, next(numbers), kill, **order)
        acknowledged = max([acknowledged, *child.saved])
        newest = run.newest_of_both()
        # Two may be committed and not have returned: the one beside the training, which nobody waits for, and the last.
        assert acknowledged <= newest <= acknowledged + 2, kill
        run.pointed()
        acknowledged = newest
    last = attempts.start(run.folder, next(numbers), **order | {"leaves": False})
    last.wait_for("exited")
    assert last.status == 0
    assert run.newest() == max(last.saved) > acknowledged
    assert not run.waits()
    assert_freed(run, next(numbers))

"""Attempts killed, stopped and starved at every point of a save: the newest committed checkpoint always loads.

`ORCH_CHAOS_KILLS` and `ORCH_CHAOS_RACES` set how many. A process reads
`last.ckpt` a thousand times a second all the while.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import CheckpointName, Fence, Found, Manifest, PosixStore, stream, take_over
from orchestrator.errors import CheckpointError
from tests.chaos.kills import Kill, at, kill_plan, run_until_killed
from tests.chaos.nursery import SIZE, Nursery, committer
from tests.chaos.nursery import nursery as open_nursery

KILLS = int(os.environ.get("ORCH_CHAOS_KILLS", "150"))
RACES = int(os.environ.get("ORCH_CHAOS_RACES", "92"))
KILLS_PER_RUN = 75
DEADLINE_S = 60.0

COMMIT_POINTS = [
    "check-before",
    "data-create",
    "data-write",
    "data-piece",
    "data-fsync",
    "data-rename",
    "data-dirsync",
    "manifest-create",
    "manifest-fsync",
    "manifest-rename",
    "manifest-dirsync",
    "check-after",
    "pointer-create",
    "pointer-rename",
    "pointer-dirsync",
    "check-last",
    "saved",
]
CLAIM_POINTS = ["fence-directory", "fence-create", "fence-link", "fence-check"]
GARBAGE_POINTS = ["gc-verify", "gc-unlink-manifest", "gc-dirsync", "gc-unlink-data", "gc-sweep"]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with open_nursery() as opened:
        yield opened


@contextmanager
def polled(directory: Path) -> Iterator[None]:
    """Meanwhile a process reads `last.ckpt` a thousand times a second; only whole checkpoints may be seen."""
    command = [sys.executable, str(Path(__file__).with_name("reader.py")), str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        try:
            yield
        finally:
            output, _ = reader.communicate(timeout=DEADLINE_S)
    seen = json.loads(output)
    assert seen["torn"] == []
    assert seen["steps"] == sorted(seen["steps"])
    assert len(seen["steps"]) > 1
    assert seen["polls"] > 200 * seen["seconds"]  # what a busy machine leaves of a thousand


def load(result: Found) -> int:
    """The step whose bytes are in the checkpoint, in every file of it, which must be the one it claims."""
    states = [path for name, path in result.files.items() if name.endswith(".ckpt")]
    for path in states:
        step, _ = committer.parse_content(path.read_bytes())
        assert step == result.manifest.step
    assert len(states) == (1 + committer.SHARDS if result.manifest.sharded else 1)
    return result.manifest.step


def save(store: PosixStore, fence: Fence, step: int, attempt: int) -> Manifest:
    data = committer.content(step, attempt, SIZE)
    return store.commit(fence, lambda f: f.write(data), step=step, epoch=0, world_size=1)


def assert_tidy(store: PosixStore, fence: Fence) -> None:
    """Nothing half done of an older epoch is left, no manifest without its data and no data without its manifest."""
    names = {path.name for path in store.directory.iterdir()}
    assert not [name for name in names if name.endswith(".tmp") and f".e{fence.epoch:04d}." not in name]
    for name in filter(None, map(CheckpointName.of, names)):
        assert {name.data, name.manifest} <= names


BLOCKS = 2 * stream.BLOCK_BYTES + SIZE  # what two threads hash and write while a third one serialises
PIECES_OF_A_BLOCK = stream.BLOCK_BYTES // committer.PIECE_BYTES


def points_to_kill_at(points: list[str], nths: tuple[int, ...]) -> list[Kill]:
    return [at("start"), at("started"), *(at(point, nth=(1,) if point in CLAIM_POINTS else nths) for point in points)]


# By how the checkpoints are saved: what share of the kills, and where.
SAVING = {
    "one file": (1.0, points_to_kill_at([*CLAIM_POINTS, *COMMIT_POINTS, *GARBAGE_POINTS, "collected"], (1, 1, 2, 3))),
    "shards": (0.2, points_to_kill_at([*COMMIT_POINTS, "publish", *GARBAGE_POINTS], (1, 2, 3, 4, 5))),
    "beside the training": (0.2, points_to_kill_at([*COMMIT_POINTS, "training", *GARBAGE_POINTS], (1, 1, 2, 3))),
    "blocks": (
        0.1,
        [
            at("data-piece", nth=range(PIECES_OF_A_BLOCK, 2 * PIECES_OF_A_BLOCK, 20)),
            at("data-fsync", nth=(1, 2)),
            at("data-rename"),
            at("check-after", nth=(1, 2)),
        ],
    ),
}


@pytest.mark.parametrize("saving", SAVING)
def test_kills_at_every_point_and_at_any_time(nursery: Nursery, tmp_path: Path, saving: str) -> None:
    share, points = SAVING[saving]
    plan = list(kill_plan(round(share * KILLS), points, longest_s=0.06))
    for first in range(0, len(plan), KILLS_PER_RUN):
        kill_attempts_of_one_run(nursery, tmp_path / f"run-{first}", plan[first : first + KILLS_PER_RUN], saving)


def kill_attempts_of_one_run(nursery: Nursery, directory: Path, plan: list[Kill], saving: str) -> None:
    order: dict[str, Any] = {"saving": saving, "run_dir": f"{directory}-run"}
    if saving == "blocks":
        order = {"size": BLOCKS}
    acknowledged, killed = 0, 0
    # To read so much a thousand times a second takes more than one core.
    with nullcontext() if saving == "blocks" else polled(directory):
        for attempt, kill in enumerate(plan):
            child = run_until_killed(nursery, directory, attempt, kill, **order)
            killed += 1
            acknowledged = max([acknowledged, *child.saved])
            store = PosixStore(directory)
            result = store.find()
            newest = load(result) if result else 0
            # What was committed is there, and at most the one save more whose commit had not returned yet.
            assert acknowledged <= newest <= acknowledged + 1
            assert not result or result.skipped == ()  # a kill is not damage
            assert not result or result.manifest.sharded == (saving == "shards")
            acknowledged = newest
    assert killed == len(plan)
    store = PosixStore(directory)
    result, fence = take_over(store, attempt=killed)
    newest = result.manifest.step if result else 0
    for step in (1, 2):
        save(store, fence, newest + step, killed)
    store.collect_garbage(fence, keep_last=2)
    assert_tidy(store, fence)
    assert len(store.manifests()) == 2


def test_these_are_all_points(tmp_path: Path) -> None:
    done: set[str] = set()
    store = committer.traced(PosixStore(tmp_path), done.add)
    _, fence = take_over(store, attempt=0)
    for step in (1, 2, 3):
        save(store, fence, step, 0)
    store.collect_garbage(fence, keep_last=2)
    assert done == {*CLAIM_POINTS, *COMMIT_POINTS, *GARBAGE_POINTS} - {"data-piece", "saved"}


def race_plan(count: int) -> list[tuple[str, int]]:
    """(where the old attempt stops, in which of its saves)."""
    points = [*COMMIT_POINTS, *GARBAGE_POINTS, "collected"]
    return [(points[n % len(points)], 1 + (n // len(points) + n) % 3) for n in range(count)]


@pytest.mark.parametrize("kind", ["one newer attempt", "two newer attempts"])
def test_an_old_attempt_stopped_anywhere_does_no_harm_when_it_goes_on(
    nursery: Nursery, tmp_path: Path, kind: str
) -> None:
    for number, (point, nth) in enumerate(race_plan((RACES + 1) // 2)):
        directory = tmp_path / f"race-{number}"
        old = nursery.start(directory, 0, at=point, nth=nth, signal="SIGSTOP")
        try:
            assert old.wait_for("stopped", "exited") == "stopped", (point, nth, old.status)
            store = PosixStore(directory)
            result, fence = take_over(store, attempt=1)
            if kind == "two newer attempts":
                result, fence = take_over(store, attempt=2)  # attempt 1 never saved anything
            base = load(result) if result else 0
            assert base >= max(old.saved, default=0)
        finally:
            os.kill(old.pid, signal.SIGCONT)
        old.wait_for("exited")
        assert old.status == committer.FENCED, (point, nth)
        seen_by_reader = PosixStore(directory).find()
        assert (load(seen_by_reader) if seen_by_reader else 0) == base, (point, nth)
        for step in (base + 1, base + 2):
            manifest = save(store, fence, step, fence.attempt)
            current = PosixStore(directory).find()
            assert current is not None
            assert current.manifest == manifest, (point, nth)
            assert (directory / "last.ckpt").readlink().name == manifest.name.data
        store.collect_garbage(fence, keep_last=2)
        assert_tidy(store, fence)


def test_an_old_attempt_that_goes_on_after_the_new_ones_saves(nursery: Nursery, tmp_path: Path) -> None:
    for number, (point, nth) in enumerate(race_plan((RACES + 1) // 2)):
        directory = tmp_path / f"race-{number}"
        old = nursery.start(directory, 0, at=point, nth=nth, signal="SIGSTOP")
        try:
            assert old.wait_for("stopped", "exited") == "stopped", (point, nth, old.status)
            store = PosixStore(directory)
            result, fence = take_over(store, attempt=1)
            base = load(result) if result else 0
            save(store, fence, base + 1, 1)
            newest = save(store, fence, base + 2, 1)
            store.collect_garbage(fence, keep_last=2)
        finally:
            os.kill(old.pid, signal.SIGCONT)
        old.wait_for("exited")
        assert old.status == committer.FENCED, (point, nth)
        current = PosixStore(directory).find()
        assert current is not None
        assert current.manifest == newest, (point, nth)
        newest = save(store, fence, base + 3, 1)
        assert (directory / "last.ckpt").readlink().name == newest.name.data
        store.collect_garbage(fence, keep_last=2)
        assert_tidy(store, fence)
        current = PosixStore(directory).find()
        assert current is not None
        assert load(current) == base + 3


def test_a_file_size_limit_stops_a_save_and_harms_nothing(nursery: Nursery, tmp_path: Path) -> None:
    good = nursery.start(tmp_path, 0, steps=1)
    good.wait_for("exited")
    child = nursery.start(tmp_path, 1, file_size_limit=SIZE // 2)
    child.wait_for("exited")
    assert (child.status, child.saved) == (committer.FAILED, [])
    store = PosixStore(tmp_path)
    result, fence = take_over(store, attempt=2)
    assert result is not None
    assert load(result) == 1
    assert_tidy(store, fence)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "orch-chaos", str(disk)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"user: mounting a small disk needs root: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    """ENOSPC at every size of what is left: told, taken back, and saved again once there is room."""
    directory = small_disk / "checkpoints"
    store = PosixStore(directory)
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1, 0)
    filler = small_disk / "filler"
    step = 1
    for left in range(0, 160_000, 8_192):
        filler.unlink(missing_ok=True)
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        filler.write_bytes(b"\0" * (free - left))
        before = {path.name for path in directory.iterdir()}
        try:
            save(store, fence, step + 1, 0)
            step += 1
        except CheckpointError as error:
            assert "ENOSPC" in error.message
            assert "MiB are free" in (error.hint or "")
            assert {path.name for path in directory.iterdir()} == before
        result = PosixStore(directory).find()
        assert result is not None
        assert load(result) == step
        assert result.skipped == ()
        store.collect_garbage(fence, keep_last=2)
    assert step > 1  # with 160 kB left it fits


def test_a_disk_that_became_read_only(small_disk: Path) -> None:
    directory = small_disk / "checkpoints"
    store = PosixStore(directory)
    _, fence = take_over(store, attempt=0)
    for step in (1, 2):
        manifest = save(store, fence, step, 0)
    manifest.path.write_bytes(b"damaged")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="EROFS"):
        save(store, fence, 3, 0)
    with pytest.raises(CheckpointError, match="EROFS"):
        take_over(PosixStore(directory), attempt=1)
    result = PosixStore(directory).find()  # reading goes on, past the damaged one that cannot be set aside
    assert result is not None
    assert load(result) == 1
    assert "could not be set aside" in result.skipped[0].reason

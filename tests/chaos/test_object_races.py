"""Old attempts stopped between any two requests of a save, and continued when a newer one owns the run: on S3 servers.

`ORCH_CHAOS_OBJECT_RACES` sets how many there are on each server, half of them for each moment.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import Fence, Manifest, take_over
from orchestrator.checkpoint.objects import ObjectStore
from tests.chaos.nursery import SIZE, Nursery, committer, nursery
from tests.objects.servers import KINDS, Server, serving

RACES = int(os.environ.get("ORCH_CHAOS_OBJECT_RACES", "26"))  # every point at both moments
POINTS = [
    "check-before",
    "data-write",
    "data-piece",
    "data-upload",
    "manifest-put",
    "check-after",
    "pointer-put",
    "check-last",
    "saved",
    "gc-verify",
    "gc-unlink-manifest",
    "gc-unlink-data",
    "gc-sweep",
]


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(request.param, tmp_path_factory.mktemp(request.param)) as running:
        yield running


@pytest.fixture(scope="module")
def attempts() -> Iterator[Nursery]:
    with nursery(120.0 + 10 * RACES) as opened:
        yield opened


def plan() -> list[tuple[str, int]]:
    """(where the old attempt stops, in which of its saves)."""
    return [(POINTS[n % len(POINTS)], 1 + (n // len(POINTS) + n) % 3) for n in range((RACES + 1) // 2)]


class Race:
    """One run in a bucket, its old attempt stopped at a point of a save."""

    def __init__(self, server: Server, attempts: Nursery, scratch: Path, bucket: str, point: str, nth: int) -> None:
        self.url = f"s3://{bucket}/{scratch.name}"
        # One client for all stores of this process: to make one takes longer than most of a race.
        self.options: dict[str, Any] = {**server.storage_options, "skip_instance_cache": False}
        self.scratch = scratch
        order = {"url": self.url, "options": server.storage_options, "scratch": str(scratch / "old")}
        self.old = attempts.start(scratch, 0, bucket=order, at=point, nth=nth, signal="SIGSTOP", steps=8)

    def store(self) -> ObjectStore:
        return ObjectStore(self.url, storage_options=self.options, scratch=self.scratch / "new")

    def go_on(self) -> None:
        os.kill(self.old.pid, signal.SIGCONT)
        self.old.wait_for("exited")

    def newest(self) -> int:
        """Step of the checkpoint that a reader takes; its bytes are what it claims."""
        found = self.store().find()
        if found is None:
            return 0
        step, _ = committer.parse_content(found.path.read_bytes())
        assert step == found.manifest.step
        return int(step)


def save(store: ObjectStore, fence: Fence, step: int) -> Manifest:
    data = committer.content(step, fence.attempt, SIZE)
    return store.commit(fence, lambda f: f.write(data), step=step, epoch=0, world_size=1)


@pytest.mark.parametrize("moment", ["before the new one saves", "after the new one has saved"])
def test_an_old_attempt_that_goes_on_is_never_believed(
    server: Server, attempts: Nursery, tmp_path: Path, moment: str
) -> None:
    bucket = server.new_bucket()
    for number, (point, nth) in enumerate(plan()):
        race = Race(server, attempts, tmp_path / f"race-{number}", bucket, point, nth)
        try:
            assert race.old.wait_for("stopped", "exited") == "stopped", (point, nth, race.old.status)
            store = race.store()
            found, fence = take_over(store, attempt=1)
            base = found.manifest.step if found else 0
            assert base >= max(race.old.saved, default=0)
            if moment == "after the new one has saved":
                save(store, fence, base + 1)
                base = save(store, fence, base + 2).step
        finally:
            race.go_on()
        assert race.old.status == committer.FENCED, (point, nth)
        assert race.newest() == base, (point, nth)
        pointed = store.medium.pointer()
        if server.kind == "moto" and base:  # it enforces conditions: not even for a moment
            assert pointed is not None
            assert pointed.startswith(f"step-{base:09d}."), (point, nth)
        manifest = save(store, fence, base + 1)
        assert race.newest() == base + 1
        assert store.medium.pointer() == manifest.name.data
        store.collect_garbage(fence, keep_last=2)
        assert race.newest() == base + 1

"""Old attempts stopped between any two requests of a save, and continued when a newer one owns the run: on S3 servers.

`ORCH_CHAOS_OBJECT_RACES` sets how many there are in each place, half of them for each moment.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import take_over
from tests.chaos.buckets import LARGE, PLACES, BucketRun, Place, place_called, save
from tests.chaos.nursery import Nursery, committer, nursery

RACES = int(os.environ.get("ORCH_CHAOS_OBJECT_RACES", "42"))  # every point at both moments
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
PARTS = [
    ("request create_multipart_upload", 1),
    ("request upload_part", 1),
    ("request upload_part", 2),
    ("request upload_part", 3),
    ("request complete_multipart_upload", 1),
]
CLAIM = ["fence-directory", "fence-create", "fence-check"]
PATIENCE_S = 10.0  # moto answers 500 instead of NoSuchUpload to parts of an upload that the new one has freed
REQUESTS = 40  # what three saves and the removal of the first one take, at least

Stop = dict[str, Any]


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with place_called(request.param, tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture(scope="module")
def attempts() -> Iterator[Nursery]:
    with nursery() as opened:
        yield opened


def stops(place: Place) -> Iterator[Stop]:
    """Where the old attempts stop: at everything that has a name, then before every single request."""
    for turn in itertools.count():
        for number, point in enumerate(POINTS):
            yield {"at": point, "nth": 1 + (turn + number + 1) % 3}  # pointers are swapped from the second on
        for point, nth in PARTS:
            yield {"at": point, "nth": nth, "size": LARGE}
        for point in CLAIM if place.claims_are_exclusive else []:
            yield {"at": point}
        for nth in range(1, REQUESTS + 1):
            yield {"at": "request", "nth": nth, "after": "started"}


@pytest.mark.parametrize("moment", ["before the new one saves", "after the new one has saved"])
def test_an_old_attempt_that_goes_on_is_never_believed(
    place: Place, attempts: Nursery, tmp_path: Path, moment: str
) -> None:
    for number, stop in enumerate(itertools.islice(stops(place), (RACES + 1) // 2)):
        run = BucketRun(place, place.new_bucket(), tmp_path / f"race-{number}")
        order = run.order(max_concurrency=1) | {"patience_s": PATIENCE_S}  # one part after the other
        old = attempts.start(run.folder, 0, bucket=order, signal="SIGSTOP", steps=8, **stop)
        try:
            assert old.wait_for("stopped", "exited") == "stopped", (stop, old.status)
            store = run.store()
            found, fence = take_over(store, attempt=1)
            base = found.manifest.step if found else 0
            assert base >= max(old.saved, default=0)
            if moment == "after the new one has saved":
                save(store, fence, base + 1)
                base = save(store, fence, base + 2).step
                if number % 2:  # what the old one had begun is gone when it goes on
                    store.collect_garbage(fence, keep_last=2)
        finally:
            os.kill(old.pid, signal.SIGCONT)
        old.wait_for("exited")
        assert old.status == committer.FENCED, stop
        assert run.newest() == base, stop
        if place.server.kind == "moto" and base:  # it enforces conditions: not even for a moment
            pointed = run.pointed()
            assert pointed is not None
            assert pointed.step == base, stop
        manifest = save(store, fence, base + 1)
        assert run.newest() == base + 1
        assert run.pointed() == manifest.name
        store.collect_garbage(fence, keep_last=2)
        assert run.newest() == base + 1
        run.assert_tidy()

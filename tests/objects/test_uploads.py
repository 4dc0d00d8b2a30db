"""Uploads in parts: checked on their way, and freed when the attempt that began them is dead."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import Fence, take_over
from orchestrator.checkpoint.manifest import CheckpointName
from orchestrator.checkpoint.objects import ObjectStore
from orchestrator.errors import CheckpointError, Fenced
from tests.chaos.nursery import SIZE, committer, nursery
from tests.objects.faulty import HANG, REFUSED, Proxy, Request, always, faulty
from tests.objects.servers import KINDS, serving
from tests.polling import poll

LARGE = 20 << 20  # three parts


@pytest.fixture(scope="module", params=KINDS)
def proxy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with serving(request.param, tmp_path_factory.mktemp(request.param)) as server, faulty(server) as running:
        yield running


class Prefix:
    """Of one run, in a bucket of its own."""

    def __init__(self, proxy: Proxy, scratch: Path) -> None:
        self.proxy, self.scratch = proxy, scratch
        self.bucket = proxy.direct.new_bucket()
        self.url = f"s3://{self.bucket}/run"
        self.files = proxy.direct.files()
        proxy.decide = lambda request: None
        proxy.requests.clear()

    def store(self) -> ObjectStore:
        options = self.proxy.server.storage_options
        return ObjectStore(self.url, storage_options=options, scratch=self.scratch, patience_s=lambda: 10.0)

    def begin(self, key: str) -> None:
        """An upload that nobody goes on with."""
        target = {"Bucket": self.bucket, "Key": key}
        upload = self.files.call_s3("create_multipart_upload", **target)["UploadId"]
        self.files.call_s3("upload_part", UploadId=upload, PartNumber=1, Body=b"x" * (5 << 20), **target)

    def begun(self) -> list[str]:
        return sorted(upload["Key"] for upload in self.files.list_multipart_uploads(self.bucket))


@pytest.fixture
def prefix(proxy: Proxy, tmp_path: Path) -> Prefix:
    return Prefix(proxy, tmp_path / "scratch")


def save(store: ObjectStore, fence: Fence, step: int, size: int = SIZE) -> Any:
    data = committer.content(step, fence.attempt, size)
    return store.commit(fence, lambda f: f.write(data), step=step, epoch=0, world_size=1)


def test_every_part_carries_a_checksum(prefix: Prefix) -> None:
    bodies: list[Request] = []

    def look(request: Request) -> str | None:
        if request.method == "PUT":
            bodies.append(request)
        return None

    prefix.proxy.decide = look
    store = prefix.store()
    _, fence = take_over(store, attempt=0)
    manifest = save(store, fence, 1, LARGE)
    parts = [request for request in bodies if "partNumber=" in request.target]
    assert len(parts) == -(-manifest.size_bytes // (8 << 20)) == 3
    assert all(b"x-amz-checksum-" in request.head.lower() for request in bodies)
    found = store.find()
    assert found is not None
    assert committer.parse_content(found.path.read_bytes()) == (1, 0)


def test_what_a_killed_attempt_had_sent_is_freed_by_the_next_ones_collection(prefix: Prefix, tmp_path: Path) -> None:
    third = lambda request: HANG if "partNumber=3" in request.target else None  # noqa: E731
    prefix.proxy.decide = third
    with nursery() as attempts:
        order = {
            "url": prefix.url,
            "options": prefix.proxy.server.storage_options,
            "scratch": str(tmp_path / "old"),
        }
        old = attempts.start(tmp_path, 0, bucket=order, size=LARGE)
        poll(lambda: any("partNumber=3" in r for r in prefix.proxy.requests), "the third part", timeout=60)
        os.kill(old.pid, signal.SIGKILL)
        old.wait_for("exited")
        assert old.saved == []
    prefix.proxy.decide = lambda request: None
    [left] = prefix.begun()
    assert left.startswith("run/step-000000001.e0001.")
    store = prefix.store()
    _, fence = take_over(store, attempt=1)
    manifest = save(store, fence, 1)
    store.collect_garbage(fence, keep_last=2)
    assert prefix.begun() == []
    found = store.find()
    assert found is not None
    assert found.manifest == manifest


def test_only_what_dead_attempts_of_this_run_began_is_freed(prefix: Prefix) -> None:
    name = CheckpointName.fresh(7, 1)
    dead = [f"run/{name.data}", f"run/{name.part('shard-0001.ckpt')}"]
    kept = [
        f"run/{CheckpointName.fresh(7, 2).data}",  # being uploaded now
        f"run/{CheckpointName.fresh(7, 3).data}",  # by whoever took over from us
        f"run/other/{CheckpointName.fresh(7, 1).data}",
        f"run-2/{CheckpointName.fresh(7, 1).data}",
        "run/somebody's file",
    ]
    for key in (*dead, *kept):
        prefix.begin(key)
    assert sorted(prefix.store().medium.abort_uploads(2)) == sorted(key.removeprefix("run/") for key in dead)
    assert prefix.begun() == sorted(kept)


def test_a_replaced_attempt_whose_upload_was_freed_learns_that_it_was_replaced(prefix: Prefix) -> None:
    old, new = prefix.store(), prefix.store()
    _, fence = take_over(old, attempt=0)

    def third_part(request: Request) -> str | None:
        if "partNumber=3" in request.target and not taken:
            taken.append(take_over(second, attempt=1)[1])
            second.collect_garbage(taken[0], keep_last=2)
        return None

    taken: list[Fence] = []
    # Past the proxy: it is inside one of its answers.
    second = ObjectStore(prefix.url, storage_options=prefix.proxy.direct.storage_options, scratch=prefix.scratch)
    prefix.proxy.decide = third_part
    with pytest.raises(Fenced):
        save(old, fence, 1, LARGE)
    assert prefix.begun() == []
    assert new.find() is None


@pytest.mark.parametrize("answer", REFUSED)
def test_a_store_that_does_not_list_uploads_is_left_as_it_is(prefix: Prefix, answer: str) -> None:
    prefix.begin(f"run/{CheckpointName.fresh(7, 1).data}")
    prefix.proxy.decide = always(answer)
    assert prefix.store().medium.abort_uploads(2) == []


def test_an_upload_that_fails_for_good_frees_its_own_parts(prefix: Prefix) -> None:
    store = prefix.store()
    _, fence = take_over(store, attempt=0)
    prefix.proxy.decide = lambda request: "403" if "partNumber=2" in request.target else None
    with pytest.raises(CheckpointError, match="Access Denied") as caught:
        save(store, fence, 1, LARGE)
    assert "credentials" in (caught.value.hint or "")
    assert prefix.begun() == []
    assert store.find() is None

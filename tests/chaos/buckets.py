"""One run in a bucket of an S3 server, as its attempts, a test and a reader see it."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import CheckpointName, Fence, Found, Manifest
from orchestrator.checkpoint.objects import _CHUNK_BYTES, ObjectStore
from tests.chaos.nursery import SIZE, committer
from tests.objects.servers import Server, serving

LARGE = 2 * _CHUNK_BYTES + SIZE  # three parts


@dataclass(frozen=True)
class Place:
    """A server, and where runs there keep their fences."""

    server: Server
    files: Any  # a client of somebody else's
    fences_on_disk: bool

    def new_bucket(self) -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.files.mkdir(name)
        return name

    @property
    def claims_are_exclusive(self) -> bool:
        return self.server.kind == "moto" or self.fences_on_disk


PLACES = ("moto", "rclone", "rclone, fences on the disk")


@contextmanager
def place_called(name: str, directory: Path) -> Iterator[Place]:
    kind, _, fences = name.partition(", ")
    with serving(kind, directory) as server:
        yield Place(server, server.files(), fences_on_disk=bool(fences))


class BucketRun:
    """Below `folder` lies what it needs of the disk."""

    def __init__(self, place: Place, bucket: str, folder: Path, *, run_dir: Path | None = None) -> None:
        self.place, self.folder, self.bucket = place, folder, bucket
        self.key = folder.name
        self.url = f"s3://{bucket}/{self.key}"
        # One client for all stores of this process: to make one takes longer than most of what is done with it.
        self.options: dict[str, Any] = {**place.server.storage_options, "skip_instance_cache": False}
        self.disk = run_dir / "checkpoints" if run_dir else folder / "fences" if place.fences_on_disk else None
        self._theirs, self._ours = folder / "theirs", folder / "ours"

    def order(self, **options: Any) -> dict[str, Any]:
        """How an attempt opens it. What a dead one had staged is gone: the node cleans that up."""
        shutil.rmtree(self._theirs, ignore_errors=True)
        return {
            "url": self.url,
            "options": self.place.server.storage_options | options,
            "scratch": str(self._theirs),
            "shared_disk": None if self.disk is None else str(self.disk),
            "claim_on_disk": self.place.fences_on_disk,
        }

    def store(self) -> ObjectStore:
        return ObjectStore(
            self.url,
            storage_options=self.options,
            scratch=self._ours,
            shared_disk=self.disk,
            claim_on_disk=self.place.fences_on_disk,
        )

    def find(self) -> Found | None:
        """What a reader takes; its bytes are what it claims."""
        found = self.store().find()
        if found is not None:
            step, _ = committer.parse_content(found.path.read_bytes())
            assert step == found.manifest.step
        shutil.rmtree(self._ours, ignore_errors=True)
        return found

    def newest(self) -> int:
        """Step of what a reader takes, 0 without."""
        found = self.find()
        return found.manifest.step if found else 0

    def pointed(self) -> CheckpointName | None:
        """What the pointer names; all of it is there."""
        medium = self.store().medium
        target = medium.pointer()
        if target is None:
            return None
        name = CheckpointName.of(target)
        assert name is not None
        assert {name.data, name.manifest} <= set(medium.names())
        return name

    def assert_tidy(self) -> None:
        """No manifest without its data and no data without its manifest; nothing set aside, nothing half sent."""
        names = set(self.store().medium.names())
        assert not [name for name in names if "corrupt" in name]
        for name in filter(None, map(CheckpointName.of, names)):
            assert {name.data, name.manifest} <= names
        assert self.begun() == []

    def begun(self) -> list[str]:
        """Uploads that were not finished."""
        try:
            uploads = self.place.files.list_multipart_uploads(self.bucket)
        except FileNotFoundError:  # rclone, where there never was one
            return []
        return [upload["Key"] for upload in uploads if upload["Key"].startswith(f"{self.key}/")]


def save(store: ObjectStore, fence: Fence, step: int, size: int = SIZE) -> Manifest:
    data = committer.content(step, fence.attempt, size)
    return store.commit(fence, lambda file: file.write(data), step=step, epoch=0, world_size=1)

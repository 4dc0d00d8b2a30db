"""What an object store may answer wrongly, and what goes wrong on this side of it; over fsspec's memory."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import Fence, Manifest, take_over
from orchestrator.checkpoint.objects import ObjectStore
from orchestrator.errors import CheckpointCorrupt, CheckpointError, Fenced

Open = Callable[[], ObjectStore]


@pytest.fixture
def open_again(tmp_path: Path) -> Open:
    def opened() -> ObjectStore:
        url, scratch = f"memory:/{tmp_path}/run", tmp_path / "scratch"
        return ObjectStore(url, scratch=scratch, sleep=lambda s: None, patience_s=lambda: 0.1)

    return opened


@pytest.fixture
def store(open_again: Open) -> ObjectStore:
    return open_again()


def save(store: ObjectStore, fence: Fence, step: int) -> Manifest:
    return store.commit(fence, lambda f: f.write(b"%d" % step * 100), step=step, epoch=0, world_size=1)


def failing(store: ObjectStore, manifest: Manifest, error: OSError, times: int = 10**6) -> None:
    """The next requests for that object's size end so."""
    original, left = store._bucket._size, iter(range(times))

    def size(name: str) -> int:
        if name == manifest.name.data and next(left, None) is not None:
            raise error
        return original(name)

    store._bucket._size = size  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ETIMEDOUT, "no answer in time"),
        OSError(errno.EKEYEXPIRED, "expired"),
        PermissionError(errno.EACCES, "forbidden"),
        OSError(errno.EIO, "the answer was cut short"),
        FileNotFoundError("of a name that is listed"),
    ],
)
def test_the_newest_is_not_given_up_for_an_error_of_the_moment(
    store: ObjectStore, open_again: Open, error: OSError
) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    newest = save(store, fence, 2)
    troubled = open_again()
    failing(troubled, newest, error)
    before = sorted(store.medium.names())
    with pytest.raises(CheckpointError, match=newest.name.data) as caught:
        take_over(troubled, attempt=1)
    assert not isinstance(caught.value, CheckpointCorrupt)
    assert "nothing was changed" in (caught.value.hint or "")
    assert sorted(store.medium.names()) == before
    result, _ = take_over(open_again(), attempt=1)
    assert result is not None
    assert result.manifest == newest


def test_a_single_false_not_found_is_not_believed(store: ObjectStore, open_again: Open) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    newest = save(store, fence, 2)
    troubled = open_again()
    failing(troubled, newest, FileNotFoundError("once"), times=1)
    asked, lacking = troubled._bucket.names, [True]

    def names() -> list[str]:  # late as well, for as long as the object is "not found"
        return [name for name in asked() if name != newest.name.data or not lacking]

    troubled._bucket.names = names  # type: ignore[method-assign]
    troubled._bucket._sleep = lambda seconds: lacking.clear()
    result = troubled.find()
    assert result is not None
    assert result.manifest == newest
    assert not [name for name in store.medium.names() if "corrupt" in name]


def test_a_full_scratch_directory_is_named_and_no_fault_of_the_checkpoint(
    store: ObjectStore, open_again: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    newest = save(store, fence, 20)
    usage = shutil.disk_usage(store._bucket.scratch)
    reader = open_again()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=150))  # enough for the older one
        with pytest.raises(CheckpointError, match="ENOSPC") as caught:
            take_over(reader, attempt=1)
    assert str(reader._bucket.scratch) in caught.value.message
    result, _ = take_over(reader, attempt=1)
    assert result is not None
    assert result.manifest == newest


def test_a_scratch_directory_that_fills_up_on_the_way(
    store: ObjectStore, open_again: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fence = take_over(store, attempt=0)
    newest = save(store, fence, 2)
    opened = Path.open

    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        return opened(Path("/dev/full") if path.name == newest.name.data else path, *args, **kwargs)

    reader = open_again()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(CheckpointError, match="ENOSPC") as caught:
            reader.find()
    assert str(reader._bucket.scratch) in caught.value.message


def test_damaged_candidates_take_no_room_in_the_scratch_directory(store: ObjectStore, open_again: Open) -> None:
    _, fence = take_over(store, attempt=0)
    good = save(store, fence, 1)
    for step in (2, 3, 4):
        store.medium.replace(save(store, fence, step).name.data, b"z" * 100)
    reader = open_again()
    result = reader.find()
    assert result is not None
    assert os.listdir(reader._bucket.scratch) == [good.name.data]  # noqa: PTH208 - names, not paths


def test_a_download_that_breaks_off_leaves_nothing(store: ObjectStore, open_again: Open) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    reader = open_again()

    def broken(*args: Any) -> Any:
        yield b"1"
        raise OSError(errno.ETIMEDOUT, "no answer in time")

    reader._bucket._chunks = broken  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="no answer in time"):
        reader.find()
    assert list(reader._bucket.scratch.iterdir()) == []


def test_a_fence_that_a_listing_in_pages_missed_buries_what_a_later_page_shows(
    store: ObjectStore, open_again: Open
) -> None:
    _, old = take_over(store, attempt=0)
    base = save(store, old, 100)
    reader = open_again()
    asked, first = reader._bucket.names, [True]

    def in_pages() -> list[str]:
        if not first:
            return asked()
        first.clear()
        fences = [name for name in asked() if name.startswith("epoch-")]
        new_store = open_again()
        save(new_store, new_store.open_epoch(attempt=1, base=base), 110)
        store._require_ownership = lambda fence: None  # type: ignore[method-assign]  # paused since its last question
        save(store, old, 150)
        return fences + [name for name in asked() if not name.startswith("epoch-")]

    reader._bucket.names = in_pages  # type: ignore[method-assign]
    result = reader.find()
    assert result is not None
    assert result.manifest.step == 110
    assert "replaced" in result.skipped[0].reason


def listing_late(store: ObjectStore) -> None:
    """Its first look at the fences shows none; creating one overwrites what is there."""
    asked, first = store._names, [True]

    def names() -> list[str]:
        if not first:
            return asked()
        first.clear()
        return []

    def create(name: str, data: bytes, **ignored: Any) -> bool:
        store._claims.replace(name, data)
        return True

    store._names = names  # type: ignore[method-assign]
    store._claims.create = create  # type: ignore[method-assign]


def test_an_epoch_that_was_overwritten_belongs_to_the_other(store: ObjectStore, open_again: Open) -> None:
    fence = store.open_epoch(attempt=0, base=None)
    other = open_again()
    listing_late(other)
    theirs = other.open_epoch(attempt=1, base=None)
    assert (fence.epoch, theirs.epoch) == (1, 1)
    with pytest.raises(Fenced, match="attempt 1"):
        save(store, fence, 10)
    assert save(other, theirs, 5) == other.manifests()[0]


@pytest.mark.parametrize(("attempt", "epoch"), [(0, None), (1, 2), (2, 2)])
def test_the_same_number_on_the_disk_and_in_the_store(
    store: ObjectStore, tmp_path: Path, attempt: int, epoch: int | None
) -> None:
    places = {"scratch": tmp_path / "scratch", "shared_disk": tmp_path / "disk", "sleep": lambda s: None}
    on_disk = ObjectStore(store.uri, claim_on_disk=True, **places)  # type: ignore[arg-type]
    in_store = ObjectStore(store.uri, claim_on_disk=False, **places)  # type: ignore[arg-type]
    theirs = on_disk.open_epoch(attempt=1, base=None)
    listing_late(in_store)
    if epoch is None:
        with pytest.raises(Fenced, match="attempt 1"):
            in_store.open_epoch(attempt=attempt, base=None)
        save(on_disk, theirs, 5)
        return
    fence = in_store.open_epoch(attempt=attempt, base=None)
    assert (theirs.epoch, fence.epoch) == (1, epoch)
    with pytest.raises(Fenced, match=f"attempt {attempt}"):
        save(on_disk, theirs, 5)
    save(in_store, fence, 5)


def test_a_number_that_the_disk_had_already_is_noticed_at_the_next_save(store: ObjectStore, tmp_path: Path) -> None:
    places = {"scratch": tmp_path / "scratch", "shared_disk": tmp_path / "disk", "sleep": lambda s: None}
    in_store = ObjectStore(store.uri, claim_on_disk=False, **places)  # type: ignore[arg-type]
    on_disk = ObjectStore(store.uri, claim_on_disk=True, **places)  # type: ignore[arg-type]
    fence = in_store.open_epoch(attempt=0, base=None)
    listing_late(on_disk)
    theirs = on_disk.open_epoch(attempt=1, base=None)
    assert fence.epoch == theirs.epoch
    with pytest.raises(Fenced, match="attempt 1"):
        save(in_store, fence, 10)
    save(on_disk, theirs, 5)


@pytest.mark.parametrize(("markers", "asked"), [({}, 1), ({"NextKeyMarker": "k/x"}, 2)])
def test_a_list_of_uploads_that_never_ends_is_left(store: ObjectStore, markers: dict[str, str], asked: int) -> None:
    bucket = store._bucket
    bucket._is_s3, bucket._files.split_path = True, lambda path: ("b", "k/", None)
    key = "k/step-000000001.e0001.0a0b0c0d.ckpt"
    requests = []

    def ask(operation: str, **kwargs: Any) -> Any:
        requests.append(kwargs)
        assert len(requests) < 10
        return {"IsTruncated": True, "Uploads": [{"Key": key, "UploadId": "u"}], **markers}

    bucket._ask = lambda caller, *args, **kwargs: ask(*args, **kwargs)  # type: ignore[method-assign]
    assert len(list(bucket._uploads(9))) == asked == len(requests)

"""What every checkpoint store must do. One suite, parametrised over the stores there are."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pytest

from orchestrator.checkpoint import (
    Best,
    CheckpointName,
    CheckpointStore,
    Fence,
    FileEntry,
    Found,
    Manifest,
    PosixStore,
    Refuge,
    open_store,
    take_over,
)
from orchestrator.checkpoint.coverage import Chunk, Index, Tensor
from orchestrator.checkpoint.objects import ObjectStore
from orchestrator.errors import CheckpointCorrupt, CheckpointError, Fenced
from tests.objects.servers import KINDS, Server, serving

Open = Callable[[], CheckpointStore]


class Place(Protocol):
    """Where a store keeps its files, as somebody else sees it."""

    def open(self) -> CheckpointStore: ...
    def names(self) -> list[str]: ...
    def read(self, name: str) -> bytes: ...
    def write(self, name: str, data: bytes) -> None: ...
    def remove(self, name: str) -> None: ...


class Folder:
    """A directory, named as a path or as a URL."""

    def __init__(self, directory: Path, uri: str) -> None:
        self.directory, self.uri = directory, uri

    def open(self) -> CheckpointStore:
        return open_store(self.uri)

    def names(self) -> list[str]:
        return [path.name for path in self.directory.iterdir()]

    def read(self, name: str) -> bytes:
        return (self.directory / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self.directory / name).write_bytes(data)

    def remove(self, name: str) -> None:
        (self.directory / name).unlink()


class Prefix:
    """Objects below a prefix of an S3 server's bucket."""

    def __init__(self, server: Server, scratch: Path) -> None:
        self.root = f"{server.new_bucket()}/some where/run-1"
        self.server, self.scratch = server, scratch
        self.files = server.files()

    def open(self) -> CheckpointStore:
        options = self.server.storage_options
        return ObjectStore(f"s3://{self.root}", storage_options=options, scratch=self.scratch, sleep=lambda s: None)

    def names(self) -> list[str]:
        try:
            found = self.files.ls(self.root, detail=False, refresh=True)
        except FileNotFoundError:  # without an object there is no prefix; rclone keeps its directory for a while
            return []
        return [str(name).rpartition("/")[2] for name in found]

    def read(self, name: str) -> bytes:
        return bytes(self.files.cat_file(f"{self.root}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        self.files.pipe_file(f"{self.root}/{name}", data)

    def remove(self, name: str) -> None:
        self.files.rm_file(f"{self.root}/{name}")


class PrefixAndDisk(Prefix):
    """Objects below a prefix, fences in a directory (checkpoint.fence: disk)."""

    def __init__(self, server: Server, scratch: Path, disk: Path) -> None:
        super().__init__(server, scratch)
        self.disk = Folder(disk, str(disk))

    def open(self) -> CheckpointStore:
        return open_store(
            f"s3://{self.root}",
            storage_options=self.server.storage_options,
            scratch=self.scratch,
            shared_disk=self.disk.directory,
            claim_on_disk=True,
        )

    def names(self) -> list[str]:
        return [*super().names(), *(self.disk.names() if self.disk.directory.exists() else ())]

    def read(self, name: str) -> bytes:
        return self.disk.read(name) if is_fence(name) else super().read(name)

    def write(self, name: str, data: bytes) -> None:
        self.disk.write(name, data) if is_fence(name) else super().write(name, data)

    def remove(self, name: str) -> None:
        self.disk.remove(name) if is_fence(name) else super().remove(name)


def is_fence(name: str) -> bool:
    return name.startswith("epoch-")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """The S3 servers, each started when it is first asked for."""
    running: dict[str, Server] = {}
    with ExitStack() as stack:

        def get(kind: str) -> Server:
            if kind not in running:
                running[kind] = stack.enter_context(serving(kind, tmp_path_factory.mktemp(kind)))
            return running[kind]

        yield get


class Memory(Prefix):
    """Any other file system that fsspec knows; this one lives in the process."""

    def __init__(self, scratch: Path) -> None:
        import fsspec

        self.root = f"/{scratch}/some where/run-1"
        self.scratch = scratch
        self.files = fsspec.filesystem("memory")

    def open(self) -> CheckpointStore:
        return open_store(f"memory:/{self.root}", scratch=self.scratch)


@pytest.fixture(params=["path", "file-url", *KINDS, "rclone and disk", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, servers: Callable[[str], Server]) -> Place:
    directory = tmp_path / "a run's checkpoints"
    match request.param:
        case "path":
            return Folder(directory, str(directory))
        case "file-url":
            return Folder(directory, "file://" + str(directory).replace(" ", "%20"))
        case "rclone and disk":
            return PrefixAndDisk(servers("rclone"), tmp_path / "scratch", tmp_path / "disk")
        case "memory":
            return Memory(tmp_path / "scratch")
        case kind:
            return Prefix(servers(kind), tmp_path / "scratch")


@pytest.fixture
def open_again(place: Place) -> Open:
    """Opens the same store anew, as the next attempt would."""
    return place.open


@pytest.fixture
def store(open_again: Open) -> CheckpointStore:
    return open_again()


def content(step: int) -> bytes:
    return f"state of step {step};".encode() * 100


def save(store: CheckpointStore, fence: Fence, step: int) -> Manifest:
    return store.commit(fence, lambda f: f.write(content(step)), step=step, epoch=step // 10, world_size=2)


def found(store: CheckpointStore) -> Found:
    result = store.find()
    assert result is not None
    return result


def steps(store: CheckpointStore) -> list[int]:
    return [manifest.step for manifest in store.manifests()]


def pointed(place: Place) -> int:
    """Step of the checkpoint that the pointer names."""
    if isinstance(place, Folder):
        name = (place.directory / "last.ckpt").readlink().name
    else:
        name = str(json.loads(place.read("last.json"))["data"])
    return int(name.split(".")[0].removeprefix("step-"))


def damage(place: Place, manifest: Manifest) -> None:
    data = bytearray(place.read(manifest.name.data))
    data[len(data) // 2] ^= 1
    place.write(manifest.name.data, bytes(data))


# --- the first attempt


def test_nothing_is_found_in_a_store_that_does_not_exist_yet(store: CheckpointStore) -> None:
    assert store.find() is None
    assert store.manifests() == []


def test_what_was_committed_is_found_by_another_instance(store: CheckpointStore, open_again: Open) -> None:
    _, fence = take_over(store, attempt=0)
    manifest = store.commit(
        fence, lambda f: f.write(content(7)), step=7, epoch=1, world_size=4, code_hash="c0de", image="sha256:1"
    )
    result = found(open_again())
    assert result.manifest == manifest
    assert result.path.read_bytes() == content(7)
    assert result.skipped == ()
    assert (manifest.step, manifest.epoch, manifest.world_size) == (7, 1, 4)
    assert (manifest.attempt, manifest.fence_epoch, manifest.code_hash, manifest.image) == (0, 1, "c0de", "sha256:1")
    [entry] = manifest.files
    assert (entry.size, entry.sha256) == (len(content(7)), hashlib.sha256(content(7)).hexdigest())


def test_the_newest_is_found_and_all_are_listed_newest_first(store: CheckpointStore) -> None:
    _, fence = take_over(store, attempt=0)
    for step in (10, 20, 1000):
        save(store, fence, step)
    assert found(store).manifest.step == 1000
    assert steps(store) == [1000, 20, 10]


def test_of_two_saves_of_a_step_the_later_is_found(store: CheckpointStore) -> None:
    _, fence = take_over(store, attempt=0)
    for n in range(6):
        store.commit(fence, lambda f, n=n: f.write(b"save %d" % n), step=10, epoch=0, world_size=1)
        assert found(store).path.read_bytes() == b"save %d" % n


def test_large_content_written_in_many_pieces(store: CheckpointStore) -> None:
    _, fence = take_over(store, attempt=0)

    def write(file: BinaryIO) -> None:
        for n in range(300):
            file.write(bytes([n % 256]) * (n * 50))

    manifest = store.commit(fence, write, step=1, epoch=0, world_size=1)
    assert manifest.size_bytes == sum(n * 50 for n in range(300))
    assert found(store).manifest == manifest


# --- take-over


def test_a_new_attempt_goes_on_from_the_newest_and_names_it(store: CheckpointStore, open_again: Open) -> None:
    _, first = take_over(store, attempt=0)
    manifest = save(store, first, 10)
    result, second = take_over(open_again(), attempt=1)
    assert result is not None
    assert result.manifest == manifest
    assert (first.epoch, first.base_step) == (1, -1)
    assert (second.epoch, second.base_step, second.attempt) == (2, 10, 1)


def test_the_replaced_attempt_is_told_who_took_over(store: CheckpointStore, open_again: Open) -> None:
    _, old = take_over(store, attempt=0)
    save(store, old, 10)
    take_over(open_again(), attempt=1)
    wrote = []
    with pytest.raises(Fenced, match="attempt 1"):
        store.commit(old, lambda f: wrote.append(f.write(b"x")), step=20, epoch=0, world_size=1)
    assert wrote == []  # not before the state was written for nothing
    with pytest.raises(Fenced, match="attempt 1"):
        store.collect_garbage(old, keep_last=2)


def test_what_a_replaced_attempt_publishes_late_is_ignored(store: CheckpointStore, open_again: Open) -> None:
    _, old = take_over(store, attempt=0)
    save(store, old, 10)
    save(store, old, 20)
    new_store = open_again()
    fences: list[Fence] = []

    def taken_over_meanwhile(file: BinaryIO) -> None:
        file.write(content(30))
        fences.append(take_over(new_store, attempt=1)[1])

    with pytest.raises(Fenced):
        store.commit(old, taken_over_meanwhile, step=30, epoch=0, world_size=1)
    result = found(new_store)
    assert result.manifest.step == 20
    assert "replaced" in result.skipped[0].reason
    assert steps(new_store) == [20, 10]
    save(new_store, fences[0], 25)
    assert found(new_store).manifest.step == 25
    assert steps(new_store) == [25, 20, 10]


def test_an_attempt_that_never_committed_leaves_everything_as_it_was(store: CheckpointStore, open_again: Open) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 10)
    for attempt in (1, 2, 3):
        result, _ = take_over(open_again(), attempt=attempt)
        assert result is not None
        assert result.manifest.step == 10


def test_a_restart_within_an_attempt_opens_an_epoch_too(store: CheckpointStore, open_again: Open) -> None:
    _, first = take_over(store, attempt=0)
    _, second = take_over(open_again(), attempt=0)
    save(open_again(), second, 5)
    with pytest.raises(Fenced):
        save(store, first, 6)


def test_an_older_attempt_that_starts_late_does_not_win(store: CheckpointStore, open_again: Open) -> None:
    _, newer = take_over(store, attempt=1)
    save(store, newer, 10)
    with pytest.raises(Fenced, match="attempt 1"):
        take_over(open_again(), attempt=0)
    save(store, newer, 20)
    assert found(open_again()).manifest.step == 20


def test_a_claim_that_would_bury_newer_work_is_refused(store: CheckpointStore, open_again: Open) -> None:
    _, old = take_over(store, attempt=0)
    base = save(store, old, 10)
    save(store, old, 20)
    other = open_again()
    for stale in (None, base):
        with pytest.raises(CheckpointError, match="step 20"):
            other.open_epoch(attempt=1, base=stale)
    save(store, old, 30)  # the refused claims changed nothing
    fence = other.open_epoch(attempt=1, base=base, discard_newer=True)  # what a rollback asks for
    assert fence.base_step == 10
    assert found(other).manifest == base


def test_take_over_takes_what_was_committed_while_it_looked(store: CheckpointStore, open_again: Open) -> None:
    _, old = take_over(store, attempt=0)
    save(store, old, 10)
    new_store = open_again()
    original, late = new_store.find, iter([20, 30])

    def find_then_lose_a_race(**how: Any) -> Found | None:
        result = original(**how)
        for step in late:
            save(store, old, step)
            break
        return result

    new_store.find = find_then_lose_a_race  # type: ignore[method-assign]
    result, fence = take_over(new_store, attempt=1)
    assert result is not None
    assert result.manifest.step == fence.base_step == 30


def test_whoever_looks_without_loading_keeps_no_copy(
    place: Place, store: CheckpointStore, open_again: Open, tmp_path: Path
) -> None:
    _, old = take_over(store, attempt=0)
    save(store, old, 10)
    damage(place, save(store, old, 20))
    result = open_again().find(keep=False)
    assert result is not None
    assert result.manifest.step == 10
    assert steps(store) == [10]  # compared all the same
    if not isinstance(place, Folder):
        assert list((tmp_path / "scratch").rglob("*.ckpt")) == []


def test_what_was_listed_before_a_fence_that_buries_it_is_no_base(store: CheckpointStore, open_again: Open) -> None:
    _, old = take_over(store, attempt=0)
    save(store, old, 100)
    fooled = open_again()
    original = fooled.find

    def find_too_early(**how: Any) -> Found | None:
        fooled.find = original  # type: ignore[method-assign]
        zombie = save(store, old, 150)
        new_store = open_again()
        base = next(manifest for manifest in new_store.manifests() if manifest.step == 100)
        save(new_store, new_store.open_epoch(attempt=1, base=base, discard_newer=True), 110)
        return Found(zombie, {}, ())

    fooled.find = find_too_early  # type: ignore[method-assign]
    result, fence = take_over(fooled, attempt=2)
    assert result is not None
    assert result.manifest.step == fence.base_step == 110
    assert steps(store) == [110, 100]


# --- damage


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove", "manifest", "manifest-gone"])
def test_a_damaged_checkpoint_is_set_aside_and_the_next_one_used(
    place: Place, store: CheckpointStore, open_again: Open, harm: str
) -> None:
    _, fence = take_over(store, attempt=0)
    good, bad = save(store, fence, 10), save(store, fence, 20)
    data, manifest = bad.name.data, bad.name.manifest
    match harm:
        case "flip":
            damage(place, bad)
        case "truncate":
            place.write(data, content(20)[:-1])
        case "empty":
            place.write(data, b"")
        case "remove":
            place.remove(data)
        case "manifest":
            place.write(manifest, place.read(manifest)[:40])
        case "manifest-gone":
            place.remove(manifest)
    result = found(open_again())
    assert result.manifest == good
    if harm == "manifest-gone":  # then it was never committed
        assert result.skipped == ()
        return
    [skipped] = result.skipped
    assert skipped.location == f"{store.uri}/{data}"
    assert "corrupt" in skipped.reason
    names = place.names()
    assert manifest not in names
    assert data not in names
    assert manifest + ".corrupt" in names
    assert (data + ".corrupt" in names) == (harm != "remove")
    assert found(open_again()).skipped == ()  # reported once


def test_any_number_of_damaged_ones_is_passed_over(place: Place, store: CheckpointStore, open_again: Open) -> None:
    _, fence = take_over(store, attempt=0)
    good = save(store, fence, 1)
    for step in range(2, 7):
        damage(place, save(store, fence, step))
    result, _ = take_over(open_again(), attempt=1)
    assert result is not None
    assert result.manifest == good
    assert [int(s.name[5:14]) for s in result.skipped] == [6, 5, 4, 3, 2]


def test_what_is_loaded_while_it_is_compared_counts_only_if_it_matches(
    place: Place, store: CheckpointStore, open_again: Open
) -> None:
    _, fence = take_over(store, attempt=0)
    for step in (1, 2, 3):
        newest = save(store, fence, step)
    place.write(newest.name.data, content(3)[:-1] + b"!")  # same size
    tried: list[bytes] = []

    def load(path: Path) -> bytes:
        tried.append(path.read_bytes())
        if tried[-1].endswith(b"!"):
            raise ValueError("on purpose: damage looks like this to whoever loads it")
        return tried[-1]

    result, _ = take_over(open_again(), attempt=1, load=load)
    assert result is not None
    assert (result.manifest.step, result.loaded) == (2, content(2))
    assert [Path(skip.location).name for skip in result.skipped] == [newest.name.data]
    assert tried[-1] == content(2)


def test_what_was_loaded_beside_a_reading_that_did_not_match_is_loaded_again(tmp_path: Path) -> None:
    store = PosixStore(tmp_path, sleep=lambda s: manifest.path.write_bytes(content(1)) and None)
    _, fence = take_over(store, attempt=0)
    manifest = save(store, fence, 1)
    manifest.path.write_bytes(content(1)[:-1] + b"!")  # until somebody looks a second time
    result = store.find(load=Path.read_bytes)
    assert result is not None
    assert result.loaded == content(1)


def test_an_error_that_passes_while_it_is_compared_does_not_end_a_load(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    errors = iter([OSError(errno.ESTALE, "Stale file handle")])

    def load(path: Path) -> bytes:
        for error in errors:
            raise error
        return path.read_bytes()

    result = store.find(load=load)
    assert result is not None
    assert result.loaded == content(1)


def test_what_cannot_be_loaded_of_a_sound_checkpoint_is_told_and_nothing_is_set_aside(
    place: Place, store: CheckpointStore, open_again: Open
) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    before = sorted(place.names())

    def load(path: Path) -> None:
        raise ValueError("on purpose: not a state of this program")

    with pytest.raises(ValueError, match="on purpose"):
        take_over(open_again(), attempt=1, load=load)
    assert sorted(place.names()) == before


def test_when_all_are_damaged_nobody_starts_over_in_silence(
    place: Place, store: CheckpointStore, open_again: Open
) -> None:
    _, fence = take_over(store, attempt=0)
    damage(place, save(store, fence, 10))
    damage(place, save(store, fence, 20))
    for _ in range(2):  # not in the next attempt either
        with pytest.raises(CheckpointCorrupt, match="2 checkpoints") as caught:
            take_over(open_again(), attempt=1)
        assert caught.value.hint


def test_the_attempt_whose_base_was_damaged_later_does_not_hide_older_ones(
    place: Place, store: CheckpointStore, open_again: Open
) -> None:
    _, first = take_over(store, attempt=0)
    save(store, first, 100)
    base = save(store, first, 120)
    second_store = open_again()
    take_over(second_store, attempt=1)  # goes on from 120 and dies before it commits
    damage(place, base)
    result, third = take_over(open_again(), attempt=2)
    assert result is not None
    assert result.manifest.step == third.base_step == 100


def test_a_checkpoint_that_does_not_read_back_protects_the_older_ones(place: Place, store: CheckpointStore) -> None:
    _, fence = take_over(store, attempt=0)
    saved = [save(store, fence, step) for step in (1, 2, 3, 4)]
    damage(place, saved[-1])
    with pytest.raises(CheckpointCorrupt, match="step 4"):
        store.collect_garbage(fence, keep_last=2)
    assert steps(store) == [3, 2, 1]
    assert found(store).manifest.step == 3


# --- failed saves


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_save_that_fails_leaves_the_previous_one_and_nothing_else(
    store: CheckpointStore, open_again: Open, code: int
) -> None:
    _, fence = take_over(store, attempt=0)
    manifest = save(store, fence, 10)

    def fail(file: BinaryIO) -> None:
        file.write(b"half of it")
        raise OSError(code, "injected")

    with pytest.raises(CheckpointError, match=errno.errorcode[code]) as caught:
        store.commit(fence, fail, step=20, epoch=0, world_size=1)
    assert not isinstance(caught.value, Fenced)
    assert "stands" in (caught.value.hint or "")
    assert found(open_again()).manifest == manifest
    assert steps(store) == [10]
    save(store, fence, 30)  # and the attempt can go on
    assert found(open_again()).manifest.step == 30


def test_an_error_of_the_serialiser_passes_through(store: CheckpointStore) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 10)

    def fail(file: BinaryIO) -> None:
        file.write(b"half of it")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.commit(fence, fail, step=20, epoch=0, world_size=1)
    assert steps(store) == [10]


def test_an_empty_checkpoint_is_not_a_checkpoint(store: CheckpointStore) -> None:
    _, fence = take_over(store, attempt=0)
    with pytest.raises(CheckpointError, match="empty"):
        store.commit(fence, lambda f: None, step=1, epoch=0, world_size=1)
    assert store.find() is None


# --- commits in parts


def write_parts(
    store: CheckpointStore, fence: Fence, step: int, parts: int = 2
) -> tuple[CheckpointName, list[FileEntry]]:
    """What the ranks of an attempt do before rank 0 publishes."""
    name = store.begin(fence, step=step)
    files = [store.write_part(name, lambda f: f.write(content(step)))]
    files += [
        store.write_part(name, lambda f, n=n: f.write(b"%d" % n * step), part=f"shard-{n:04d}.ckpt")
        for n in range(parts)
    ]
    return name, files


def save_parts(store: CheckpointStore, fence: Fence, step: int, parts: int = 2) -> Manifest:
    name, files = write_parts(store, fence, step, parts)
    return store.publish(fence, name, files, epoch=1, world_size=parts)


def whole(shape: tuple[int, ...], *pieces: tuple[int, int]) -> Tensor:
    """A tensor of one dimension in pieces (offset, size), each in the next shard."""
    return Tensor(shape, "float32", tuple(Chunk((at,), (size,), n) for n, (at, size) in enumerate(pieces)))


def of_step(place: Place, step: int) -> list[str]:
    return sorted(name for name in place.names() if name.startswith(f"step-{step:09d}."))


def test_parts_become_one_checkpoint(place: Place, store: CheckpointStore, open_again: Open) -> None:
    _, fence = take_over(store, attempt=0)
    manifest = save_parts(store, fence, 10)
    stem = manifest.name.stem
    assert [entry.name for entry in manifest.files] == [
        f"{stem}.ckpt",
        f"{stem}.shard-0000.ckpt",
        f"{stem}.shard-0001.ckpt",
    ]
    result = found(open_again())
    assert result.manifest == manifest
    assert result.path.read_bytes() == content(10)
    assert result.path.name == manifest.name.data
    assert {name: path.read_bytes() for name, path in result.files.items()} == {
        f"{stem}.ckpt": content(10),
        f"{stem}.shard-0000.ckpt": b"0" * 10,
        f"{stem}.shard-0001.ckpt": b"1" * 10,
    }
    assert place.read(f"{stem}.shard-0001.ckpt") == b"1" * 10


def test_parts_are_nothing_until_they_are_published(place: Place, store: CheckpointStore, open_again: Open) -> None:
    _, fence = take_over(store, attempt=0)
    good = save(store, fence, 10)
    name, _ = write_parts(store, fence, 20)
    assert found(open_again()).manifest == good
    assert steps(store) == [10]
    store.abandon(fence, name)
    assert of_step(place, 20) == []
    assert found(open_again()).manifest == good


def test_parts_that_were_never_published_are_swept_by_the_next_attempt(
    place: Place, store: CheckpointStore, open_again: Open
) -> None:
    _, old = take_over(store, attempt=0)
    save(store, old, 10)
    write_parts(store, old, 20)
    _, fence = take_over(open_again(), attempt=1)
    assert len(store.collect_garbage(fence, keep_last=2)) == 3
    assert of_step(place, 20) == []
    assert steps(store) == [10]


def test_a_part_that_fails_leaves_nothing(place: Place, store: CheckpointStore) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 10)
    name = store.begin(fence, step=20)

    def fail(file: BinaryIO) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "injected")

    with pytest.raises(CheckpointError, match="ENOSPC"):
        store.write_part(name, fail, part="shard-0001.ckpt")
    with pytest.raises(CheckpointError, match="empty"):
        store.write_part(name, lambda f: None, part="shard-0000.ckpt")
    assert of_step(place, 20) == []


def test_parts_of_a_replaced_attempt_are_not_published(place: Place, store: CheckpointStore, open_again: Open) -> None:
    _, old = take_over(store, attempt=0)
    save(store, old, 10)
    name, files = write_parts(store, old, 20)
    take_over(open_again(), attempt=1)
    with pytest.raises(Fenced, match="attempt 1"):
        store.publish(old, name, files, epoch=0, world_size=2)
    assert steps(open_again()) == [10]
    with pytest.raises(Fenced, match="attempt 1"):
        store.begin(old, step=30)
    name, files = CheckpointName.fresh(40, old.epoch), []
    with pytest.raises(Fenced, match="attempt 1"):
        store.abandon(old, name)


@pytest.mark.parametrize("files", ["none", "no first", "twice", "somebody else's"])
def test_files_that_are_not_a_checkpoint_are_not_published(store: CheckpointStore, files: str) -> None:
    _, fence = take_over(store, attempt=0)
    other = save(store, fence, 10).files[0]
    name, written = write_parts(store, fence, 20)
    wrong = {
        "none": [],
        "no first": written[1:],
        "twice": [*written, written[1]],
        "somebody else's": [*written, other],
    }[files]
    with pytest.raises(CheckpointError):
        store.publish(fence, name, wrong, epoch=0, world_size=2)
    assert steps(store) == [10]


@pytest.mark.parametrize("harm", ["flip", "remove"])
def test_a_damaged_part_sets_the_whole_checkpoint_aside(
    place: Place, store: CheckpointStore, open_again: Open, harm: str
) -> None:
    _, fence = take_over(store, attempt=0)
    good, bad = save_parts(store, fence, 10), save_parts(store, fence, 20)
    part = bad.name.part("shard-0001.ckpt")
    if harm == "remove":
        place.remove(part)
    else:
        place.write(part, b"0" * 20)
    assert "shard-0001.ckpt" in str(store.verify(bad))
    result = found(open_again())
    assert result.manifest == good
    [skipped] = result.skipped
    assert "shard-0001.ckpt" in skipped.reason
    assert all(name.endswith(".corrupt") for name in of_step(place, 20))
    assert len(of_step(place, 20)) == (3 if harm == "remove" else 4)


def test_another_rank_fetches_the_parts_it_needs(place: Place, store: CheckpointStore, open_again: Open) -> None:
    _, fence = take_over(store, attempt=0)
    manifest = save_parts(store, fence, 10)
    part = manifest.name.part("shard-0001.ckpt")
    store_of_another = open_again()
    result = store_of_another.fetch(manifest.name.manifest, only=[part])
    assert result.manifest == manifest
    [(name, path)] = result.files.items()
    assert (name, path.read_bytes()) == (part, b"1" * 10)
    place.write(part, b"0" * 10)
    with pytest.raises(CheckpointError, match=r"shard-0001\.ckpt"):
        open_again().fetch(manifest.name.manifest, only=[part])
    assert steps(store) == [10]  # only rank 0 sets anything aside


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        (Index(("shard-0000.ckpt", "shard-0001.ckpt"), {"w": whole((4,), (0, 3), (3, 1))}), None),
        (Index(("shard-0000.ckpt", "shard-0001.ckpt"), {"w": whole((4,), (0, 2), (3, 1))}), "1 of 4 elements"),
        (Index(("shard-0000.ckpt", "shard-0002.ckpt"), {"w": whole((4,), (0, 4))}), "shard-0002.ckpt is not part"),
        (None, "is not an index"),
    ],
)
def test_a_sharded_checkpoint_must_be_complete_as_well(
    store: CheckpointStore, open_again: Open, index: Index | None, complaint: str | None
) -> None:
    _, fence = take_over(store, attempt=0)
    good = save(store, fence, 10)
    name, files = write_parts(store, fence, 20)
    text = b"{}" if index is None else index.render()
    files.append(store.write_part(name, lambda f: f.write(text), part="index.json"))
    manifest = store.publish(fence, name, files, epoch=0, world_size=2)
    problem = store.verify(manifest)
    if complaint is None:
        assert problem is None
        assert found(open_again()).manifest == manifest
    else:
        assert complaint in str(problem)
        assert found(open_again()).manifest == good


def test_old_checkpoints_go_with_all_their_parts(place: Place, store: CheckpointStore) -> None:
    _, fence = take_over(store, attempt=0)
    for step in (1, 2, 3):
        save_parts(store, fence, step)
    assert len(store.collect_garbage(fence, keep_last=2)) == 4
    assert of_step(place, 1) == []
    assert len(of_step(place, 2)) == len(of_step(place, 3)) == 4
    assert steps(store) == [3, 2]


# --- garbage


@pytest.mark.parametrize(
    ("keep_last", "kept"), [(0, [5, 4]), (1, [5, 4]), (2, [5, 4]), (3, [5, 4, 3]), (9, [5, 4, 3, 2, 1])]
)
def test_the_newest_are_kept_and_never_fewer_than_two(
    place: Place, store: CheckpointStore, keep_last: int, kept: list[int]
) -> None:
    _, fence = take_over(store, attempt=0)
    saved = {step: save(store, fence, step) for step in range(1, 6)}
    removed = store.collect_garbage(fence, keep_last=keep_last)
    assert steps(store) == kept
    expected = {name for step, m in saved.items() if step not in kept for name in (m.name.data, m.name.manifest)}
    assert set(removed) == expected
    assert not expected & set(place.names())


def test_what_a_replaced_attempt_left_is_swept_and_damaged_files_are_not(
    place: Place, store: CheckpointStore, open_again: Open
) -> None:
    _, old = take_over(store, attempt=0)
    save(store, old, 10)
    bad = save(store, old, 20)
    damage(place, bad)
    new_store = open_again()
    _, fence = take_over(new_store, attempt=1)
    save(new_store, fence, 11)
    save(new_store, fence, 12)
    new_store.collect_garbage(fence, keep_last=2)
    names = place.names()
    assert bad.name.data + ".corrupt" in names
    assert not any(".e0001." in name and ".corrupt" not in name for name in names)
    assert steps(new_store) == [12, 11]


# --- addresses


@pytest.mark.parametrize(
    "uri", ["", "file://host/path", "file://relative", "file:///a?b", "file:///a#b", "nonsense://bucket/x"]
)
def test_addresses_that_mean_nothing_are_refused(uri: str) -> None:
    with pytest.raises(CheckpointError):
        open_store(uri)


def test_a_path_is_made_absolute_and_nothing_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("a/b").uri == str(tmp_path / "a" / "b")
    assert open_store("file:///x/a%20b").uri == "/x/a b"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["s3:/bucket/p", "simplecache::s3://bucket/p"])
def test_what_looks_like_a_url_is_no_directory(uri: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="write s3://bucket/p"):
        open_store(uri)


def test_the_scheme_may_be_in_upper_case(tmp_path: Path) -> None:
    assert open_store("MEMORY://Bucket/P", scratch=tmp_path).uri == "memory://Bucket/P"


# --- reading again


def test_verify_says_what_is_wrong_and_changes_nothing(place: Place, store: CheckpointStore) -> None:
    manifest = save(store, store.open_epoch(attempt=0, base=None), 10)
    read = list[int]()
    assert store.verify(manifest, reading=read.append) is None
    assert sum(read) == manifest.size_bytes
    damage(place, manifest)
    problem = store.verify(manifest)
    assert problem is not None
    assert "does not match its hash" in problem
    assert steps(store) == [10]
    place.write(manifest.name.data, b"short")
    assert "has 5 bytes" in str(store.verify(manifest))


def test_verify_of_a_checkpoint_that_was_collected_meanwhile(place: Place, store: CheckpointStore) -> None:
    manifest = save(store, store.open_epoch(attempt=0, base=None), 10)
    place.remove(manifest.name.data)
    place.remove(manifest.name.manifest)
    with pytest.raises(CheckpointError, match="removed while it was read"):
        store.verify(manifest)


def test_fetch_takes_the_very_checkpoint_that_is_named(place: Place, store: CheckpointStore, open_again: Open) -> None:
    _, fence = take_over(store, attempt=0)
    chosen = save(store, fence, 10)
    save(store, fence, 20)
    other = open_again()
    assert other.fetch(chosen.name.manifest).path.read_bytes() == content(10)
    damage(place, chosen)
    with pytest.raises(CheckpointError, match="does not match its hash"):
        other.fetch(chosen.name.manifest)
    with pytest.raises(CheckpointError, match="removed meanwhile"):
        other.fetch(chosen.name.manifest.replace("0010", "0011"))
    with pytest.raises(CheckpointError, match="no manifest"):
        other.fetch("last.json")


# --- saves that had no time for this store


@pytest.fixture
def refuge(tmp_path: Path) -> Refuge:
    return Refuge(tmp_path / "disk")  # where the fences of "rclone and disk" are, too: a run has one directory


def test_an_emergency_save_is_brought_in_and_resumed_from(
    place: Place, store: CheckpointStore, open_again: Open, refuge: Refuge
) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 10)
    emergency = save(refuge.open(), fence, 17)
    assert found(open_again()).manifest.step == 10  # nothing in the store names it
    assert pointed(place) == 10

    store = open_again()
    assert [(b.manifest, b.published, b.problem) for b in refuge.bring_to(store)] == [(emergency, True, None)]
    assert pointed(place) == 17
    result, fence = take_over(store, attempt=1)
    assert result is not None
    assert (result.manifest.step, result.path.read_bytes()) == (17, content(17))
    assert [n for n in refuge.clear(fence) if "step" in n] == [emergency.name.manifest, emergency.name.data]
    assert refuge.store.manifests() == []
    save(store, fence, 20)
    assert steps(store) == [20, 17, 10]


def test_an_emergency_save_of_a_step_that_was_saved_before_is_the_newer_one(
    store: CheckpointStore, open_again: Open, refuge: Refuge
) -> None:
    _, fence = take_over(store, attempt=0)
    for step in (15, 16, 17):
        save(store, fence, step)
    refuge.open().commit(fence, lambda f: f.write(b"later"), step=17, epoch=0, world_size=1)
    assert [b.published for b in refuge.bring_to(open_again())] == [True]
    assert found(open_again()).path.read_bytes() == b"later"


def test_to_bring_it_in_twice_changes_nothing(store: CheckpointStore, open_again: Open, refuge: Refuge) -> None:
    _, fence = take_over(store, attempt=0)
    save(refuge.open(), fence, 17)
    for _ in range(2):
        assert [b.published for b in refuge.bring_to(open_again())] == [True]
    assert steps(store) == [17]


def test_an_emergency_save_of_a_replaced_attempt_is_not_brought_in(
    store: CheckpointStore, open_again: Open, refuge: Refuge, tmp_path: Path
) -> None:
    _, old = take_over(store, attempt=0)
    save(store, old, 10)
    take_over(open_again(), attempt=1)
    if (tmp_path / "disk" / "epoch-0002.json").exists():
        with pytest.raises(Fenced):  # it even hears of it
            save(refuge.open(), old, 17)
        return
    save(refuge.open(), old, 17)
    assert [(b.published, b.problem) for b in refuge.bring_to(store)] == [(False, None)]
    result, fence = take_over(open_again(), attempt=2)
    assert result is not None
    assert result.manifest.step == 10
    assert refuge.clear(fence) != []  # nobody will ever need it
    assert refuge.store.manifests() == []


def test_a_damaged_emergency_save_is_passed_over(store: CheckpointStore, refuge: Refuge, tmp_path: Path) -> None:
    _, fence = take_over(store, attempt=0)
    good = save(refuge.open(), fence, 16)
    bad = save(refuge.open(), fence, 17)
    (tmp_path / "disk" / bad.name.data).write_bytes(b"short")
    brought = list(refuge.bring_to(store))
    assert [(b.manifest, b.published) for b in brought] == [(bad, False), (good, True)]
    assert "has 5 bytes" in str(brought[0].problem)
    result, fence = take_over(store, attempt=1)
    assert result is not None
    assert result.manifest.step == 16
    refuge.clear(fence)
    left = [name for name in refuge.store.medium.names() if name.startswith("step-")]
    assert sorted(left) == [bad.name.data, bad.name.manifest]  # for whoever may mend it


def test_what_changes_on_its_way_in_is_not_published(store: CheckpointStore, refuge: Refuge, tmp_path: Path) -> None:
    _, fence = take_over(store, attempt=0)
    manifest = save(refuge.open(), fence, 17)
    (tmp_path / "disk" / manifest.name.data).write_bytes(content(18))
    with pytest.raises(CheckpointCorrupt, match="does not match"):
        store.adopt(manifest, refuge.store.medium)
    assert steps(store) == []


@pytest.mark.parametrize("earlier", [False, True], ids=["nothing else", "an older one"])
def test_what_died_on_its_way_in_is_taken_back(
    store: CheckpointStore, open_again: Open, refuge: Refuge, earlier: bool
) -> None:
    _, fence = take_over(store, attempt=0)
    base = save(store, fence, 10) if earlier else None
    manifest = save(refuge.open(), fence, 17)

    def started_meanwhile(count: int) -> None:
        open_again().open_epoch(attempt=1, base=base)

    assert not store.adopt(manifest, refuge.store.medium, reading=started_meanwhile)
    assert steps(open_again()) == ([10] if earlier else [])
    # Not place.names(): where the fences lie on the disk, it lists that, too, and there the save still waits.
    assert [name for name in open_again().sizes() if name.startswith(f"{manifest.name.stem}.")] == []
    assert manifest.name.data in refuge.store.medium.names()


# --- what the place guarantees


def test_weaknesses_of_the_place(place: Place, request: pytest.FixtureRequest, store: CheckpointStore) -> None:
    expected = {
        "path": [], "file-url": [], "moto": [],
        "rclone": ["two attempts that start", "last.json may name"],
        "rclone and disk": ["last.json may name"],
        "memory": ["last.json may name"],
    }  # fmt: skip
    told = store.weaknesses()
    beginnings = expected[request.node.callspec.params["place"]]
    assert len(told) == len(beginnings)
    assert all(sentence.startswith(beginning) for sentence, beginning in zip(told, beginnings, strict=True)), told


def test_a_store_that_does_not_exist_says_so(servers: Callable[[str], Server], tmp_path: Path) -> None:
    options = servers("moto").storage_options
    store = open_store("s3://no-such-bucket/x", storage_options=options, scratch=tmp_path, patience_s=lambda: 1.0)
    with pytest.raises(CheckpointError, match="no-such-bucket"):
        store.weaknesses()
    with pytest.raises(CheckpointError, match="no-such-bucket"):
        store.open_epoch(attempt=0, base=None)


# --- retention


def scored(store: CheckpointStore, fence: Fence, step: int, loss: float) -> Manifest:
    return store.commit(
        fence, lambda f: f.write(content(step)), step=step, epoch=0, world_size=1, metrics={"loss": loss}, data="d1"
    )


def test_metrics_and_the_fingerprint_of_the_data_are_kept(store: CheckpointStore, open_again: Open) -> None:
    _, fence = take_over(store, attempt=0)
    store.commit(
        fence,
        lambda f: f.write(b"x"),
        step=1,
        epoch=0,
        world_size=1,
        metrics={"loss": 0.5, "bad": float("nan"), "far": float("-inf")},
        data="d1",
    )
    manifest = found(open_again()).manifest
    assert (manifest.metrics, manifest.data) == ({"loss": 0.5}, "d1")


def test_the_best_and_one_of_every_so_many_steps_stay(place: Place, store: CheckpointStore) -> None:
    _, fence = take_over(store, attempt=0)
    for step, loss in [(3, 9.0), (7, 1.0), (11, 8.0), (14, 2.0), (19, 7.0), (23, 6.0), (26, 5.0)]:
        scored(store, fence, step, loss)
        doomed = store.garbage(keep_last=2, keep_every=10, keep_best=Best("loss", "min", 2))
        removed = store.collect_garbage(fence, keep_last=2, keep_every=10, keep_best=Best("loss", "min", 2))
        assert sorted(removed) == sorted(doomed)
    assert steps(store) == [26, 23, 14, 11, 7]  # newest 26 and 23, one per ten steps 11 and 23, best 7 and 14
    for manifest in store.manifests():
        assert store.verify(manifest) is None


def test_a_metric_that_nobody_logs_is_told_once(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    _, fence = take_over(store, attempt=0)
    for step in range(1, 6):
        store.commit(fence, lambda f: f.write(b"x"), step=step, epoch=0, world_size=1, metrics={"loss": 1 / step})
        store.collect_garbage(fence, keep_last=2, keep_best=Best("los", "min"))
    told = [record.getMessage() for record in caplog.records if "keep_best" in record.getMessage()]
    assert told == ["keep_best: no checkpoint knows the metric 'los' yet (known: loss)"]


def test_a_damaged_best_pushes_out_no_valid_one(place: Place, store: CheckpointStore, open_again: Open) -> None:
    _, fence = take_over(store, attempt=0)
    for step, loss in [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.5)]:
        scored(store, fence, step, loss)
    damage(place, store.manifests()[-1])
    again = open_again()
    _, fence = take_over(again, attempt=1)
    again.collect_garbage(fence, keep_last=2, keep_best=Best("loss", "min", 1))
    assert steps(again) == [5, 4, 2]
    assert [name for name in place.names() if "000000001" in name and not name.endswith(".corrupt")] == []


def test_what_would_be_removed_is_named_and_left(place: Place, store: CheckpointStore, open_again: Open) -> None:
    _, old = take_over(store, attempt=0)
    for step in range(1, 6):
        save(store, old, step)
    place.write("step-000000009.e0001.0a0b0c0d.ckpt", b"never committed")
    before = sorted(place.names())
    doomed = store.garbage(keep_last=2)
    assert sorted(place.names()) == before
    _, fence = take_over(open_again(), attempt=0)
    assert sorted(store.collect_garbage(fence, keep_last=2)) == sorted(doomed)
    assert "step-000000009.e0001.0a0b0c0d.ckpt" in doomed
    assert steps(store) == [5, 4]


# --- listing, copying


def test_the_inventory_says_of_each_whether_it_can_be_used(
    place: Place, store: CheckpointStore, open_again: Open
) -> None:
    assert store.inventory() == []
    _, old = take_over(store, attempt=0)
    good, torn, gone, short = (save(store, old, step) for step in (10, 12, 14, 20))
    save(store, old, 50)
    store.open_epoch(attempt=1, base=short, discard_newer=True)
    place.write(short.name.data, b"short")
    place.remove(gone.name.data)
    place.write(torn.name.manifest, b"{")
    before = sorted(place.names())
    listed = open_again().inventory()
    assert [entry.name.step for entry in listed] == [50, 20, 14, 12, 10]
    assert [entry.live for entry in listed] == [False, True, True, True, True]
    problems = [entry.problem or "" for entry in listed]
    assert "replaced" in problems[0]
    assert "5 bytes" in problems[1]
    assert "is missing" in problems[2]
    assert "not a manifest" in problems[3]
    assert listed[4].problem is None
    assert listed[4].manifest == good
    assert listed[4].location == f"{store.uri}/{good.name.data}"
    assert sorted(place.names()) == before


def test_the_owner_is_the_newest_attempt_that_counts(store: CheckpointStore, open_again: Open) -> None:
    assert store.owner() is None
    _, old = take_over(store, attempt=3)
    save(store, old, 10)
    assert store.owner() == old
    _, fence = take_over(open_again(), attempt=4)
    assert store.owner() == fence


def test_a_copy_is_whole_and_compared(place: Place, store: CheckpointStore, tmp_path: Path) -> None:
    manifest = save(store, store.open_epoch(attempt=0, base=None), 10)
    read = list[int]()
    path = store.copy_to(tmp_path / "copy" / "here", manifest, reading=read.append)
    assert path.read_bytes() == content(10)
    assert sum(read) == manifest.size_bytes
    assert sorted(entry.name for entry in path.parent.iterdir()) == [manifest.name.data, manifest.name.manifest]
    assert found(open_store(str(path.parent))).manifest.files == manifest.files  # as a checkpoint in its own right
    damage(place, manifest)
    with pytest.raises(CheckpointCorrupt, match="does not match its hash"):
        store.copy_to(tmp_path / "other", manifest)
    assert list((tmp_path / "other").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not copy"):
        store.copy_to(tmp_path / "file", manifest)
    assert place.names().count(manifest.name.data) == 1


def test_sizes_are_those_of_the_files(place: Place, store: CheckpointStore) -> None:
    assert store.sizes() == {}
    manifest = save(store, store.open_epoch(attempt=0, base=None), 10)
    sizes = store.sizes()
    assert sizes[manifest.name.data] == manifest.size_bytes
    assert sizes[manifest.name.manifest] == len(place.read(manifest.name.manifest))

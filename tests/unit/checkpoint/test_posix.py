"""What only the directory store has: the order of its operations, its files, and file systems that misbehave."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from orchestrator.checkpoint import Fence, Manifest, PosixStore, posix, take_over
from orchestrator.errors import CheckpointCorrupt, CheckpointError, Fenced
from tests.polling import poll

COMMIT = [
    "check-before",
    "data-create",
    "data-write",
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
]


@pytest.fixture
def store(tmp_path: Path) -> PosixStore:
    return PosixStore(tmp_path / "checkpoints")


def save(store: PosixStore, fence: Fence, step: int, trace: Callable[[str], None] | None = None) -> Manifest:
    return store.commit(fence, lambda f: f.write(b"%d" % step), step=step, epoch=0, world_size=1, trace=trace)


def names(store: PosixStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def failing(operation: str, code: int) -> Callable[[str], None]:
    def trace(op: str) -> None:
        if op == operation:
            raise OSError(code, os.strerror(code))

    return trace


# --- the order of a commit, and what is on disk


def test_data_then_manifest_then_the_question_then_the_pointer(store: PosixStore) -> None:
    _, fence = take_over(store, attempt=0)
    operations: list[str] = []
    save(store, fence, 1, operations.append)
    assert operations == COMMIT


def test_the_files_of_a_run(store: PosixStore) -> None:
    _, fence = take_over(store, attempt=0)
    manifest = save(store, fence, 120)
    stem = f"step-000000120.e0001.{manifest.nonce}"
    assert names(store) == ["epoch-0001.json", "last.ckpt", f"{stem}.ckpt", f"{stem}.json"]
    assert (store.directory / "last.ckpt").readlink() == Path(f"{stem}.ckpt")  # relative: survives a moved directory


def test_everything_before_the_manifests_rename_leaves_no_trace_when_it_fails(store: PosixStore) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    before = names(store)
    for operation in COMMIT[1:10]:  # to the directory fsync after the manifest's rename: not durable, so taken back
        for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            with pytest.raises(CheckpointError, match=errno.errorcode[code]):
                save(store, fence, 2, failing(operation, code))
            assert names(store) == before
    assert save(store, fence, 2).step == 2


@pytest.mark.parametrize("operation", ["pointer-create", "pointer-rename", "pointer-dirsync"])
def test_a_pointer_that_cannot_be_swapped_does_not_unmake_a_commit(
    store: PosixStore, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, fence = take_over(store, attempt=0)
    with caplog.at_level(logging.WARNING):
        manifest = save(store, fence, 1, failing(operation, errno.EPERM))
    assert store.manifests() == [manifest]
    assert "last.ckpt was not updated" in caplog.text
    assert not [name for name in names(store) if name.endswith(".tmp")]


def test_the_disk_error_is_told_not_what_the_serialiser_made_of_it(
    store: PosixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fence = take_over(store, attempt=0)

    def full(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(file: BinaryIO) -> None:
        monkeypatch.setattr(posix.os, "write", full)
        try:
            file.write(bytes(40 << 20))
        except OSError:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0") from None

    with pytest.raises(CheckpointError, match="ENOSPC") as caught:
        store.commit(fence, write, step=1, epoch=0, world_size=1)
    assert "keep_last" in (caught.value.hint or "")
    opened = []
    for link in list(Path("/proc/self/fd").iterdir()):
        with suppress(FileNotFoundError):  # of the listing itself
            opened.append(str(link.readlink()))
    assert not [path for path in opened if str(store.directory) in path]  # else the disk stays full


def test_what_an_interrupted_save_still_writes_ends_in_no_other_file(
    store: PosixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the last blocks are written; the next save gets the descriptor that was closed."""
    _, fence = take_over(store, attempt=0)
    may_write, interrupted = threading.Event(), []

    def slowly(descriptor: int, data: memoryview) -> int:
        if threading.current_thread().name == "orch-write":
            may_write.wait(60)
        return write(descriptor, data)

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        if thread.name.startswith("orch-") and not interrupted:
            interrupted.append(thread.name)
            raise KeyboardInterrupt
        if not interrupted or thread.name != "orch-write" or may_write.is_set():
            wait(thread, timeout)

    write, wait = os.write, threading.Thread.join
    monkeypatch.setattr(posix.os, "write", slowly)
    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        store.commit(fence, lambda file: file.write(bytes(9 << 20)), step=1, epoch=0, world_size=1)

    def serialise(file: BinaryIO) -> None:
        may_write.set()
        poll(lambda: "orch-write" not in [thread.name for thread in threading.enumerate()], "the old thread to end")
        file.write(b"small")

    manifest = store.commit(fence, serialise, step=2, epoch=0, world_size=1)
    assert interrupted == ["orch-hash"]
    assert store.verify(manifest) is None
    assert manifest.path.read_bytes() == b"small"


@pytest.mark.parametrize("operation", COMMIT[:11])
def test_a_replaced_attempt_that_asks_after_the_take_over_leaves_the_pointer_alone(
    store: PosixStore, operation: str
) -> None:
    _, old = take_over(store, attempt=0)
    base = save(store, old, 1)
    new_store = PosixStore(store.directory)

    def trace(op: str) -> None:
        if op == operation:
            new_store.open_epoch(attempt=1, base=base, discard_newer=True)

    with pytest.raises(Fenced):
        save(store, old, 2, trace)
    assert (store.directory / "last.ckpt").readlink().name == base.name.data
    assert new_store.manifests() == [base]


# --- epochs


def test_racing_attempts_get_an_epoch_each(store: PosixStore) -> None:
    def start(_: int) -> int | None:
        try:
            return PosixStore(store.directory).open_epoch(attempt=0, base=None).epoch
        except Fenced:  # another one was faster; this one holds a lower number
            return None

    with ThreadPoolExecutor(8) as pool:
        epochs = [epoch for epoch in pool.map(start, range(24)) if epoch is not None]
    assert len(epochs) == len(set(epochs))
    assert 24 in epochs
    assert [name for name in names(store) if not name.startswith(".")] == [f"epoch-{n:04d}.json" for n in range(1, 25)]
    assert not [name for name in names(store) if name.endswith(".tmp")]


def test_without_hard_links_the_fence_is_still_exclusive(tmp_path: Path) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def open_one(_: int) -> Fence | None:
        try:
            return PosixStore(tmp_path, link=no_links).open_epoch(attempt=3, base=None)
        except Fenced:
            return None

    with ThreadPoolExecutor(6) as pool:
        fences = [fence for fence in pool.map(open_one, range(12)) if fence]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"epoch-{n:04d}.json" for n in range(1, 13)]
    newest = max(fences, key=lambda fence: fence.epoch)
    assert PosixStore(tmp_path).commit(newest, lambda f: f.write(b"x"), step=1, epoch=0, world_size=1)


def test_a_link_whose_answer_was_lost_is_recognised(tmp_path: Path) -> None:
    def link(source: Path, target: Path) -> None:
        os.link(source, target)
        os.link(source, target)  # the client asks again: EEXIST

    assert PosixStore(tmp_path, link=link).open_epoch(attempt=0, base=None).epoch == 1
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001.json"]


def test_epoch_numbers_are_not_used_again_when_fences_were_lost(store: PosixStore) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    (store.directory / "epoch-0001.json").unlink()
    result, fence = take_over(store, attempt=1)
    assert fence.epoch == 2
    assert result is not None
    assert result.manifest.step == 1


def test_a_base_removed_while_we_were_paused_withdraws_the_claim(store: PosixStore) -> None:
    _, old = take_over(store, attempt=0)
    base = save(store, old, 10)
    new_store = PosixStore(store.directory)

    def paused(operation: str) -> None:
        if operation == "fence-link":
            for step in (20, 30, 40):
                save(store, old, step)
            store.collect_garbage(old, keep_last=2)

    with pytest.raises(CheckpointError, match="removed while"):
        new_store.open_epoch(attempt=1, base=base, trace=paused)
    result, fence = take_over(new_store, attempt=1)
    assert result is not None
    assert result.manifest.step == 40  # nothing was buried
    assert fence.epoch == 3


@pytest.mark.parametrize("harm", [b"", b"{}", b"\xff\xff", b'{"epoch": 1}'])
def test_a_damaged_fence_is_reported_and_its_base_remembered(store: PosixStore, harm: bytes) -> None:
    _, first = take_over(store, attempt=0)
    save(store, first, 10)
    second_store = PosixStore(store.directory)
    _, second = take_over(second_store, attempt=1)
    save(second_store, second, 15)
    # a late one of the first attempt, which the damaged fence would have bounded
    store._require_ownership = lambda fence: None  # type: ignore[method-assign]
    save(store, first, 30)
    (store.directory / "epoch-0002.json").write_bytes(harm)
    reader = PosixStore(store.directory, sleep=lambda s: None)
    result = reader.find()
    assert result is not None
    assert result.manifest.step == 15  # its own manifest remembers the base
    assert any(skipped.name == "epoch-0002.json" for skipped in result.skipped)
    result, third = take_over(reader, attempt=2)
    save(reader, third, 16)
    save(reader, third, 17)
    assert reader.collect_garbage(third, keep_last=2)
    assert [m.step for m in reader.manifests()] == [17, 16]  # now the third fence remembers it


def test_with_an_unknown_base_nothing_is_thrown_away(store: PosixStore) -> None:
    _, first = take_over(store, attempt=0)
    for step in (10, 20, 30):
        save(store, first, step)
    (store.directory / "epoch-0002.json").touch()  # created, and the machine died before a byte was in it
    reader = PosixStore(store.directory, sleep=lambda s: None)
    result, third = take_over(reader, attempt=2)
    assert result is not None
    assert result.manifest.step == third.base_step == 30
    assert reader.collect_garbage(third, keep_last=2) == []
    assert [m.step for m in reader.manifests()] == [30, 20, 10]


# --- file systems that misbehave


def test_a_file_that_another_machine_does_not_see_yet_is_waited_for(store: PosixStore) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    manifest = save(store, fence, 2)
    hidden = manifest.path.with_name("elsewhere")
    manifest.path.rename(hidden)

    def sleep(seconds: float) -> None:
        if hidden.exists():
            hidden.rename(manifest.path)

    result = PosixStore(store.directory, sleep=sleep).find()
    assert result is not None
    assert result.manifest == manifest
    assert result.skipped == ()


def test_what_another_writers_collection_removes_meanwhile_is_not_damage(store: PosixStore) -> None:
    _, fence = take_over(store, attempt=0)
    old = [save(store, fence, step) for step in (1, 2)]
    old[1].path.unlink()  # as its collection does, after the manifest; we had listed that before

    def sleep(seconds: float) -> None:
        manifest_path = old[1].path.with_name(old[1].name.manifest)
        if manifest_path.exists():
            manifest_path.unlink()
            save(store, fence, 3)

    result = PosixStore(store.directory, sleep=sleep).find()
    assert result is not None
    assert result.manifest.step == 3
    assert result.skipped == ()
    assert not [name for name in names(store) if "corrupt" in name]


def test_a_first_mismatch_is_looked_at_twice(store: PosixStore) -> None:
    _, fence = take_over(store, attempt=0)
    manifest = save(store, fence, 7)
    good = manifest.path.read_bytes()
    manifest.path.write_bytes(b"8")
    result = PosixStore(store.directory, sleep=lambda s: manifest.path.write_bytes(good) and None).find()
    assert result is not None
    assert result.manifest == manifest


def unreadable(manifest: Manifest) -> None:
    """Make reading fail with an error (EISDIR) that says nothing about the content."""
    manifest.path.rename(manifest.path.with_name("kept"))
    manifest.path.mkdir()


def bad_sector(manifest: Manifest, patch: pytest.MonkeyPatch) -> None:
    original = posix._mismatch

    def mismatch(path: Path, *args: Any) -> str | None:
        if path == manifest.path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(path, *args)

    patch.setattr(posix, "_mismatch", mismatch)


def test_a_bad_sector_is_passed_over_but_not_condemned(store: PosixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    manifest = save(store, fence, 2)
    bad_sector(manifest, monkeypatch)
    reader = PosixStore(store.directory, sleep=lambda s: None)
    result, fence = take_over(reader, attempt=1)
    assert result is not None
    assert result.manifest.step == 1
    assert "EIO" in result.skipped[0].reason
    for step in (2, 3, 4):
        save(reader, fence, step)
    assert [m.step for m in reader.manifests()] == [4, 3, 2, 1]
    reader.collect_garbage(fence, keep_last=2)
    assert [m.step for m in reader.manifests()] == [4, 3]
    assert {manifest.name.data, manifest.name.manifest} <= set(names(store))


def test_the_newest_is_not_given_up_for_an_error_of_the_moment(store: PosixStore) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    manifest = save(store, fence, 2)
    unreadable(manifest)
    reader = PosixStore(store.directory, sleep=lambda s: None)
    with pytest.raises(CheckpointError, match=f"{manifest.name.data}.*EISDIR") as caught:
        take_over(reader, attempt=1)
    assert "nothing was changed" in (caught.value.hint or "")
    assert not (store.directory / "epoch-0002.json").exists()
    manifest.path.rmdir()
    manifest.path.with_name("kept").rename(manifest.path)
    result, _ = take_over(reader, attempt=1)
    assert result is not None
    assert result.manifest == manifest


def test_when_nothing_can_be_read_the_run_waits_instead_of_starting_over(store: PosixStore) -> None:
    _, fence = take_over(store, attempt=0)
    manifest = save(store, fence, 1)
    unreadable(manifest)
    reader = PosixStore(store.directory, sleep=lambda s: None)
    with pytest.raises(CheckpointError, match="EISDIR") as caught:
        take_over(reader, attempt=1)
    assert not isinstance(caught.value, CheckpointCorrupt)
    manifest.path.rmdir()
    manifest.path.with_name("kept").rename(manifest.path)
    assert reader.find() is not None


def test_setting_aside_never_overwrites_what_was_set_aside_before(store: PosixStore) -> None:
    _, fence = take_over(store, attempt=0)
    save(store, fence, 1)
    manifest = save(store, fence, 2)
    copies = {path.name: path.read_bytes() for path in store.directory.glob(f"{manifest.name.stem}.*")}
    for n in range(3):
        for name, data in copies.items():
            (store.directory / name).write_bytes(data)
        manifest.path.write_bytes(b"damaged %d" % n)
        assert store.find() is not None
    kept = sorted(store.directory.glob("*.ckpt.corrupt*"))
    assert [path.read_bytes() for path in kept] == [b"damaged 0", b"damaged 1", b"damaged 2"]


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda d: d.write_bytes(b"a file"), "EEXIST|ENOTDIR"),
        (lambda d: d.symlink_to("/proc/nowhere/x"), "ENOENT|EEXIST|EPERM"),
    ],
)
def test_a_directory_that_cannot_be_one(tmp_path: Path, prepare: Callable[[Path], object], words: str) -> None:
    directory = tmp_path / "checkpoints"
    prepare(directory)
    with pytest.raises(CheckpointError, match=words) as caught:
        take_over(PosixStore(directory), attempt=0)
    assert caught.value.hint


def test_a_directory_removed_under_a_running_attempt(store: PosixStore) -> None:
    _, fence = take_over(store, attempt=0)
    (store.directory / "epoch-0001.json").unlink()
    store.directory.rmdir()
    with pytest.raises(CheckpointError, match="ENOENT"):
        save(store, fence, 1)


# --- garbage


def test_leftovers_of_older_epochs_only_are_swept(store: PosixStore) -> None:
    _, first = take_over(store, attempt=0)
    kept = save(store, first, 1)
    old = [
        ".step-000000009.e0001.aaaaaaaa.ckpt.0123456789ab.tmp",
        ".step-000000009.e0001.aaaaaaaa.json.0123456789ab.tmp",
        ".last.ckpt.e0001.0123456789ab.tmp",
        ".epoch-0002.json.0123456789ab.tmp",
        "step-000000009.e0001.aaaaaaaa.ckpt",
    ]
    own = [
        ".step-000000009.e0002.aaaaaaaa.ckpt.0123456789ab.tmp",
        ".last.ckpt.e0002.0123456789ab.tmp",
        ".epoch-0003.json.0123456789ab.tmp",
        "step-000000009.e0002.aaaaaaaa.ckpt",
    ]
    foreign = ["notes.txt", "hpc_ckpt_1.ckpt", "step-000000009.e0001.aaaaaaaa.ckpt.corrupt", "step-9.ckpt", ".x.tmp"]
    _, second = take_over(store, attempt=1)
    for name in (*old, *own, *foreign):
        (store.directory / name).write_bytes(b"x")
    assert sorted(store.collect_garbage(second, keep_last=2)) == sorted(old)
    left = names(store)
    assert set(own) | set(foreign) | {kept.name.data, kept.name.manifest} <= set(left)


def test_dead_checkpoints_go_once_a_newer_one_is_verified(store: PosixStore) -> None:
    _, first = take_over(store, attempt=0)
    save(store, first, 1)
    new_store = PosixStore(store.directory)
    _, second = take_over(new_store, attempt=1)
    store._require_ownership = lambda fence: None  # type: ignore[method-assign]  # paused since its last question
    late = save(store, first, 5)
    assert (store.directory / "last.ckpt").readlink().name == late.name.data
    newest = save(new_store, second, 2)
    (store.directory / "last.ckpt").unlink()
    (store.directory / "last.ckpt").symlink_to(late.name.data)  # the late one swaps the pointer last
    removed = new_store.collect_garbage(second, keep_last=3)
    assert set(removed) == {late.name.data, late.name.manifest}
    assert [m.step for m in new_store.manifests()] == [2, 1]
    assert (store.directory / "last.ckpt").readlink().name == newest.name.data


def test_manifests_are_removed_before_their_data(store: PosixStore) -> None:
    _, fence = take_over(store, attempt=0)
    for step in range(4):
        save(store, fence, step)
    states: dict[str, tuple[int, int]] = {}

    def trace(operation: str) -> None:
        states[operation] = (len(list(store.directory.glob("s*.json"))), len(list(store.directory.glob("s*.ckpt"))))

    store.collect_garbage(fence, keep_last=2, trace=trace)
    assert states == {
        "gc-verify": (4, 4),
        "gc-unlink-manifest": (4, 4),
        "gc-dirsync": (2, 4),
        "gc-unlink-data": (2, 4),
        "gc-sweep": (2, 2),
    }

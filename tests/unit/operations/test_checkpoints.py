"""Checkpoints of a run as a person handles them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import operations
from orchestrator.backends.base import SchedulerState
from orchestrator.checkpoint import Brought, CheckpointStore, Fence, Manifest, Refuge, open_store, take_over
from orchestrator.errors import CheckpointCorrupt, CheckpointError, Fenced, RefusedError, SchedulerUnavailable
from orchestrator.operations import checkpoints
from orchestrator.operations.checkpoints import open_run_store
from orchestrator.registry import read_events
from tests.unit.operations.conftest import World

KEYS = {"step", "epoch", "attempt", "path", "size_bytes", "sha256", "valid", "committed_at"}


def saved(world: World, run: str, *steps: int, attempt: int = 0) -> tuple[CheckpointStore, Fence]:
    """Checkpoints of one attempt of a run."""
    store = open_run_store(world.paths(run))
    _, fence = take_over(store, attempt=attempt)
    for step in steps:
        store.commit(fence, lambda f, s=step: f.write(b"state %d" % s), step=step, epoch=1, world_size=1)  # type: ignore[misc]
    return store, fence


def place(world: World, run: str) -> str:
    return str(world.paths(run).run_dir)


def damage(manifest: Manifest) -> None:
    manifest.path.write_bytes(b"x" * manifest.size_bytes)


def names(world: World, run: str) -> list[str]:
    return sorted(path.name for path in world.paths(run).checkpoints.iterdir())


def rollback(world: World, run: str, step: int, **options: Any) -> Any:
    return operations.rollback(place(world, run), step=step, open_backend=world.backend.open, **options)


def collect(world: World, run: str, **options: Any) -> Any:
    return operations.collect_checkpoints(place(world, run), open_backend=world.backend.open, **options)


# --- looking


def test_the_list_has_all_newest_first_with_what_is_known_of_each(world: World) -> None:
    run, _ = world.running()
    assert operations.list_checkpoints(place(world, run)) == []
    store, _ = saved(world, run, 10, 20)
    found = operations.list_checkpoints(place(world, run))
    assert [(entry.step, entry.attempt, entry.epoch, entry.valid) for entry in found] == [
        (20, 0, 1, True),
        (10, 0, 1, True),
    ]
    manifest = store.manifests()[0]
    document = found[0].as_json()
    assert set(document) == KEYS
    assert document["path"] == str(manifest.path)
    assert (document["size_bytes"], document["sha256"]) == (8, manifest.files[0].sha256)


def test_a_moved_root_is_followed(world: World) -> None:
    run, _ = world.running()
    saved(world, run, 10)
    shutil.move(world.root, world.root.with_name("moved"))
    [entry] = operations.list_checkpoints(run, root=world.root.with_name("moved"))
    assert entry.path.startswith(str(world.root.with_name("moved")))


def test_verify_reads_what_the_list_only_measures(world: World) -> None:
    run, _ = world.running()
    store, _ = saved(world, run, 10, 20, 30)
    damage(store.manifests()[1])
    before = names(world, run)
    assert [entry.valid for entry in operations.list_checkpoints(place(world, run))] == [True, True, True]
    read = list[tuple[int, int]]()
    found = operations.verify_checkpoints(place(world, run), reading=lambda count, total: read.append((count, total)))
    assert [(entry.step, entry.valid) for entry in found] == [(30, True), (20, False), (10, True)]
    assert "does not match its hash" in (found[1].problem or "")
    assert {total for _, total in read} == {24}
    assert names(world, run) == before
    assert [entry.step for entry in operations.verify_checkpoints(place(world, run), step=10)] == [10]
    with pytest.raises(CheckpointError, match="no live checkpoint of step 11") as caught:
        operations.verify_checkpoints(place(world, run), step=11)
    assert "30, 20, 10" in (caught.value.hint or "")


def test_a_file_of_another_size_is_not_valid_in_the_list_either(world: World) -> None:
    run, _ = world.running()
    store, _ = saved(world, run, 10)
    store.manifests()[0].path.write_bytes(b"")
    [entry] = operations.list_checkpoints(place(world, run))
    assert not entry.valid
    assert "0 bytes" in (entry.problem or "")


# --- copying


def test_pull_copies_the_newest_or_the_one_asked_for(world: World, tmp_path: Path) -> None:
    run, _ = world.running()
    saved(world, run, 10, 20)
    result = operations.pull_checkpoint(place(world, run), tmp_path / "copy")
    assert (result.step, result.path.read_bytes()) == (20, b"state 20")
    assert operations.pull_checkpoint(place(world, run), tmp_path / "other", step=10).path.read_bytes() == b"state 10"
    assert open_store(str(tmp_path / "copy")).manifests()[0].step == 20
    with pytest.raises(CheckpointError, match="step 15"):
        operations.pull_checkpoint(place(world, run), tmp_path / "copy", step=15)


# --- removing


def test_collecting_keeps_what_the_spec_says_and_sweeps_the_last_attempts_leftovers(world: World) -> None:
    world.spec.write_text(world.spec.read_text() + "checkpoint: {keep_last: 2, keep_every: 20}\n")
    run = world.ended("needs_resume", "preempted")
    saved(world, run, 10, 20, 30, 40, 50)
    left = world.paths(run).checkpoints / ".step-000000060.e0001.0a0b0c0d.ckpt.0123456789ab.tmp"
    left.write_bytes(b"1234567")
    before = names(world, run)
    told = collect(world, run, dry_run=True)
    assert names(world, run) == before
    done = collect(world, run)
    assert done.removed == told.removed
    assert done.freed_bytes == told.freed_bytes > 7 + 8
    assert left.name in done.removed
    assert done.steps_left == told.steps_left == (50, 40, 20)
    assert [entry.step for entry in operations.list_checkpoints(place(world, run))] == [50, 40, 20]


def test_who_still_writes_unseen_is_fenced_before_anything_is_removed(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    store, fence = saved(world, run, 10, 20)
    collect(world, run)
    with pytest.raises(Fenced):
        store.commit(fence, lambda f: f.write(b"late"), step=30, epoch=0, world_size=1)
    found, _ = take_over(open_run_store(world.paths(run)), attempt=1)
    assert found is not None
    assert found.manifest.step == 20


def meanwhile(patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """`act` happens once, while emergency saves are brought to the store; makes a disk need that, too."""

    class Slow(Refuge):
        def bring_to(self, store: CheckpointStore, **options: Any) -> Iterator[Brought]:
            brought = list(super().bring_to(store, **options))
            act()
            return iter(brought)

    patch.setattr(checkpoints, "_refuge", lambda store, paths: Slow(paths.run_dir / "waiting"))


def test_an_attempt_that_starts_while_saves_are_brought_in_is_not_fenced(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.ended("needs_resume", "preempted")
    saved(world, run, 10, 20, 30, 40)
    claimed: list[tuple[CheckpointStore, Fence]] = []

    def resumed() -> None:
        world.resume(run)
        claimed.append(saved(world, run, 50, attempt=1))

    meanwhile(monkeypatch, resumed)
    with pytest.raises(RefusedError, match="belong to its attempt"):
        collect(world, run)
    store, fence = claimed[0]
    store.commit(fence, lambda f: f.write(b"on"), step=60, epoch=0, world_size=1)
    assert [manifest.step for manifest in store.manifests()] == [60, 50, 40, 30, 20, 10]


def test_an_attempt_that_came_and_went_while_saves_are_brought_in_keeps_the_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.ended("needs_resume", "preempted")
    saved(world, run, 10, 20, 30, 40)
    meanwhile(monkeypatch, lambda: saved(world, run, 50, attempt=1))
    with pytest.raises(Fenced):
        collect(world, run)
    store = open_run_store(world.paths(run))
    assert [manifest.step for manifest in store.manifests()] == [50, 40, 30, 20, 10]


def test_of_a_run_without_checkpoints_nothing_is_removed_or_made(world: World) -> None:
    run = world.ended("failed", "failure")
    assert collect(world, run).removed == ()
    assert not world.paths(run).checkpoints.exists()


def test_what_is_called_removed_is_gone_where_nobody_has_claimed_the_run(world: World) -> None:
    run = world.ended("failed", "failure")
    saved(world, run, 10, 20, 30, 40)
    for fence in world.paths(run).checkpoints.glob("epoch-*.json"):
        fence.unlink()
    told = collect(world, run, dry_run=True)
    done = collect(world, run)
    assert done.removed == told.removed != ()
    assert not set(done.removed) & set(names(world, run))
    assert done.steps_left == (40, 30, 20)


def everything(world: World, run: str) -> dict[str, bytes]:
    """Every file beside the checkpoints, with what is in it."""
    return {
        path.name: bytes(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in world.paths(run).checkpoints.iterdir()
    }


def test_a_damaged_newest_is_not_given_up_by_collecting(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    store, _ = saved(world, run, 10, 20, 30, 40, 600, 602)
    newest, whole = store.manifests()[0], store.manifests()[0].path.read_bytes()
    newest.path.write_bytes(whole[:-1])
    before = everything(world, run)
    for options in ({}, {"dry_run": True}):
        with pytest.raises(CheckpointCorrupt, match=r"damaged; nothing was removed.*\n  step 602: .* bytes") as caught:
            collect(world, run, **options)
        assert everything(world, run) == before
        assert f"orch ckpt verify {run}" in (caught.value.hint or "")
        assert "docs/checkpoints.md" in (caught.value.hint or "")
        assert f"orch ckpt rollback {run} --step 600" in (caught.value.hint or "")
    newest.path.write_bytes(whole)  # a copy, restored
    assert collect(world, run).steps_left == (602, 600, 40)
    found, _ = take_over(open_run_store(world.paths(run)), attempt=1)
    assert found is not None
    assert found.manifest.step == 602


def test_damage_that_only_reading_finds_stops_a_collection_too(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    store, _ = saved(world, run, 10, 20, 30, 40)
    damage(store.manifests()[0])
    store.manifests()[1].path.with_name(store.manifests()[1].name.manifest).write_text("{")
    before = everything(world, run)
    with pytest.raises(CheckpointCorrupt, match=r"(?s)step 40: .*hash.*\n  step 30: ") as caught:
        collect(world, run)
    assert "--step 20" in (caught.value.hint or "")
    assert everything(world, run) == before
    assert rollback(world, run, 20).checkpoints_given_up == 2
    assert collect(world, run).steps_left == (20, 10)


def test_a_newest_that_was_set_aside_is_not_buried_by_collecting(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    store, _ = saved(world, run, 10, 20, 30)
    newest, whole = store.manifests()[0], store.manifests()[0].path.read_bytes()
    damage(newest)
    assert store.find() is not None  # by an attempt that ended before it claimed the run
    before = everything(world, run)
    for options in ({}, {"dry_run": True}):
        with pytest.raises(CheckpointCorrupt, match=r"step 30: it was set aside as .*\.corrupt"):
            collect(world, run, **options)
    assert everything(world, run) == before
    with pytest.raises(RefusedError):
        rollback(world, run, 20, agree=lambda plan: (plan.checkpoints_given_up, plan.steps_given_up) != (1, 10))
    corrupt = newest.path.with_name(f"{newest.name.manifest}.corrupt")
    newest.path.write_bytes(whole)
    shutil.copyfile(corrupt, corrupt.with_suffix(""))
    assert collect(world, run).steps_left == (30, 20, 10)


def test_what_an_attempt_has_set_aside_and_left_behind_does_not_stop_a_collection(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    store, _ = saved(world, run, 10, 20, 30)
    damage(store.manifests()[0])
    saved(world, run, 21, 22, attempt=1)
    assert collect(world, run).steps_left == (22, 21, 20)


def test_of_a_completed_run_whose_checkpoints_are_all_damaged_none_is_renamed(world: World) -> None:
    run = world.ended("completed", "completed")
    store, _ = saved(world, run, 10, 20, 30)
    for manifest in store.manifests():
        damage(manifest)
    before = everything(world, run)
    with pytest.raises(CheckpointCorrupt) as caught:
        collect(world, run)
    assert [line.split(":")[0].strip() for line in caught.value.message.splitlines()[1:]] == [
        "step 30",
        "step 20",
        "step 10",
    ]
    assert "is not rolled back" in (caught.value.hint or "")
    assert everything(world, run) == before


def test_a_damaged_emergency_save_is_not_buried_by_collecting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.ended("needs_resume", "preempted")
    refuge = waiting(world, run, saved(world, run, 10, 20, 30, 40)[1], 50)
    save, whole = refuge.store.manifests()[0], refuge.store.manifests()[0].path.read_bytes()
    damage(save)
    meanwhile(monkeypatch, lambda: None)
    before = everything(world, run)
    with pytest.raises(CheckpointCorrupt, match="step 50: "):
        collect(world, run)
    assert everything(world, run) == before
    save.path.write_bytes(whole)
    assert collect(world, run).steps_left == (50, 40, 30)


def test_a_newest_that_cannot_be_read_now_stops_a_collection(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.ended("needs_resume", "preempted")
    saved(world, run, 10, 20)
    before = everything(world, run)
    monkeypatch.setattr(CheckpointStore, "verify", lambda self, manifest, **_: "EIO")
    monkeypatch.setattr(CheckpointStore, "is_unreadable", lambda self, manifest: True)
    with pytest.raises(CheckpointError, match="step 20, cannot be read now: EIO"):
        collect(world, run)
    assert everything(world, run) == before


@pytest.mark.parametrize("state", [SchedulerState.PENDING, SchedulerState.RUNNING])
def test_nothing_is_taken_from_a_run_that_lives(world: World, state: SchedulerState) -> None:
    run, _ = world.running()
    saved(world, run, 10, 20, 30)
    world.backend.set("101", state)
    before = names(world, run)
    for act in (
        lambda: collect(world, run),
        lambda: collect(world, run, dry_run=True),
        lambda: rollback(world, run, 10),
    ):
        with pytest.raises(RefusedError, match=r"running|queued|preempted"):
            act()
    world.backend.down = True
    with pytest.raises(SchedulerUnavailable):
        rollback(world, run, 10)
    assert names(world, run) == before


# --- going back


def test_after_a_rollback_the_next_attempt_begins_there(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    saved(world, run, 10, 20, 30)
    before = names(world, run)
    result = rollback(world, run, 10)
    assert (result.step, result.checkpoints_given_up, result.steps_given_up) == (10, 2, 20)
    assert set(before) <= set(names(world, run))  # nothing is deleted
    assert [(entry.step, entry.valid) for entry in operations.list_checkpoints(place(world, run))] == [
        (30, False),
        (20, False),
        (10, True),
    ]
    status = world.status(run)
    assert status.last_checkpoint is not None
    assert status.last_checkpoint.step == 10
    assert world.resume(run).action == "resumed"
    found, fence = take_over(open_run_store(world.paths(run)), attempt=1)
    assert found is not None
    assert (found.manifest.step, fence.base_step) == (10, 10)
    store, fence = saved(world, run, 15, 25, attempt=1)
    store.collect_garbage(fence, keep_last=3)
    assert [manifest.step for manifest in store.manifests()] == [25, 15, 10]
    assert not [name for name in names(world, run) if name.startswith(("step-000000030", "step-000000020"))]


def test_back_to_a_step_that_is_not_there_or_damaged(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    store, _ = saved(world, run, 10, 20, 30)
    before = names(world, run)
    with pytest.raises(CheckpointError, match="no live checkpoint of step 15") as caught:
        rollback(world, run, 15)
    assert "30, 20, 10" in (caught.value.hint or "")
    damage(store.manifests()[-1])
    with pytest.raises(CheckpointCorrupt, match="step 10 is damaged"):
        rollback(world, run, 10)
    assert names(world, run) == before


def test_who_says_no_changes_nothing(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    saved(world, run, 10, 20)
    before = names(world, run)
    with pytest.raises(RefusedError, match="nothing was changed"):
        rollback(world, run, 10, agree=lambda plan: False)
    assert names(world, run) == before
    assert "rolled_back" not in [event["event"] for event in read_events(world.paths(run))]


def test_a_completed_run_is_not_rolled_back(world: World) -> None:
    run = world.ended("completed", "completed")
    saved(world, run, 10, 20)
    with pytest.raises(RefusedError, match="completed"):
        rollback(world, run, 10)


def test_back_and_back_again(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    saved(world, run, 10, 20, 30)
    rollback(world, run, 20)
    rollback(world, run, 10)
    with pytest.raises(CheckpointError, match="there is no live"):
        rollback(world, run, 20)
    found, _ = take_over(open_run_store(world.paths(run)), attempt=1)
    assert found is not None
    assert found.manifest.step == 10


# --- pushing


def test_there_is_nowhere_to_push_checkpoints_that_are_on_disk(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    with pytest.raises(RefusedError, match="nowhere to push"):
        operations.push_checkpoint(place(world, run), open_backend=world.backend.open)


def waiting(world: World, run: str, fence: Fence, step: int) -> Refuge:
    """An emergency save that waits, as it does with an object store."""
    refuge = Refuge(world.paths(run).run_dir / "waiting")
    refuge.open().commit(fence, lambda f: f.write(b"waits"), step=step, epoch=1, world_size=1)
    return refuge


def test_what_was_pushed_is_forgotten_here(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.ended("needs_resume", "preempted")
    refuge = waiting(world, run, saved(world, run, 10)[1], 20)
    meanwhile(monkeypatch, lambda: None)
    assert operations.push_checkpoint(place(world, run), open_backend=world.backend.open).step == 20
    assert refuge.store.manifests() == []


def test_an_attempt_that_starts_during_a_push_still_finds_the_local_copy(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.ended("needs_resume", "preempted")
    refuge = waiting(world, run, saved(world, run, 10)[1], 20)
    meanwhile(monkeypatch, lambda: world.resume(run))
    with pytest.raises(RefusedError, match="belong to its attempt"):
        operations.push_checkpoint(place(world, run), open_backend=world.backend.open)
    assert [manifest.step for manifest in refuge.store.manifests()] == [20]
    assert [manifest.step for manifest in open_run_store(world.paths(run)).manifests()] == [20, 10]


def test_a_step_that_waits_in_the_run_directory_has_to_be_pushed_before_a_rollback(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.ended("needs_resume", "preempted")
    waiting(world, run, saved(world, run, 10)[1], 20)
    meanwhile(monkeypatch, lambda: None)
    with pytest.raises(CheckpointError, match="step 20 waits in the run directory") as caught:
        rollback(world, run, 20)
    assert f"orch ckpt push {run}" in (caught.value.hint or "")
    with pytest.raises(CheckpointError, match="no live checkpoint of step 15"):
        rollback(world, run, 15)


@pytest.mark.parametrize("step", [None, 20])
def test_what_waits_in_the_run_directory_is_verified_and_copied_as_it_is_listed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int | None
) -> None:
    run = world.ended("needs_resume", "preempted")
    refuge = waiting(world, run, saved(world, run, 10)[1], 20)
    meanwhile(monkeypatch, lambda: None)
    read = list[tuple[int, int]]()
    found = operations.verify_checkpoints(
        place(world, run), step=step, reading=lambda count, total: read.append((count, total))
    )
    assert [entry.step for entry in found] == [20, 10][: 1 if step else 2]
    assert all(entry.valid for entry in found)
    assert sum(count for count, _ in read) == read[0][1] == sum(entry.size_bytes or 0 for entry in found)
    copy = operations.pull_checkpoint(place(world, run), tmp_path / "copy", step=step)
    assert (copy.step, copy.path.read_bytes(), copy.manifest.is_file()) == (20, b"waits", True)
    damage(refuge.store.manifests()[0])
    assert not operations.verify_checkpoints(place(world, run), step=step)[0].valid
    with pytest.raises(CheckpointCorrupt, match="step 20 is damaged"):
        operations.pull_checkpoint(place(world, run), tmp_path / "again", step=step)
    rollback(world, run, 10)
    assert operations.pull_checkpoint(place(world, run), tmp_path / "copy").step == 10
    with pytest.raises(CheckpointError, match="no live checkpoint of step 20"):
        operations.pull_checkpoint(place(world, run), tmp_path / "copy", step=20)


def test_an_older_one_is_not_copied_in_place_of_a_newest_whose_manifest_is_damaged(
    world: World, tmp_path: Path
) -> None:
    run = world.ended("needs_resume", "preempted")
    newest = saved(world, run, 10, 20)[0].manifests()[0]
    newest.path.with_name(newest.name.manifest).write_text("{")
    with pytest.raises(CheckpointCorrupt, match="step 20 is damaged") as caught:
        operations.pull_checkpoint(place(world, run), tmp_path / "copy")
    assert "--step 10" in (caught.value.hint or "")
    assert operations.pull_checkpoint(place(world, run), tmp_path / "copy", step=10).step == 10


def test_collecting_says_what_it_brings_to_the_store_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.ended("needs_resume", "preempted")
    save = waiting(world, run, saved(world, run, 10)[1], 20).store.manifests()[0]
    meanwhile(monkeypatch, lambda: None)
    told = list[tuple[bool, int, str]]()
    for dry_run in (True, False, False):
        collect(world, run, dry_run=dry_run, bringing=lambda step, path, dry=dry_run: told.append((dry, step, path)))
    assert told == [(dry_run, 20, save.location) for dry_run in (True, False)]

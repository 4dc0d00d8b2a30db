"""`orch ckpt`: look at a run's checkpoints, read them again, copy one, remove what is not wanted, go back to one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.backends import open_backend
from orchestrator.checkpoint import (
    Brought,
    CheckpointName,
    CheckpointStore,
    Found,
    Lineage,
    Listed,
    Manifest,
    Refuge,
    Retention,
    open_store,
)
from orchestrator.checkpoint.manifest import CORRUPT_SUFFIX, MANIFEST_SUFFIX
from orchestrator.errors import CheckpointCorrupt, CheckpointError, RefusedError
from orchestrator.operations.checkpoint_results import Collected, Pulled, Pushed, RolledBack, StoredCheckpoint
from orchestrator.operations.describe import OpenBackend
from orchestrator.operations.record import Record, agent_plan, load_record
from orchestrator.operations.roots import find_run
from orchestrator.operations.submission import ask_or_raise, reconcile, run_lock, translated
from orchestrator.paths import RunPaths, is_object_store
from orchestrator.registry import EventLog
from orchestrator.states import JobState
from orchestrator.words import count, spoken

Reading = Callable[[int, int], None]
"""Called while bytes are read: how many just now, how many in all."""


def open_run_store(paths: RunPaths) -> CheckpointStore:
    """Where a run keeps its checkpoints, as its plan says. Raises RegistryError without one."""
    plan = agent_plan(paths)
    checkpoint = plan["checkpoint"]
    uri = str(checkpoint["uri"])
    if uri == str(RunPaths(Path(plan["run_dir"])).checkpoints):
        uri = str(paths.checkpoints)  # the root may have been moved since
    return open_store(
        uri,
        storage_options=checkpoint.get("storage_options"),
        shared_disk=paths.checkpoints,
        claim_on_disk=checkpoint.get("fence") == "disk",
    )


# --- looking


def list_checkpoints(run: str, *, root: str | Path | None = None) -> list[StoredCheckpoint]:
    """Every committed checkpoint, newest first. `valid`: live, with a readable manifest, and files of the right size;
    their bytes are not read. With an object store, emergency saves that are still in the run directory are among them.
    Changes nothing."""
    paths = find_run(run, root)
    store = open_run_store(paths)
    refuge = _refuge(store, paths)
    return [_described(one) for one in _inventory(store, refuge)]


def _inventory(store: CheckpointStore, refuge: Refuge | None) -> list[Listed]:
    """Every committed checkpoint, newest first, with the emergency saves that wait."""
    return store.inventory(waiting=None if refuge is None else refuge.store.medium)


def _holder(listed: Listed, store: CheckpointStore, refuge: Refuge | None) -> CheckpointStore:
    """Where the files of a listed checkpoint lie: an emergency save waits in the run directory."""
    if refuge is not None and listed.location.startswith(f"{refuge.store.uri}/"):
        return refuge.store
    return store


def _refuge(store: CheckpointStore, paths: RunPaths) -> Refuge | None:
    """Where emergency saves wait; None for a run whose checkpoints are on a disk anyway."""
    return Refuge(paths.checkpoints) if is_object_store(store.uri) else None


def verify_checkpoints(
    run: str, *, step: int | None = None, root: str | Path | None = None, reading: Reading = lambda count, total: None
) -> list[StoredCheckpoint]:
    """Read the bytes of all live checkpoints, or those of one step, and compare them; of emergency saves that wait in
    the run directory, too. Changes nothing."""
    paths = find_run(run, root)
    store = open_run_store(paths)
    refuge = _refuge(store, paths)
    chosen = [listed for listed in _inventory(store, refuge) if listed.live and step in (None, listed.name.step)]
    if not chosen:
        _choose(store, step, paths)  # raises with those there are
    total = sum(listed.manifest.size_bytes for listed in chosen if _whole(listed) and listed.manifest)
    verified = (
        _verified(_holder(listed, store, refuge), listed, lambda count: reading(count, total)) for listed in chosen
    )
    return [_described(listed) for listed in verified if listed is not None]


def _whole(listed: Listed) -> bool:
    return listed.problem is None


def _verified(store: CheckpointStore, listed: Listed, reading: Callable[[int], None]) -> Listed | None:
    """With what its bytes say; None for one that its running attempt has removed meanwhile."""
    if listed.problem is not None or listed.manifest is None:
        return listed
    try:
        return replace(listed, problem=store.verify(listed.manifest, reading=reading))
    except CheckpointError:
        if listed.name in {manifest.name for manifest in store.manifests()}:
            raise
        return None


def _described(listed: Listed) -> StoredCheckpoint:
    manifest = listed.manifest
    return StoredCheckpoint(
        step=listed.name.step,
        epoch=None if manifest is None else manifest.epoch,
        attempt=None if manifest is None else manifest.attempt,
        path=listed.location,
        size_bytes=None if manifest is None else manifest.size_bytes,
        sha256=None if manifest is None else manifest.sha256,
        valid=listed.problem is None,
        committed_at=None if manifest is None else manifest.committed_at,
        live=listed.live,
        problem=listed.problem,
    )


def _choose(store: CheckpointStore, step: int | None, paths: RunPaths) -> Manifest:
    """The newest live checkpoint (of that step). Raises CheckpointError with the steps there are."""
    live = store.manifests()
    for manifest in live:
        if step in (None, manifest.step):
            return manifest
    refuge = _refuge(store, paths)
    waiting = None if refuge is None else _waiting(store, refuge)
    if waiting is not None and step in (None, waiting.step):
        raise CheckpointError(
            f"the checkpoint of step {count(waiting.step)} waits in the run directory: it is not in {store.uri} yet",
            hint=f"bring it there first, then try again:  orch ckpt push {paths.run_dir.name}",
        )
    if not live:
        raise CheckpointError(f"there is no checkpoint in {store.uri} to resume from", hint="`orch ckpt ls` lists all")
    steps = ", ".join(count(number) for number in dict.fromkeys(manifest.step for manifest in live))
    raise CheckpointError(f"there is no live checkpoint of step {count(step or 0)}", hint=f"there are those of {steps}")


def _waiting(store: CheckpointStore, refuge: Refuge) -> Manifest | None:
    """The emergency save that a push would bring: the newest that still counts."""
    listed = (one.manifest for one in _inventory(store, refuge) if one.problem is None)
    return next((manifest for manifest in listed if manifest and manifest.directory == refuge.store.uri), None)


# --- copying


def pull_checkpoint(
    run: str,
    directory: str | Path,
    *,
    step: int | None = None,
    root: str | Path | None = None,
    reading: Reading = lambda count, total: None,
) -> Pulled:
    """Copy the newest live checkpoint, or that of `step`, with its manifest into a directory; compared on its way.

    One that waits in the run directory is copied from there. Raises CheckpointCorrupt when it is damaged: an older one
    is not copied in its place.
    """
    paths = find_run(run, root)
    store = open_run_store(paths)
    refuge = _refuge(store, paths)
    holder, manifest = _to_copy(store, refuge, step) or (store, _choose(store, step, paths))  # raises if none is there
    total = manifest.size_bytes
    path = holder.copy_to(Path(directory).absolute(), manifest, reading=lambda count: reading(count, total))
    return Pulled(paths.run_dir.name, manifest.step, path, path.parent / manifest.name.manifest, total, manifest.sha256)


def _to_copy(
    store: CheckpointStore, refuge: Refuge | None, step: int | None
) -> tuple[CheckpointStore, Manifest] | None:
    """The newest live checkpoint (of that step), and where it lies; None when there is none."""
    live = [listed for listed in _inventory(store, refuge) if listed.live]
    chosen = next((listed for listed in live if step in (None, listed.name.step)), None)
    if chosen is None:
        return None
    if chosen.manifest is not None and chosen.problem is None:
        return _holder(chosen, store, refuge), chosen.manifest
    whole = next((listed.name.step for listed in live if listed.problem is None), None)
    raise CheckpointCorrupt(
        f"the checkpoint of step {count(chosen.name.step)} is damaged: {chosen.problem}",
        hint="nothing was copied"
        + ("" if whole is None else f"; to copy the newest that looks whole:  --step {whole}"),
    )


def push_checkpoint(
    run: str,
    *,
    root: str | Path | None = None,
    reading: Reading = lambda count, total: None,
    open_backend: OpenBackend = open_backend,
) -> Pushed:
    """Bring the newest emergency save from the run directory to the object store, as the next attempt would.

    The local copy goes once the one in the store was read back. Raises RefusedError while the run is alive (had it
    started meanwhile, the local copy stays) and where there is no object store, CheckpointCorrupt when what was saved
    is damaged.
    """
    paths = find_run(run, root)
    store = open_run_store(paths)
    refuge = _refuge(store, paths)
    if refuge is None:
        raise RefusedError(
            f"{paths.run_dir.name} keeps its checkpoints on disk, in {store.uri}: there is nowhere to push them",
            hint="`orch ckpt pull` copies one to another directory",
        )
    with translated(paths.run_dir):
        record = _at_rest(paths, open_backend, "push")
        brought = list(refuge.bring_to(store, reading=reading))
        published = next((one.manifest for one in brought if one.published), None)
        if published is None:
            for one in brought:
                _refuse_unusable(one, store)
            return Pushed(record.run_id, None, None, 0)
        location = f"{store.uri}/{published.name.data}"
        if problem := store.verify(published):
            raise CheckpointCorrupt(
                f"{location} does not read back: {problem}", hint=f"the copy in {paths.checkpoints} was kept"
            )
        with run_lock(paths):  # an attempt that has started since may be reading the local copy
            _at_rest(paths, open_backend, "push")
            refuge.forget(published)
        EventLog(paths, "login").append(
            "action",
            action="pushed",
            step=published.step,
            path=location,
            size_bytes=published.size_bytes,
            by=_user(),
        )
    return Pushed(record.run_id, published.step, location, published.size_bytes)


def _refuse_unusable(brought: Brought, store: CheckpointStore) -> None:
    step = count(brought.manifest.step)
    if brought.problem is not None and brought.certain:
        raise CheckpointCorrupt(
            f"the emergency save of step {step} is damaged: {brought.problem}",
            hint=f"{store.uri} was not changed; the run goes on from what is there",
        )
    if brought.problem is not None:
        raise CheckpointError(
            f"the emergency save of step {step} cannot be read now: {brought.problem}",
            hint="nothing was changed; push it again when the file system is well",
        )


# --- removing


def collect_checkpoints(
    run: str,
    *,
    dry_run: bool = False,
    root: str | Path | None = None,
    bringing: Callable[[int, str], object] = lambda step, path: None,
    open_backend: OpenBackend = open_backend,
) -> Collected:
    """Remove what the spec's retention does not keep, and what killed attempts left. RefusedError while it is alive.

    Only the holder of the newest epoch may remove anything: this opens one in the name of the last attempt, going on
    from the newest checkpoint, so that a process of it that nobody sees any more is fenced before its files go. Raises
    CheckpointCorrupt, and changes nothing, when the newest is damaged: that epoch would make a restored copy of it
    dead. With `dry_run` only sizes are compared for that.

    An emergency save that waits in the run directory is brought to the object store first: `bringing` is called with
    its step and its path, before it is, or with `dry_run` would be.
    """
    paths = find_run(run, root)
    plan = agent_plan(paths)
    store = open_run_store(paths)
    rules = _rules(plan["checkpoint"])
    with translated(paths.run_dir):
        record = _at_rest(paths, open_backend, "collect")
        attempt = _last_attempt(store, record)  # now: one that starts while this uploads must not be fenced
        before = store.sizes()
        refuge = _refuge(store, paths)
        # Before the lock: whoever resumes the run does not wait for a download.
        base = _sound_base(store, refuge, record, read=not dry_run)
        save = None if refuge is None else _waiting(store, refuge)
        if save is not None:
            bringing(save.step, save.location)
        if dry_run:
            removed = store.garbage(**rules)
        elif base is None and store.owner() is None:
            removed = []  # nothing was ever committed: nor is a directory made here
        else:
            if refuge is not None and list(refuge.bring_to(store)):  # the epoch opened here would make it dead
                base = _sound_base(store, None, record)  # read back from where it is now
                refuge.require_base(store, None if base is None else Found(base, {}, ()))
            with run_lock(paths):  # nobody resumes it in between
                _at_rest(paths, open_backend, "collect")
                fence = store.open_epoch(attempt=attempt, base=base)
            removed = store.collect_garbage(fence, **rules)
            EventLog(paths, "login").append("action", action="checkpoints_removed", by=_user(), files=len(removed))
    steps = tuple(manifest.step for manifest in store.manifests() if manifest.name.manifest not in removed)
    freed = sum(before.get(name, 0) for name in removed)
    return Collected(record.run_id, dry_run, tuple(sorted(removed)), freed, steps)


def _sound_base(store: CheckpointStore, refuge: Refuge | None, record: Record, *, read: bool = True) -> Manifest | None:
    """The newest live checkpoint, whose bytes match (without `read`: whose files have the right size); None when none
    was committed. Changes nothing: `find` would set what is damaged aside and go on from an older one.

    Raises CheckpointCorrupt when it, or a newer one that was set aside before, is damaged; CheckpointError when it
    cannot be read now.
    """
    live = [listed for listed in _inventory(store, refuge) if listed.live]
    damaged: dict[CheckpointName, str] = {}
    base = None
    for listed in live:
        problem, manifest, holder = listed.problem, listed.manifest, _holder(listed, store, refuge)
        if problem is None and manifest is not None and read:
            problem = holder.verify(manifest)
            if problem is not None and not damaged and holder.is_unreadable(manifest):
                raise CheckpointError(
                    f"the newest checkpoint, of step {count(manifest.step)}, cannot be read now: {problem}",
                    hint="nothing was changed; try again when the cause is mended",
                )
        if problem is None:
            base = manifest
            break
        damaged[listed.name] = problem
    for name in _set_aside(store):
        if base is None or name.step > base.step:
            damaged.setdefault(name, f"it was set aside as {name.data}{CORRUPT_SUFFIX}")
    if damaged:
        raise _given_up_unseen(damaged, base, record)
    return base


def _set_aside(store: CheckpointStore) -> list[CheckpointName]:
    """Damaged checkpoints under the name they were set aside with, of which a restored copy would count."""
    owner = store.owner()
    if owner is None:
        lineage = Lineage(())
    else:  # its fence remembers the bases of those before it
        lineage = Lineage([owner], damaged=dict.fromkeys(owner.bases, ""))
    originals = (file.partition(CORRUPT_SUFFIX)[0] for file in store.sizes() if CORRUPT_SUFFIX in file)
    names = {name for file in originals if (name := CheckpointName.parse(file, MANIFEST_SUFFIX))}
    return [name for name in names if lineage.is_live(name.fence_epoch, name.step)]


def _given_up_unseen(damaged: dict[CheckpointName, str], base: Manifest | None, record: Record) -> CheckpointCorrupt:
    lines = (f"\n  step {count(name.step)}: {damaged[name]}" for name in sorted(damaged, reverse=True))
    if record.stated is JobState.COMPLETED:
        otherwise = "to give it up (a completed run is not rolled back), move its files out of the directory"
    elif base is None:
        otherwise = "to start from the beginning, move the damaged files out of the directory"
    else:
        otherwise = f"to give it up:  orch ckpt rollback {record.run_id} --step {base.step}"
    return CheckpointCorrupt(
        f"the newest checkpoint of {record.run_id} is damaged; nothing was removed or changed" + "".join(lines),
        hint=f"restore a copy of it (docs/checkpoints.md, `By hand`); `orch ckpt verify {record.run_id}` says which "
        f"ones match; {otherwise}",
    )


def _rules(plan: dict[str, Any]) -> dict[str, Any]:
    """The retention of a plan as `collect_garbage` takes it."""
    retention = Retention.from_plan(plan)
    return {name: getattr(retention, name) for name in Retention.__dataclass_fields__}


def _last_attempt(store: CheckpointStore, record: Record) -> int:
    """In whose name to open an epoch: that of the attempt that owns the run, so that the next one can take over."""
    owner = store.owner()
    return owner.attempt if owner is not None else record.last_attempt or 0


def _at_rest(paths: RunPaths, open_backend: OpenBackend, verb: Literal["collect", "push", "rollback"]) -> Record:
    """The record of a run that is neither running nor queued. Raises RefusedError, SchedulerUnavailable."""
    record = load_record(paths)
    if record.interrupted:
        record = reconcile(record, open_backend)
    record, standing = ask_or_raise(record, open_backend)
    if standing is not None and standing.alive:
        raise RefusedError(
            f"{record.run_id} is {spoken(standing.state.value)}: its checkpoints belong to its attempt",
            hint={
                "rollback": f"stop it first (it saves once more):  orch cancel {record.run_id}",
                "push": "it brings emergency saves in by itself, when it starts",
                "collect": "it removes by itself what is not wanted, after every save",
            }[verb],
        )
    return record


def _user() -> str:
    return os.environ.get("USER") or str(os.getuid())


# --- going back


def rollback(
    run: str,
    *,
    step: int,
    root: str | Path | None = None,
    reading: Reading = lambda count, total: None,
    agree: Callable[[RolledBack], bool] = lambda plan: True,
    open_backend: OpenBackend = open_backend,
) -> RolledBack:
    """Make the next attempt go on from the checkpoint of `step`, whose bytes are compared first.

    Newer checkpoints are dead for every reader from then on; the next attempt removes them. Raises RefusedError while
    the run is alive, when it is completed, or when `agree` says no; CheckpointError when there is no such checkpoint,
    CheckpointCorrupt when it is damaged.
    """
    paths = find_run(run, root)
    store = open_run_store(paths)
    with translated(paths.run_dir):
        _may_go_back(paths, open_backend)
        manifest = _choose(store, step, paths)
        total = manifest.size_bytes
        problem = store.verify(manifest, reading=lambda count: reading(count, total))
        if problem is not None:
            raise CheckpointCorrupt(
                f"the checkpoint of step {count(step)} is damaged: {problem}",
                hint="nothing was changed; `orch ckpt verify` says which ones match",
            )
        plan = _plan(paths, store, manifest)
        if not agree(plan):
            raise RefusedError("not rolled back: nothing was changed")
        with run_lock(paths):  # nobody resumes it in between
            record = _may_go_back(paths, open_backend)
            store.open_epoch(attempt=_last_attempt(store, record), base=manifest, discard_newer=True)
            EventLog(paths, "login").append(
                "rolled_back",
                step=manifest.step,
                epoch=manifest.epoch,
                path=manifest.location,
                size_bytes=manifest.size_bytes,
                steps_given_up=plan.steps_given_up,
                by=_user(),
            )
    return plan


def _may_go_back(paths: RunPaths, open_backend: OpenBackend) -> Record:
    record = _at_rest(paths, open_backend, "rollback")
    if record.stated is JobState.COMPLETED:
        raise RefusedError(
            f"{record.run_id} is completed, and a completed run is not resumed",
            hint="start another run from a copy: `orch ckpt pull`, then docs/checkpoints.md, `By hand`",
        )
    return record


def _plan(paths: RunPaths, store: CheckpointStore, manifest: Manifest) -> RolledBack:
    refuge = _refuge(store, paths)
    live = [listed.name for listed in _inventory(store, refuge) if listed.live]
    newer = {name for name in (*live, *_set_aside(store)) if name.step > manifest.step}
    given_up = [name.step for name in newer]
    return RolledBack(
        run_id=paths.run_dir.name,
        run_dir=paths.run_dir,
        step=manifest.step,
        path=manifest.location,
        checkpoints_given_up=len(given_up),
        steps_given_up=max(given_up, default=manifest.step) - manifest.step,
    )

"""`orch ckpt`: one function per command, as in `commands`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import typer

from orchestrator import operations
from orchestrator.cli import out
from orchestrator.errors import CheckpointCorrupt
from orchestrator.operations.checkpoint_results import RolledBack, StoredCheckpoint
from orchestrator.paths import is_object_store
from orchestrator.words import count, duration, size

HEADING = ("step", "epoch", "attempt", "size", "age", "valid", "path")


def ls(run: str, root: Path | None, as_json: bool) -> None:
    _show(operations.list_checkpoints(run, root=root), as_json)


def _show(found: Sequence[StoredCheckpoint], as_json: bool) -> None:
    if as_json:
        out.json_document([checkpoint.as_json() for checkpoint in found])
        return
    if not found:
        out.line("no checkpoint was committed yet")
        return
    now = time.time()
    out.lines(out.table(HEADING, [_row(checkpoint, now) for checkpoint in found]))
    for checkpoint in found:
        if checkpoint.problem is not None:
            out.line(f"  step {count(checkpoint.step)}: {checkpoint.problem}")


def _row(checkpoint: StoredCheckpoint, now: float) -> list[out.Segment]:
    if checkpoint.valid:
        valid: out.Segment = ("yes", "green")
    else:
        valid = ("no", "bold red") if checkpoint.live else ("no", "dim")
    return [
        (count(checkpoint.step), ""),
        ("?" if checkpoint.epoch is None else str(checkpoint.epoch), ""),
        ("?" if checkpoint.attempt is None else str(checkpoint.attempt), ""),
        ("?" if checkpoint.size_bytes is None else size(checkpoint.size_bytes), ""),
        ("?" if checkpoint.committed_at is None else duration(now - checkpoint.committed_at), ""),
        valid,
        (checkpoint.path, ""),
    ]


def verify(run: str, step: int | None, root: Path | None, as_json: bool) -> None:
    found = operations.verify_checkpoints(run, step=step, root=root, reading=out.Bar("reading"))
    _show(found, as_json)
    damaged = [checkpoint for checkpoint in found if not checkpoint.valid]
    if damaged:
        if not as_json:
            steps = ", ".join(count(checkpoint.step) for checkpoint in damaged)
            out.error(f"damaged: step {steps}", f"nothing was changed; {_what_now(run, found, step)}")
        raise typer.Exit(CheckpointCorrupt.exit_code)
    if not as_json:
        out.line(f"{len(found)} of {len(found)} match their hashes")


def _what_now(run: str, found: Sequence[StoredCheckpoint], step: int | None) -> str:
    """What damage means for the run: an attempt goes on from the newest that matches, and from nothing else."""
    copy = "restore a copy (docs/checkpoints.md, `By hand`)"
    if step is not None:
        return f"{copy}, or see which others match:  orch ckpt verify {run}"
    good = next((checkpoint.step for checkpoint in found if checkpoint.valid), None)
    if good is None:
        return f"none matches, so no attempt can go on: {copy}"
    if found[0].valid:
        return f"the newest, step {count(good)}, matches"
    return f"an attempt would go on from step {count(good)}, and nothing newer would count any more: {copy} before"


def pull(run: str, directory: Path, step: int | None, root: Path | None, as_json: bool) -> None:
    result = operations.pull_checkpoint(run, directory, step=step, root=root, reading=out.Bar("copying"))
    if as_json:
        out.json_document(result.as_json())
    else:
        out.line(f"step {count(result.step)}, {size(result.size_bytes)}, verified: {result.path}")


def push(run: str, root: Path | None, as_json: bool) -> None:
    result = operations.push_checkpoint(run, root=root, reading=out.Bar("uploading"))
    if as_json:
        out.json_document(result.as_json())
    elif result.step is None:
        out.line(f"nothing to push: {_nothing_waits(run, root)}")
    else:
        out.line(f"step {count(result.step)}, {size(result.size_bytes)}, verified: {result.path}")


def _nothing_waits(run: str, root: Path | None) -> str:
    listed = operations.list_checkpoints(run, root=root)
    dead = [checkpoint for checkpoint in listed if not checkpoint.live and not is_object_store(checkpoint.path)]
    if not dead:
        return "no emergency save waits in the run directory"
    steps = ", ".join(count(checkpoint.step) for checkpoint in dead)
    return f"the emergency save of step {steps} was given up (`orch ckpt ls {run}` says why)"


def gc(run: str, dry_run: bool, root: Path | None, as_json: bool) -> None:

    def bringing(step: int, path: str) -> None:
        verb = "would first be uploaded" if dry_run else "is uploaded first"
        out.warnings([f"the emergency save of step {count(step)} {verb}: {path}"])

    result = operations.collect_checkpoints(run, dry_run=dry_run, root=root, bringing=bringing)
    if as_json:
        out.json_document(result.as_json())
        return
    for name in result.removed:
        out.line(f"  {name}")
    left = ", ".join(count(step) for step in result.steps_left) or "none"
    verb = "would be removed" if dry_run else "removed"
    files = len(result.removed)
    out.line(f"{files} file{'' if files == 1 else 's'} {verb}, {size(result.freed_bytes)}; checkpoints left: {left}")


def rollback(run: str, step: int, yes: bool, root: Path | None, as_json: bool) -> None:
    ask = sys.stdin.isatty() and not yes and not as_json
    result = operations.rollback(
        run, step=step, root=root, reading=out.Bar("reading"), agree=_asked if ask else lambda plan: True
    )
    if as_json:
        out.json_document(result.as_json())
        return
    out.line((result.run_id, "bold"), f"  rolled back to step {count(result.step)}. {_given_up(result)}")
    out.line(f"  go on from there:  orch resume {result.run_id}")


def _asked(plan: RolledBack) -> bool:
    print(f"{plan.run_id} would go on from step {count(plan.step)}. {_given_up(plan)}")
    return typer.confirm("Roll back?")


def _given_up(plan: RolledBack) -> str:
    if not plan.checkpoints_given_up:
        return "It is the newest one: nothing is given up."
    steps, number = plan.steps_given_up, plan.checkpoints_given_up
    return (
        f"{count(steps)} step{'' if steps == 1 else 's'} and {number} newer checkpoint{'' if number == 1 else 's'} "
        "are given up; the next attempt removes the files."
    )

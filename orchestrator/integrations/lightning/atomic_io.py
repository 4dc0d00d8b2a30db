"""Safe checkpoint files for any Lightning Trainer, without anything else of `orch`.

    trainer = Trainer(plugins=[AtomicCheckpointIO()])

Every save of the Trainer (ModelCheckpoint, `trainer.save_checkpoint`, Slurm auto-requeue) is complete or absent, also
after a power cut, and a load compares the file with the manifest beside it: `last.ckpt` with `last.ckpt.json`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO

from orchestrator.checkpoint.manifest import FileEntry
from orchestrator.checkpoint.posix import Directory
from orchestrator.checkpoint.store import describe
from orchestrator.checkpoint.stream import HashingWriter
from orchestrator.errors import CheckpointCorrupt, CheckpointError
from orchestrator.files import fsync_dir, open_atomic

log = logging.getLogger("orchestrator.integrations.lightning")

MANIFEST_VERSION = 1
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Of the process and not of a plugin: a plugin is pickled for the processes that `ddp_spawn` starts. All can be entered
# again by the thread that holds them: Lightning saves from a signal handler, too.
_guard = threading.RLock()
_locks: WeakValueDictionary[Path, Any] = WeakValueDictionary()  # one for each file that is being saved or removed


class AtomicCheckpointIO(CheckpointIO):
    """Temporary file in the same directory → fsync → rename → fsync(directory), hashed on the way. Files only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Raises CheckpointError; the file that was there before stands then."""
        if storage_options is not None:
            raise CheckpointError("storage_options are for object stores", hint="save without them")
        target = _on_disk(path)
        with _told(target, "save"), _alone(target):
            Directory(target.parent).prepare()
            for left in target.parent.glob(f"{_temporary_stem(target)}*"):
                left.unlink(missing_ok=True)  # of a save of the same file that was killed
            _replace(target, checkpoint)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """A file without a manifest is loaded as plain Lightning does. Raises CheckpointError, CheckpointCorrupt."""
        if _URL.match(str(path)):
            log.info("%s is remote: its content was not verified", path)
        elif not verify(Path(path)):
            log.info("%s has no %s beside it: its content was not verified", path, manifest_path(Path(path)).name)
        with readable(path):
            loaded: dict[str, Any] = TorchCheckpointIO().load_checkpoint(path, map_location, weights_only)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """The manifest goes last: a file that has lost it would be loaded unverified."""
        target = _on_disk(path)
        with _told(target, "remove"), _alone(target):
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)  # what a sharded strategy saved by itself
            else:
                target.unlink(missing_ok=True)
                manifest_path(target).unlink(missing_ok=True)
            if target.parent.is_dir():
                fsync_dir(target.parent)


def manifest_path(path: Path) -> Path:
    """Where the manifest of a checkpoint file lies (pure). Digits in it would be read as part of an hpc_ckpt number."""
    return path.with_name(f"{path.name}.json")


def verify(path: Path) -> bool:
    """Compare a checkpoint with its manifest; False when it has none.

    Raises CheckpointCorrupt where they differ, CheckpointError where it is missing or cannot be read.
    """
    path = path.resolve()  # ModelCheckpoint(save_last="link"): the manifest is that of the file linked to
    if path.is_dir():
        return False
    with _told(path, "read"):
        path.stat()
        contents = _read_manifest(path)
        while contents is not None:
            problems = [
                Directory(path.parent).examine(entry, committed=lambda: True, reading=None) for entry in contents
            ]
            if None in problems:
                return True
            before, contents = contents, _read_manifest(path)
            if contents == before:
                break  # else it was saved anew since the manifest was read
        else:
            return False
    problem = problems[0]
    assert problem is not None
    if not problem.certain:
        raise CheckpointError(f"could not read {path}: {problem.words}", hint="check the file system")
    raise CheckpointCorrupt(
        f"{path} does not match its manifest: {problem.words}",
        hint=f"take another checkpoint; if a Trainer without AtomicCheckpointIO wrote this one, remove "
        f"{manifest_path(path).name}",
    )


@contextmanager
def readable(path: Any) -> Iterator[None]:
    """What loading a file raises, as one CheckpointError."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}", hint="look for its name: ls") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # an archive that was cut short: torch seeks to where it cannot
            raise _not_loadable(path, error) from error
        raise CheckpointError(f"could not read {path}: {describe(error)}", hint="check the file system") from error
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        ImportError,
    ) as error:
        raise _not_loadable(path, error) from error


def _not_loadable(path: Any, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be loaded: {_reason(error)}",
        hint="take another checkpoint if it is damaged; if it holds more than tensors and plain types, and you "
        "trust it: trainer.fit(…, weights_only=False)",
    )


def _reason(error: Exception) -> str:
    """The one line of torch's page on `weights_only` that says what is wrong."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "WeightsUnpickler error" in line), lines[0]).rstrip()


def _on_disk(path: Any) -> Path:
    if _URL.match(str(path)):
        raise CheckpointError(
            f"AtomicCheckpointIO writes files on a disk, not {path}",
            hint="give a directory as a plain path, or leave the plugin out for this Trainer",
        )
    return Path(path).absolute()


@contextmanager
def _told(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"could not {doing} {path}: {error.strerror}", hint="check the path") from error
    except OSError as error:
        room = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room, or keep fewer (ModelCheckpoint(save_top_k=…))" if room else "check the file system"
        raise CheckpointError(
            f"could not {doing} {path}: {describe(error)}",
            hint=f"{hint}; the file that was there before stands" if doing == "save" else hint,
        ) from error


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One change of a file at a time. AsyncCheckpointIO saves in a thread while the Trainer removes old files in its
    own: a removal between the data and its manifest would leave that manifest for whatever gets the name next."""
    with _guard:
        lock = _locks.setdefault(target, threading.RLock())
    with lock:
        yield


def _replace(target: Path, checkpoint: dict[str, Any]) -> None:
    """At every moment, the manifest (where there is one) allows for what lies at `target`."""
    manifest = manifest_path(target)
    with open_atomic(target, temporary=_temporary(target)) as raw:
        stream = HashingWriter(raw)
        stream.fill(lambda file: torch.save(checkpoint, file))
        entry = FileEntry(target.name, stream.size, stream.sha256)
        standing = _standing(target)
        if standing or manifest.exists():
            _write_manifest(target, [entry, *standing])
    _write_manifest(target, [entry])


def _standing(target: Path) -> Sequence[FileEntry]:
    """What may lie at `target` now; for a file of plain Lightning it is worked out."""
    if target.is_symlink() or not target.exists():
        return ()
    try:
        known = _read_manifest(target)
    except CheckpointCorrupt:
        known = None
    if known is not None:
        return known
    with target.open("rb") as file:
        return (
            FileEntry(target.name, os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()),
        )


def _write_manifest(target: Path, contents: Sequence[FileEntry]) -> None:
    fields = {
        "version": MANIFEST_VERSION,
        "contents": [{"size": entry.size, "sha256": entry.sha256} for entry in contents],
    }
    with open_atomic(manifest_path(target), temporary=_temporary(target)) as file:
        file.write(json.dumps(fields, indent=1).encode() + b"\n")


def _read_manifest(path: Path) -> Sequence[FileEntry] | None:
    """What the file may hold: one content, or two when a save was cut short; None without a manifest."""
    manifest = manifest_path(path)
    if not manifest.exists():
        return None
    try:
        fields = json.loads(Directory(path.parent).read(manifest.name))
        contents = [FileEntry(path.name, int(known["size"]), str(known["sha256"])) for known in fields["contents"]]
        if fields["version"] > MANIFEST_VERSION or not contents:
            raise ValueError(f"version {fields['version']} with {len(contents)} contents")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(
            f"{manifest} is not a manifest: {type(error).__name__}: {error}",
            hint=f"remove it to load {path.name} unverified, or take another checkpoint",
        ) from error
    return contents


def _temporary_stem(target: Path) -> str:
    # Lightning reads a number out of every name with "ckpt_" in it: what is left of a killed save of hpc_ckpt_3.ckpt
    # would be taken for hpc_ckpt_3174…, and the requeued job would look for that.
    return f".saving-{hashlib.sha256(target.name.encode()).hexdigest()[:12]}-"


def _temporary(target: Path) -> Path:
    return target.with_name(f"{_temporary_stem(target)}{os.urandom(6).hex()}.tmp")

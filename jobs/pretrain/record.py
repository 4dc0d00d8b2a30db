"""environment.json: what a run was started with, and the environment of each attempt. A resume with other settings is
refused, because it would neither be the old run nor a new one."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from jobs.pretrain.settings import PretrainSettings
from orchestrator.errors import RefusedError
from orchestrator.files import read_json, write_json

MAY_CHANGE = ("num_workers", "out", "checkpoint_args")  # proven to leave the result alone
PACKAGES = ("torch", "lightning", "kornia", "timm", "pillow")


def load_record(path: Path) -> dict[str, Any] | None:
    """The record of the attempts before this one; None on the first."""
    try:
        return dict(read_json(path))
    except FileNotFoundError:
        return None


def describe_data(files: Sequence[str]) -> dict[str, Any]:
    """A fingerprint of the list of images: their number and the hash of their relative names."""
    return {"images": len(files), "names": hashlib.blake2b("\0".join(files).encode(), digest_size=16).hexdigest()}


def describe_environment(world_size: int) -> dict[str, Any]:
    """What else an exact resume depends on."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "packages": {name: _version(name) for name in PACKAGES},
        "argv": sys.argv,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def refuse_drift(
    record: dict[str, Any], settings: PretrainSettings, data: dict[str, Any], allowed: Collection[str] = ()
) -> None:
    """Raises RefusedError when the run directory belongs to a run with other settings or other data; `allowed` are
    the keys of `orch resume --allow-drift`."""
    old, new = record["settings"], settings.model_dump(mode="json")
    watched = [key for key in sorted({*old, *new} - {*MAY_CHANGE}) if f"job.args.{key}" not in allowed]
    changed = [key for key in watched if old.get(key) != new.get(key)]
    lines = [f"  {key}: {old.get(key)!r} before, {new.get(key)!r} now" for key in changed]
    if record["data"] != data and "data" not in allowed:
        lines.append(f"  the images: {record['data']['images']} before, {data['images']} now, or other names")
    if lines:
        raise RefusedError(
            "this run directory belongs to a run with other settings:\n" + "\n".join(lines),
            hint="choose another --out, or repeat the old settings to go on with that run; under `orch`, "
            "`orch resume --allow-drift job.args.KEY` (or `data`) lets one differ",
        )


def environment_changes(record: dict[str, Any], environment: dict[str, Any]) -> list[str]:
    """What differs from the attempt before in a way that can change the last bits; a sentence each."""
    attempts = record["attempts"]
    if not attempts:
        return []
    before = attempts[max(attempts, key=int)]
    watched = ("python", "machine", "world_size", "threads", "packages")
    return [
        f"{key} was {before.get(key)!r}, is {environment[key]!r}: the resume is not exact"
        for key in watched
        if before.get(key) != environment[key]
    ]


def write_record(
    path: Path,
    record: dict[str, Any] | None,
    *,
    settings: PretrainSettings,
    seed: int,
    data: dict[str, Any],
    attempt: int,
    environment: dict[str, Any],
) -> None:
    """Add this attempt to the record (rank 0)."""
    attempts = {} if record is None else record["attempts"]
    write_json(
        path,
        {
            "settings": settings.model_dump(mode="json"),
            "seed": seed,
            "data": data,
            "attempts": {**attempts, str(attempt): environment},
        },
    )

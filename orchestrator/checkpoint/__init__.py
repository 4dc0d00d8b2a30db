"""Checkpoints that are complete or absent: commit, fence, verified load, garbage (PROTOCOLS 4, docs/checkpoints.md)."""

from __future__ import annotations

import atexit
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.found import Found, Listed, Load, Skipped
from orchestrator.checkpoint.lineage import Fence, Lineage
from orchestrator.checkpoint.manifest import CheckpointName, FileEntry, Manifest, parse_manifest
from orchestrator.checkpoint.medium import Reading, Trace
from orchestrator.checkpoint.posix import PosixStore
from orchestrator.checkpoint.refuge import Brought, Refuge
from orchestrator.checkpoint.retention import Best, Retention, kept
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.checkpoint.takeover import take_over
from orchestrator.errors import CheckpointError
from orchestrator.paths import parse_url, url_fault

__all__ = [
    "Best",
    "Brought",
    "CheckpointName",
    "CheckpointStore",
    "Fence",
    "FileEntry",
    "Found",
    "Lineage",
    "Listed",
    "Load",
    "Manifest",
    "PosixStore",
    "Reading",
    "Refuge",
    "Retention",
    "Skipped",
    "Trace",
    "kept",
    "open_store",
    "parse_manifest",
    "take_over",
]


def open_store(
    uri: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    scratch: Path | None = None,
    shared_disk: Path | None = None,
    claim_on_disk: bool = False,
    patience_s: Callable[[], float] | None = None,
) -> CheckpointStore:
    """The store at `uri`: a path, a `file://` URL, or an object store; touches nothing. Raises CheckpointError.

    Of an object store (docs/object-stores.md):
        storage_options: handed to fsspec unchanged.
        scratch: directory for staged files; by default a temporary one, removed with the store.
        shared_disk, claim_on_disk: where fences may lie, and whether new ones are created there.
        patience_s: how long an operation that is starting may be tried again.
    """
    if fault := url_fault(uri):
        raise CheckpointError(f"checkpoint.uri {fault}")
    url = parse_url(uri)
    if url is None:
        if not uri:
            raise CheckpointError("checkpoint.uri is empty", hint="give a directory, or null for the run directory")
        return PosixStore(Path(uri))
    if url.scheme == "file":
        return PosixStore(_file_url_path(uri))
    from orchestrator.checkpoint.objects import PATIENCE_S, ObjectStore

    return ObjectStore(
        url.scheme + uri[len(url.scheme) :],  # fsspec knows schemes in lower case only
        storage_options=storage_options,
        scratch=scratch or _temporary_directory(),
        shared_disk=shared_disk,
        claim_on_disk=claim_on_disk,
        patience_s=patience_s or (lambda: PATIENCE_S),
    )


def _temporary_directory() -> Path:
    """Removed when this process ends."""
    import tempfile

    directory = Path(tempfile.mkdtemp(prefix="orch-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _file_url_path(uri: str) -> Path:
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise CheckpointError(
            f"checkpoint.uri {uri!r} does not name a file on this machine",
            hint="write file:///absolute/path, with ? and # as %3F and %23, or just the path",
        )
    return Path(unquote(parts.path))

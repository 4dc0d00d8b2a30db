"""Checkpoints that are complete or absent: commit, fence, verified load, garbage (PROTOCOLS 4, docs/checkpoints.md)."""

from __future__ import annotations

import re
from pathlib import Path

from orchestrator.checkpoint.lineage import Fence, Lineage
from orchestrator.checkpoint.manifest import CheckpointName, FileEntry, Manifest, parse_manifest
from orchestrator.checkpoint.posix import PosixStore
from orchestrator.checkpoint.protocol import CheckpointStore, Found, Reading, Skipped, Trace, take_over
from orchestrator.errors import CheckpointError

__all__ = [
    "CheckpointName",
    "CheckpointStore",
    "Fence",
    "FileEntry",
    "Found",
    "Lineage",
    "Manifest",
    "PosixStore",
    "Reading",
    "Skipped",
    "Trace",
    "open_store",
    "parse_manifest",
    "take_over",
]


def open_store(uri: str) -> CheckpointStore:
    """The store at `uri`, a path or `file://` URL; touches nothing. Raises CheckpointError for any other scheme."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme is None:
        if not uri:
            raise CheckpointError("checkpoint.uri is empty", hint="give a directory, or null for the run directory")
        return PosixStore(Path(uri))
    if scheme[1].lower() == "file":
        return PosixStore(_file_url_path(uri))
    raise CheckpointError(
        f"checkpoint.uri {uri!r}: object stores come in a later version",
        hint="use a directory on the shared disk, as a path or file:///path",
    )


def _file_url_path(uri: str) -> Path:
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise CheckpointError(
            f"checkpoint.uri {uri!r} does not name a file on this machine",
            hint="write file:///absolute/path, with ? and # as %3F and %23, or just the path",
        )
    return Path(unquote(parts.path))

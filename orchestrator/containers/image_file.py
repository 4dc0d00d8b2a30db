"""Images that are files: a `.sif` or squashfs, pinned by the hash of its content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from orchestrator.errors import ContainerError

_PIECE_BYTES = 1 << 20


def split_pin(image: str) -> tuple[Path, str]:
    """`/images/train.sif@sha256:…` → the file and the hash."""
    path, _, digest = image.rpartition("@sha256:")
    return Path(path), digest


def file_of(image: str, *, node: str, verify: bool) -> Path:
    """The file of a pin; with `verify` it is read whole. Raises ContainerError where it is missing or another one."""
    path, digest = split_pin(image)
    try:
        found = sha256_of(path) if verify else None
        path.stat()
    except OSError as error:
        raise ContainerError(
            f"image file {path} cannot be read on {node}: {error.strerror or error}",
            hint="It must be on a disk that every node sees, and readable for you.",
        ) from error
    if found not in (None, digest):
        raise ContainerError(
            f"image file {path} is not the one that was pinned: its SHA-256 is {found}",
            hint="Bring the old file back, or pin the new one (then it is another run).",
        )
    return path


def difference(path: Path, digest: str) -> str | None:
    """Why a file, read whole, is not the one of that hash; None when it is."""
    try:
        found = sha256_of(path)
    except OSError as error:
        return error.strerror or str(error)
    return None if found == digest else f"its SHA-256 is {found}"


def sha256_of(path: Path) -> str:
    """Hash of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()

"""A directory of this node for what is on its way to or from an object store. Never the only copy of anything."""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import CheckpointError

_OF_A_RANK = re.compile(r"attempt-(?P<attempt>\d+)\.rank\d+")


def scratch_directory(parent: str | None, *, run_id: str, run_dir: Path, attempt: int, rank: int) -> Path:
    """An empty directory for this rank until it ends, readable by nobody else; what killed attempts left is removed.

    `parent`: checkpoint.scratch; None = the temporary directory. Raises CheckpointError.
    """
    top = Path(parent or tempfile.gettempdir())
    root = hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:8]  # a run id may be there under two roots
    of_run = top / f"orch-{os.geteuid()}-{run_id}-{root}"
    try:
        _make_private(of_run)
        for left in of_run.iterdir():
            match = _OF_A_RANK.fullmatch(left.name)
            if match is not None and int(match["attempt"]) < attempt:
                shutil.rmtree(left, ignore_errors=True)  # another rank may be removing it, too
        own = of_run / f"attempt-{attempt:03d}.rank{rank}"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(mode=0o700)
        atexit.register(remove_scratch, own)
    except OSError as error:
        raise CheckpointError(
            f"no scratch directory below {top}: {error.strerror}",
            hint="checkpoint.scratch names a directory of the nodes that the job can write to",
        ) from error
    return own


def remove_scratch(directory: Path) -> None:
    """Remove it, and the run's directory with the last rank's."""
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):  # other ranks are still there
        directory.parent.rmdir()


def _make_private(directory: Path) -> None:
    """In a place where everybody may write, somebody else may have been faster with that name."""
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise CheckpointError(
            f"{directory} is not a directory of yours alone",
            hint="remove it, or name another place in checkpoint.scratch",
        )

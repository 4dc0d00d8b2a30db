"""Where a run begins that has no checkpoint of its own yet: with a checkpoint that somebody else's Trainer wrote."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.store import describe
from orchestrator.errors import CheckpointError
from orchestrator.integrations.lightning.atomic_io import verify
from orchestrator.integrations.torch import agree, resume_path
from orchestrator.worker.session import Session

_REQUEUED = re.compile(r"hpc_ckpt_(\d+)\.ckpt")
_LAST = re.compile(r"last(?:-v(\d+))?\.ckpt")  # ModelCheckpoint counts up where the name is taken


@dataclass(frozen=True)
class Start:
    """The checkpoint to load (None: from the beginning), and whether it is another run's."""

    path: str | None
    foreign: bool = False


def starting_point(session: Session, start_from: Path | str | None) -> Start:
    """The run's own newest checkpoint, else what `start_from` names, read once to see that it is whole.

    Collective; a CheckpointError about `start_from` is raised on all ranks.
    """
    own = resume_path(session)
    if own is not None or start_from is None:
        return Start(own)
    answer: dict[str, str | None] = {}
    if session.is_chief:
        try:
            found = find_checkpoint(start_from)
            _check(found)
            answer = {"path": str(found)}
        except CheckpointError as error:  # the others wait for an answer
            answer = {"message": error.message, "hint": error.hint}
    answer = json.loads(agree(json.dumps(answer)))
    if "message" in answer:
        raise CheckpointError(str(answer["message"]), hint=answer["hint"])
    return Start(answer["path"], foreign=True)


def find_checkpoint(start_from: Path | str) -> Path:
    """The file that `start_from` names, or the one to go on from in that directory.

    In a directory: `hpc_ckpt_N.ckpt` with the highest N, as Lightning has it, else the newest of `last.ckpt`,
    `last-v1.ckpt`, … Raises CheckpointError.
    """
    path = Path(start_from).expanduser().absolute()
    if "://" in str(start_from):
        raise CheckpointError(f"start_from {start_from}: only files can be started from", hint="download it first")
    try:
        found = _choose(path) if path.is_dir() else path
        if not found.is_file():
            raise CheckpointError(
                f"start_from {found}: there is no such file",
                hint="give an absolute path that the job can see: in a container, a path of its mounts",
            )
    except OSError as error:
        raise _unreadable(path, error) from error
    return found


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"start_from {path} cannot be read: {describe(error)}", hint="check its permissions")


def _choose(directory: Path) -> Path:
    files = [path for path in directory.iterdir() if path.is_file()]
    requeued = [
        (int(match[1]), path.stat().st_mtime, path) for path in files if (match := _REQUEUED.fullmatch(path.name))
    ]
    if requeued:
        return max(requeued)[-1]
    last = [(path.stat().st_mtime, int(match[1] or 0), path) for path in files if (match := _LAST.fullmatch(path.name))]
    if last:
        return max(last)[-1]
    others = sorted(path.name for path in files if path.suffix == ".ckpt")
    raise CheckpointError(
        f"start_from {directory}: there is neither hpc_ckpt_N.ckpt nor last.ckpt in it",
        hint=f"name one of its files: {', '.join(others[:3])}" if others else "give the directory of the checkpoints",
    )


def _check(path: Path) -> None:
    """A bit that flipped on the disk: torch.load does not look at the checksums inside the archive."""
    try:
        if verify(path) or not zipfile.is_zipfile(path):
            return  # torch.load itself finds a file that was cut short, which then is no archive
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        damaged = str(error)
    except OSError as error:
        raise _unreadable(path, error) from error
    if damaged is not None:
        raise CheckpointError(
            f"start_from {path} is damaged: {damaged} does not match its checksum",
            hint="copy it again, or start from an older one",
        )


def check_content(path: str, checkpoint: dict[str, Any]) -> None:
    """Raises CheckpointError for a file that a training cannot go on from."""
    if not isinstance(checkpoint, dict) or "pytorch-lightning_version" not in checkpoint:
        raise CheckpointError(
            f"start_from {path} was not written by a Lightning Trainer", hint="load its weights into the model yourself"
        )
    missing = [key for key in ("optimizer_states", "lr_schedulers", "callbacks") if key not in checkpoint]
    if missing:
        raise CheckpointError(
            f"start_from {path} holds weights only: there is no {missing[0]} in it",
            hint="start from one that was saved with save_weights_only=False, or load the weights into the model "
            "yourself",
        )


def explain(path: str, *, step: int, position: tuple[int, int], version: str) -> str:
    """What goes on exactly and what does not, for the log (pure)."""
    epoch, batch = position
    return (
        f"started from {path} of Lightning {version}: weights, optimizer and schedulers go on at step {step}, after "
        f"{batch} batches of epoch {epoch}. Not carried over: the order of samples and all random numbers, which are "
        "this run's own from here on; the first part of this epoch's means; metrics.csv, which begins here"
    )

"""Plain reads of a run directory. Nothing here writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import RegistryError, RunNotFound
from orchestrator.files import read_json
from orchestrator.paths import RunPaths
from orchestrator.registry.sidecar import load_sidecar
from orchestrator.states import ExitReason, JobState


@dataclass(frozen=True)
class RunView:
    """The files of a run at one moment. What they mean, and whether it is alive, `operations.state` says."""

    paths: RunPaths
    sidecar: dict[str, Any] | None  # None before the first attempt, or when it is damaged
    progress: dict[str, Any] | None  # None when there is none, or only that of an attempt before the current one
    heartbeat: float | None = None  # unix seconds by the file server's clock
    cancelled: bool = False  # the tombstone is there
    problems: tuple[str, ...] = ()  # files that could not be read, in words


def load_run(paths: RunPaths) -> RunView:
    """Read one run; missing or damaged files become `problems`, never an error. Raises RunNotFound."""
    if not paths.run_dir.is_dir():
        raise RunNotFound(f"there is no run at {paths.run_dir}", hint="`orch ps` lists the runs of a root")
    problems: list[str] = []
    sidecar = None
    try:
        sidecar = load_sidecar(paths)
    except RegistryError as error:
        problems.append(error.message)
    if sidecar:
        _drop_unknown_words(sidecar, problems)
    progress = _load_object(paths.progress, problems)
    attempts = sidecar["attempts"] if sidecar else []
    if progress and attempts and _attempt_of(progress) < _attempt_of(attempts[-1]):
        progress = None  # left by an older attempt: the current one has made no step yet
    return RunView(
        paths=paths,
        sidecar=sidecar,
        progress=progress,
        heartbeat=_modified(paths.heartbeat),
        cancelled=paths.tombstone.exists(),
        problems=tuple(problems),
    )


def _drop_unknown_words(sidecar: dict[str, Any], problems: list[str]) -> None:
    # Written by a newer orch: a run that cannot be named must not hide all the others from `ps`.
    for key, words in (("status", JobState), ("exit_reason", ExitReason)):
        if sidecar[key] is not None and sidecar[key] not in list(words):
            problems.append(f"unknown {key} {sidecar[key]!r} in the sidecar")
            sidecar[key] = None


def _attempt_of(entry: dict[str, Any]) -> int:
    attempt = entry.get("attempt")
    return attempt if isinstance(attempt, int) else 0


def _load_object(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        value = read_json(path)
    except FileNotFoundError:
        return None
    except RegistryError as error:
        problems.append(error.message)
        return None
    except OSError as error:
        problems.append(f"cannot read {path}: {error.strerror or error}")
        return None
    if isinstance(value, dict):
        return value
    problems.append(f"{path} is not what it should be: expected an object")
    return None


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None

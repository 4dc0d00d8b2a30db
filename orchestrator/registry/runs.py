"""Plain reads of run directories, for `status` and `ps`. Nothing here writes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import RegistryError, RunNotFound
from orchestrator.files import read_json
from orchestrator.paths import RootPaths, RunPaths
from orchestrator.registry.sidecar import load_sidecar
from orchestrator.states import ExitReason, JobState


@dataclass(frozen=True)
class RunView:
    """A run as its files tell it, at one moment. Whether it is alive only its backend knows."""

    paths: RunPaths
    sidecar: dict[str, Any] | None  # None before the first attempt
    progress: dict[str, Any] | None  # None when there is none, or only that of an attempt before the current one
    labels: dict[str, Any] = field(default_factory=dict)  # tags, notes
    heartbeat: float | None = None  # unix seconds by the file server's clock
    cancelled: bool = False  # the tombstone is there
    problems: tuple[str, ...] = ()  # files that could not be read, in words
    damaged: bool = False  # there is a sidecar, but it cannot be read

    @property
    def run_id(self) -> str:
        return self.paths.run_dir.name

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return list(self.sidecar["attempts"]) if self.sidecar else []

    @property
    def attempt(self) -> int | None:
        """Number of the newest attempt that has started."""
        attempts = self.attempts
        return int(attempts[-1]["attempt"]) if attempts else None

    @property
    def state(self) -> JobState:
        """What the sidecar says; a run that has none yet is queued (or cancelled), one with a damaged one lost."""
        status = self._sidecar_field("status")
        if self.damaged:
            return JobState.LOST
        if status is None:
            return JobState.CANCELLED if self.cancelled else JobState.QUEUED
        return JobState(status)

    @property
    def exit_reason(self) -> ExitReason | None:
        reason = self._sidecar_field("exit_reason")
        return None if reason is None else ExitReason(reason)

    @property
    def name(self) -> str | None:
        return self._text("name")

    @property
    def backend(self) -> str | None:
        return self._text("backend")

    @property
    def job_id(self) -> str | None:
        """The scheduler's id of the newest attempt; of a queued run it is in its `submitted` event."""
        return self._text("job_id")

    @property
    def message(self) -> str | None:
        return self._text("message")

    @property
    def resumed_from(self) -> dict[str, Any] | None:
        attempts = self.attempts
        return attempts[-1].get("resumed_from") if attempts else None

    def _sidecar_field(self, key: str) -> Any:
        return self.sidecar.get(key) if self.sidecar else None

    def _text(self, key: str) -> str | None:
        value = self._sidecar_field(key)
        return None if value is None else str(value)


def list_runs(root: RootPaths) -> list[RunPaths]:
    """All runs under the root, by name; none when there is no root yet. Raises RegistryError if it cannot be listed."""
    try:
        with os.scandir(root.runs) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RegistryError(f"cannot list {root.runs}: {error.strerror or error}") from error
    return [root.run(name) for name in sorted(names)]


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
    damaged = bool(problems)
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
        labels=_load_object(paths.labels, problems) or {},
        heartbeat=_modified(paths.heartbeat),
        cancelled=paths.tombstone.exists(),
        problems=tuple(problems),
        damaged=damaged,
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

"""What an examination finds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

from orchestrator.errors import BackendError, CheckpointError, ContainerError, RegistryError


class Level(StrEnum):
    """ok: as it should be. warn: worth knowing or changing. bad: a run would fail or lose work."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


class Family(IntEnum):
    """Whose fault it would be, as the exit code that a command which fails of it has."""

    SCHEDULER = BackendError.exit_code
    CONTAINER = ContainerError.exit_code
    DISK = RegistryError.exit_code
    STORE = CheckpointError.exit_code


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, in plain words; `fix` says what to change."""

    topic: str
    level: Level
    message: str
    fix: str | None = None
    family: Family = Family.SCHEDULER

    def as_json(self) -> dict[str, Any]:
        fix = {} if self.fix is None else {"fix": self.fix}
        return {"topic": self.topic, "level": self.level.value, "message": self.message, **fix}


@dataclass(frozen=True)
class SaveSeconds:
    """How long a save may take, by what asks for it; None: it does not happen here."""

    preemption: int | None = None
    time_limit: int | None = None
    requeue_by_admin: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "preemption": self.preemption,
            "time_limit": self.time_limit,
            "requeue_by_admin": self.requeue_by_admin,
        }


@dataclass(frozen=True)
class Examined:
    """Outcome of `doctor`: the findings in their fixed order."""

    findings: tuple[Finding, ...]
    save_seconds: SaveSeconds

    @property
    def ok(self) -> bool:
        """True when nothing is bad."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """0, or the code of the family of the first bad finding."""
        return next((int(finding.family) for finding in self.findings if finding.level is Level.BAD), 0)

    def as_json(self) -> dict[str, Any]:
        return {
            "findings": [finding.as_json() for finding in self.findings],
            "save_seconds": self.save_seconds.as_json(),
            "ok": self.ok,
        }


def listed(words: Iterable[str], *, nothing: str = "none") -> str:
    """`a, b, c`, in the given order and each once."""
    return ", ".join(dict.fromkeys(words)) or nothing

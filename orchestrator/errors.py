"""Every error `orch` raises on purpose, and the exit code of the command line that goes with it.

    OrchError                      (1)  anything expected; carries a message and a hint that says what to do
    ├── SpecError                  (2)  the spec or the command line is wrong; nothing was submitted
    ├── BackendError               (3)  the scheduler or the local agent could not do what was asked
    │   └── SchedulerUnavailable   (3)  no answer from the scheduler within its deadline
    ├── ContainerError             (4)  image, engine or mount
    ├── CheckpointError            (5)  no checkpoint could be written or read
    │   ├── CheckpointCorrupt      (5)  bytes on disk do not match the manifest
    │   └── Fenced                 (5)  a newer attempt owns this run; the worker leaves with exit code 93
    ├── RegistryError              (6)  run directory or registry unreadable, unwritable or inconsistent
    │   └── RunNotFound            (6)  no run of that name under the root
    └── RefusedError               (7)  possible, but it would lose or overwrite something

No foreign exception (OSError, ValidationError, CalledProcessError, docker's) crosses a public function of the
`operations` room: it is translated into one of these where it happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class OrchError(Exception):
    """An expected failure: `message` says what happened, `hint` what to do about it."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint and hasattr(self, "add_note"):  # below a traceback, where nobody prints `hint`; Python >= 3.11
            self.add_note(f"hint: {hint}")

    def __str__(self) -> str:
        return self.message


class SpecError(OrchError):
    """The spec or the command line is wrong; nothing was submitted. `problems`: one JSON-ready dict per finding."""

    exit_code = 2

    def __init__(
        self, message: str, *, hint: str | None = None, problems: tuple[Mapping[str, object], ...] = ()
    ) -> None:
        super().__init__(message, hint=hint)
        self.problems = problems or ({"message": message},)


class BackendError(OrchError):
    """The scheduler or the local agent could not do what was asked."""

    exit_code = 3


class SchedulerUnavailable(BackendError):
    """The scheduler gave no answer within the deadline of the question."""


class ContainerError(OrchError):
    """The image, the engine or a mount is not usable."""

    exit_code = 4


class CheckpointError(OrchError):
    """A checkpoint could not be written or read; the previous one stands."""

    exit_code = 5


class CheckpointCorrupt(CheckpointError):
    """The bytes on disk do not match the size or hash in the manifest."""


class Fenced(CheckpointError):
    """A newer attempt has opened a fence epoch: this one must stop and never restart (exit code 93)."""


class RegistryError(OrchError):
    """A run directory or the registry cannot be read or written."""

    exit_code = 6


class RunNotFound(RegistryError):
    """No run of that name exists under the root that was asked."""


class RefusedError(OrchError):
    """Possible, but it would lose or overwrite something; the hint names the command that insists."""

    exit_code = 7

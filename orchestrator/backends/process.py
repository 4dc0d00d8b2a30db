"""How a backend runs a command of the scheduler: with a deadline, and replaceable by a fake (`Runner` is the port)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.errors import BackendError, SchedulerUnavailable

_REAP_S = 2.0


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


class CommandMissing(BackendError):
    """The program is not installed or not on PATH on this machine."""


class Runner(Protocol):
    """Port: run one command to its end. Raises CommandMissing, and SchedulerUnavailable past the deadline."""

    def __call__(
        self, argv: Sequence[str], *, timeout_s: float, environ: Mapping[str, str] | None = None
    ) -> Finished: ...


def run_command(argv: Sequence[str], *, timeout_s: float, environ: Mapping[str, str] | None = None) -> Finished:
    """Run `argv` without a shell, stdin closed; blocks at most `timeout_s` seconds, then kills its process group."""
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if environ is None else dict(environ),
            # Own session: Ctrl-C must not kill sbatch between queueing the job and printing its id.
            start_new_session=True,
        )
    except FileNotFoundError:
        raise CommandMissing(f"{argv[0]}: command not found") from None
    except OSError as error:
        raise BackendError(f"{argv[0]} could not be started: {error}") from error
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        raise SchedulerUnavailable(f"{argv[0]} gave no answer within {timeout_s:g} s") from None
    except BaseException:  # Ctrl-C while waiting: leave nothing running behind us
        _kill_group(process)
        raise
    return Finished(process.returncode, stdout.decode(errors="replace"), stderr.decode(errors="replace"))


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.communicate(timeout=_REAP_S)
    except subprocess.TimeoutExpired:  # asleep in a dead disk, where no signal reaches it: it ends when that wakes up
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        process.returncode = -signal.SIGKILL  # given up: nothing may wait for it

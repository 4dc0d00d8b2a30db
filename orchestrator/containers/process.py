"""PID 1 as an ordinary process in a session of its own: runtime `none`, and what other runtimes start that way.

Also the short commands of runtimes that have a client and no API.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from orchestrator.containers.payload import Payload, PayloadRequest
from orchestrator.errors import ContainerError

_KILL_WAIT_S = 10
_ABANDONED_S = 86_400.0  # no pull and no import takes so long
_SCRATCH = ".orch-import-"
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """A notice hits every process of the step: a client that dies of it leaves half a container, PID 1 no save.

    What is started inherits the mask and keeps it (Go and bash do; dash 0.5.12 until it has run a child); PID 1 takes
    it off again once it has its handlers (worker/launch).
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """For what a client leaves behind when it is killed: gone at the end, whatever a signal's handler raises."""
    parent.mkdir(parents=True, exist_ok=True)
    sweep_scratch(parent)
    path = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
    try:
        yield path
    finally:
        with stop_signals_held():
            shutil.rmtree(path, ignore_errors=True)


def sweep_scratch(parent: Path) -> None:
    """Remove what agents that were killed themselves have left there long ago."""
    for path in parent.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):  # one that has just ended, or somebody else's
            if time.time() - path.lstat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path)


def run_client(
    argv: Sequence[str], *, environ: Mapping[str, str], timeout_s: float, hint: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Its result, whatever the exit code.

    Raises ContainerError where it cannot be run, or does not answer; `hint` is for the second.
    """
    program, node = argv[0], os.uname().nodename
    try:
        with contextlib.ExitStack() as started:
            with stop_signals_held():  # which raises, where a handler does, once the process is in the stack's hands
                process = subprocess.Popen(
                    argv,
                    cwd=cwd,
                    env=dict(environ),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
                started.enter_context(process)
                started.push(lambda kind, *_: None if kind is None else _end_session(process.pid))
            output, errors = process.communicate(timeout=timeout_s)
    except FileNotFoundError as error:
        raise ContainerError(
            f"node {node} has no {program}",
            hint=f"Install {program} there (or load its module in `slurm.setup`), or take another `container.runtime`.",
        ) from error
    except subprocess.TimeoutExpired as error:
        words = f"{program} {argv[1]} does not answer on node {node}: nothing within {error.timeout:g} s"
        raise ContainerError(words, hint=hint) from error
    except OSError as error:
        raise ContainerError(f"cannot run {program} on node {node}: {error.strerror or error}", hint=hint) from error
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def _end_session(leader: int) -> None:
    """A client that is given up goes with what it has started; what one leaves that has ended is meant to stay."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def words_of(stderr: str) -> str:
    """The last error of a client in one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return " ".join(lines[-3:]).removeprefix("Error: ")[:600]


class ProcessPayload:
    """A child process that is worker/launch, or has it within."""

    def __init__(self, runtime: str, process: subprocess.Popen[bytes]) -> None:
        self._runtime = runtime
        self._process = process

    def poll(self) -> int | None:
        """Exit code once ended, else None."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def kill(self) -> None:
        """End PID 1's whole process group."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            try:
                self._process.wait(timeout=_KILL_WAIT_S)
            except subprocess.TimeoutExpired as error:
                raise ContainerError(
                    f"process {self._process.pid} did not end within {_KILL_WAIT_S} s of SIGKILL",
                    hint="It is in uninterruptible sleep: look at the file systems of this node.",
                ) from error

    def close(self) -> None:
        """Nothing is kept."""

    def early_output(self) -> str:
        """Nothing: it went to the node's log."""
        return ""

    def out_of_memory(self) -> bool:
        """No engine that could say; PID 1's own report is all there is."""
        return False

    def describe(self) -> dict[str, object]:
        """pid of the child."""
        return {"runtime": self._runtime, "pid": self._process.pid}


def spawn(runtime: str, argv: Sequence[str], request: PayloadRequest, environ: Mapping[str, str], hint: str) -> Payload:
    """Start a command whose early output goes to the node's log. Raises ContainerError, with the hint."""
    try:
        with request.log.open("ab") as log, stop_signals_held():
            process = subprocess.Popen(
                argv,
                cwd=request.cwd,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    except OSError as error:
        raise ContainerError(f"cannot start {argv[0]}: {error.strerror or error}", hint=hint) from error
    return ProcessPayload(runtime, process)


class ProcessRuntime:
    """No container: the interpreter and libraries of the node."""

    name = "none"

    def remove_leftovers(self, run_dir: str, node: str, before_attempt: int) -> Sequence[str]:
        """Nothing to do: without its agent a payload ends by its leash."""
        return ()

    def prepare(self, request: PayloadRequest) -> None:
        """Nothing to do: there is no image."""

    def start(self, request: PayloadRequest) -> Payload:
        """Start PID 1 as a child."""
        hint = "`slurm.python` must name an interpreter that exists on the compute nodes."
        return spawn(self.name, request.argv, request, {**os.environ, **request.environ}, hint)

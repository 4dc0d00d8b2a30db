"""PID 1 as an ordinary process in a session of its own: runtime `none`, and what other runtimes start that way."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from orchestrator.containers.payload import Payload, PayloadRequest
from orchestrator.errors import ContainerError

_KILL_WAIT_S = 10


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
        with request.log.open("ab") as log:
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

    def start(self, request: PayloadRequest) -> Payload:
        """Start PID 1 as a child."""
        hint = "`slurm.python` must name an interpreter that exists on the compute nodes."
        return spawn(self.name, request.argv, request, {**os.environ, **request.environ}, hint)

"""Backend `local`: the agent as a detached process of this machine, with the same rules as under Slurm."""

from __future__ import annotations

import contextlib
import os
import signal as signals
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.backends.base import Command, JobHandle, JobStatus, SchedulerState
from orchestrator.errors import BackendError, RegistryError
from orchestrator.files import read_json
from orchestrator.paths import RunPaths
from orchestrator.worker.scheduler import local_job_id, local_pid, process_identity

if TYPE_CHECKING:
    from orchestrator.plan import Plan

_START_S = 30.0
_POLL_S = 0.02
# Agents outlive their handles. Kept here: a Popen that is forgotten while its process runs warns when collected.
_started: list[subprocess.Popen[bytes]] = []


class LocalBackend:
    """Starts, finds, signals and cancels agents on this machine. A job id is `pid.start_time`."""

    name = "local"

    def submit(self, plan: Plan, *, environ: Mapping[str, str]) -> JobHandle:
        """Start the agent in a session of its own; return once it has written who it is."""
        paths = RunPaths(plan.run_dir)
        paths.local_agent.unlink(missing_ok=True)
        paths.scheduler_log.parent.mkdir(parents=True, exist_ok=True)
        argv = [plan.agent["python"], "-m", "orchestrator.worker.agent", "local", str(plan.run_dir)]
        argv += ["--token", plan.token]
        try:
            with paths.scheduler_log.open("ab") as log:
                process = subprocess.Popen(
                    argv,
                    cwd="/",
                    env=dict(environ),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            raise BackendError(
                f"cannot start {argv[0]}: {error.strerror}",
                hint="`slurm.python` must be an interpreter of this machine.",
            ) from error
        _started[:] = [*(known for known in _started if known.poll() is None), process]
        try:
            return self._wait_until_up(process, paths)
        except BaseException:  # Ctrl-C included: nobody would know of this agent
            process.kill()
            raise

    def _wait_until_up(self, process: subprocess.Popen[bytes], paths: RunPaths) -> JobHandle:
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            with contextlib.suppress(FileNotFoundError):  # not written yet
                return JobHandle(self.name, local_job_id(read_json(paths.local_agent)))
            if process.poll() is not None:
                break
            time.sleep(_POLL_S)
        words = _tail(paths.scheduler_log)
        raise BackendError(f"the local agent did not start: {words}", hint=f"Its output is in {paths.scheduler_log}.")

    def find(self, token: str) -> JobHandle | None:
        """The agent that was started with this token; its submitter may have been killed before it noted the pid."""
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it has just ended, or is somebody else's
                if process.name.isdigit() and token.encode() in (process / "cmdline").read_bytes().split(b"\0"):
                    return JobHandle(self.name, local_job_id(process_identity(int(process.name))))
        return None

    def poll(self, handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        """Running while pid and start time exist, else unknown."""
        return {
            handle: JobStatus(
                SchedulerState.RUNNING if local_pid(handle.job_id) is not None else SchedulerState.UNKNOWN
            )
            for handle in handles
        }

    def cancel(self, handle: JobHandle) -> None:
        """SIGTERM to the agent: it saves, sees the tombstone and ends."""
        pid = local_pid(handle.job_id)
        if pid is not None:
            _send(pid, signals.SIGTERM)

    def signal(self, handle: JobHandle, signal: str) -> None:
        """Signal the agent; BackendError when it is not running."""
        pid = local_pid(handle.job_id)
        if pid is None:
            raise BackendError(f"local job {handle.job_id} is not running", hint="See `orch status`.")
        _send(pid, getattr(signals, f"SIG{signal}"))

    def beside(
        self,
        handle: JobHandle,
        argv: Sequence[str],
        *,
        nodes: Sequence[str],
        environ: Mapping[str, str],
        terminal: bool = False,
    ) -> Command:
        """The command itself: the job's node is this machine, also where that is inside somebody's Slurm job."""
        return Command(tuple(argv), {key: value for key, value in environ.items() if key != "SLURMD_NODENAME"})


def _send(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended by itself: what we wanted
        os.kill(pid, signum)


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise RegistryError(f"{path}: {error.strerror}") from error
    return lines[-1] if lines else "it said nothing"

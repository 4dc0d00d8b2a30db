"""Backends: `slurm` (on submitit's job handles and watcher) and `local` (the same agent as a detached process)."""

from __future__ import annotations

from orchestrator.backends.base import Backend, Command, JobHandle, JobStatus, SchedulerState
from orchestrator.errors import BackendError

__all__ = ["Backend", "Command", "JobHandle", "JobStatus", "SchedulerState", "open_backend"]


def open_backend(name: str) -> Backend:
    """The backend of that name (`slurm` or `local`); imports it only now. Raises BackendError for another name."""
    if name == "slurm":
        from orchestrator.backends.slurm import SlurmBackend

        return SlurmBackend()
    if name == "local":
        from orchestrator.backends.local import LocalBackend

        return LocalBackend()
    raise BackendError(f"there is no backend {name!r}", hint="backend: slurm or backend: local")

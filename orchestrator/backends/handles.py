"""submitit's job handles and batched watcher on the jobs of `orch`, asking in our way.

submitit's own watcher asks sacct without a deadline, prints its errors and stays UNKNOWN for ever on a cluster without
slurmdbd; so the question, its reading and the rule for endings are replaced (`squeue.StatusBook`). What is taken: the
handle's interface, registration, and the watcher's backing off (0, 2, 4, 8 s … between questions for all jobs at once).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from orchestrator.backends import squeue
from orchestrator.backends.base import JobStatus, SchedulerState


class QueueWatcher(SlurmInfoWatcher):
    """One question for all registered jobs."""

    def __init__(self, book: squeue.StatusBook, delay_s: int = 60) -> None:
        super().__init__(delay_s=delay_s)
        self._book = book

    def _make_command(self) -> list[str] | None:
        return squeue.squeue_command(self._registered) if self._registered else None

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """submitit's shape of an answer: job id → {"State", "NodeList", "Reason"}."""
        text = string.decode(errors="replace") if isinstance(string, bytes) else string
        return {job_id: _row(status) for job_id, status in squeue.read_squeue(text).items()}

    def update(self) -> None:
        """Ask about every registered job now; bounded by a deadline. Raises SchedulerUnavailable."""
        if not self._registered:
            return
        self._num_calls += 1
        self._book.update(self._registered)
        self._last_status_check = time.time()
        # Nothing is cached as finished (submitit would): a requeue brings a job back to life.
        self._info_dict = {job_id: _row(self._book.status(job_id)) for job_id in self._registered}

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        """PENDING, RUNNING, COMPLETING, ENDED, or UNKNOWN for a job that was never seen."""
        self.get_info(job_id, mode=mode)
        return self._book.status(job_id).state.name

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """True once the job was seen and has ended; an unknown job is never done."""
        return self.get_state(job_id, mode=mode) == SchedulerState.ENDED.name


class TrackedJob(SlurmJob[Any]):
    """A handle on a job that `orch` submitted; its results are files in the run directory, not pickles."""

    def __init__(self, folder: Path | str, job_id: str, *, watcher: QueueWatcher, stop: Callable[[], None]) -> None:
        self.watcher = watcher  # before super().__init__, which registers the job there
        self._stop = stop
        super().__init__(folder=folder, job_id=job_id)

    def cancel(self, check: bool = True) -> None:
        """scancel, bounded by a deadline (submitit's has none); a job that has ended is fine."""
        self._stop()

    def done(self, force_check: bool = False) -> bool:
        """True once the scheduler has let go of the job."""
        return self.watcher.is_done(self.job_id, mode="force" if force_check else "standard")


def _row(status: JobStatus) -> dict[str, str]:
    return {"State": status.state.name, "NodeList": ",".join(status.nodes), "Reason": status.reason}

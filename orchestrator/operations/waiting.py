"""`wait`: block until a run has ended or the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.backends import open_backend
from orchestrator.operations.describe import OpenBackend, status_at
from orchestrator.operations.record import load_record
from orchestrator.operations.results import RunStatus, Waited
from orchestrator.operations.roots import find_run
from orchestrator.operations.state import is_settled
from orchestrator.paths import RunPaths
from orchestrator.registry.submissions import SHOWN_LATE_S
from orchestrator.states import JobState

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0  # between questions to the scheduler
_LOOK_S = 0.25  # between looks at the files, which cost nothing


def wait(
    run: str,
    *,
    timeout_s: float | None = None,
    root: str | Path | None = None,
    open_backend: OpenBackend = open_backend,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Waited:
    """Block until the run is completed, failed, cancelled, lost or waits for `orch resume`; at most `timeout_s`."""
    paths = find_run(run, root)
    begin = clock()
    end = None if timeout_s is None else begin + timeout_s
    pause, lost_since = _FIRST_PAUSE_S, None
    while True:
        status = status_at(paths, open_backend=open_backend)
        now = clock()
        lost_since = (lost_since if lost_since is not None else now) if status.state is JobState.LOST else None
        if _over(status) and (lost_since is None or now - lost_since >= SHOWN_LATE_S):
            status_at(paths, open_backend=open_backend, announcing=True)
            return Waited(status, timed_out=False)
        if end is not None and now >= end:
            return Waited(status, timed_out=True)
        _look_at_files(paths, min(now + pause, end or now + pause), clock, sleep)
        pause = _FIRST_PAUSE_S if lost_since is not None else min(pause * 1.5, _LONGEST_PAUSE_S)


def _over(status: RunStatus) -> bool:
    return status.state.terminal and not (status.alive and status.state is JobState.NEEDS_RESUME)


def _look_at_files(paths: RunPaths, until: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
    """Pass the time until the next question, cut short when the files show that the run has ended."""
    while clock() < until:
        sleep(max(0.0, min(_LOOK_S, until - clock())))
        record = load_record(paths)
        if record.submission is not None and is_settled(record):
            return

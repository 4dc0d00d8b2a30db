"""How far a run is and whether it lives: `progress.json` and `heartbeat`, written by threads so that no step waits."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from orchestrator.files import write_json
from orchestrator.paths import RunPaths

_log = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 1.0
HEARTBEAT_INTERVAL_S = 15.0


class ProgressWriter:
    """Writes the latest progress at most once a second, and the last one always. Owner: rank 0.

    `update` only stores numbers; a daemon thread does the writing, because an fsync on a busy disk takes longer than a
    step. Progress is for people: when it cannot be written (full disk) that is logged once, and the training goes on.
    """

    def __init__(
        self,
        paths: RunPaths,
        attempt: int,
        *,
        interval_s: float = PROGRESS_INTERVAL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = paths.progress
        self._attempt = attempt
        self._interval_s = interval_s
        self._clock = clock
        self._latest: dict[str, Any] | None = None
        self._pending = threading.Event()
        self._closing = threading.Event()
        self._writing = threading.Lock()
        self._failed: int | None = None  # errno of the last failure: the same one is logged once
        self._thread = threading.Thread(target=self._run, name="orch-progress", daemon=True)
        self._thread.start()

    def update(
        self,
        step: int,
        epoch: int,
        max_steps: int | None,
        throughput: float | None = None,
        rank_seconds: Sequence[float] | None = None,
    ) -> None:
        """Note the progress: optimizer steps completed, epoch, steps in all, samples per second, and the seconds of a
        step that each rank spends by itself. Never blocks."""
        self._latest = {
            "step": step,
            "epoch": epoch,
            "max_steps": max_steps,
            "throughput": throughput,
            "rank_seconds": None if rank_seconds is None else list(rank_seconds),
            "attempt": self._attempt,
            "time": self._clock(),
        }
        self._pending.set()

    def flush(self) -> None:
        """Write the latest progress now, if it is not on disk yet. Blocks for one small fsync."""
        with self._writing:
            if not self._pending.is_set():
                return
            self._pending.clear()  # before reading: an update in between is then written again, never lost
            latest = self._latest
            try:
                write_json(self._path, latest)
            except OSError as error:
                self._pending.set()
                self._complain(error)
            else:
                self._failed = None

    def close(self) -> None:
        """Write what is left and stop the thread."""
        self._closing.set()
        self._pending.set()
        self._thread.join()
        if self._latest is not None:
            self.flush()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._pending.wait()
            if self._latest is not None and not self._closing.is_set():
                self.flush()
            self._closing.wait(self._interval_s)

    def _complain(self, error: OSError) -> None:
        if self._failed != error.errno:
            self._failed = error.errno
            _log.warning("progress is not being recorded in %s: %s", self._path, error.strerror)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class HeartbeatThread(threading.Thread):
    """Rewrites `heartbeat` every 15 s while the process lives; a daemon, so that it never keeps it alive."""

    def __init__(
        self,
        paths: RunPaths,
        attempt: int,
        *,
        interval_s: float = HEARTBEAT_INTERVAL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(name="orch-heartbeat", daemon=True)
        self._path = paths.heartbeat
        self._attempt = attempt
        self._interval_s = interval_s
        self._clock = clock
        self._stop_requested = threading.Event()
        self._failed: int | None = None  # errno of the last failure: the same one is logged once

    def run(self) -> None:
        while True:
            self._beat()
            if self._stop_requested.wait(self._interval_s):
                return

    def _beat(self) -> None:
        beat = {"time": self._clock(), "attempt": self._attempt, "pid": os.getpid(), "node": os.uname().nodename}
        try:
            write_json(self._path, beat)
            self._failed = None
        except OSError as error:  # the training goes on; the readers of heartbeats ask the scheduler first
            if self._failed != error.errno:
                self._failed = error.errno
                _log.warning("the heartbeat cannot be written to %s: %s", self._path, error.strerror)

    def stop(self) -> None:
        """End the thread; returns when it has ended."""
        self._stop_requested.set()
        if self.is_alive():
            self.join()

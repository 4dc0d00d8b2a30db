"""Being asked to stop: the flag a signal handler sets, the deadline that comes with it, the watchdog that enforces it.

PROTOCOLS 3: the handler does nothing but set a flag, because it runs between two bytecodes of a training step; the work
happens at the next step boundary. The deadline is a file, written by the agent on the host (which can ask the
scheduler) and replaced by an earlier one when a second signal shortens the time.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

log = logging.getLogger("orchestrator.worker")

DEADLINE_MARGIN_S = 1.0  # writing the verdict and leaving takes this long at worst
WATCHDOG_POLL_S = 0.25


class StopRequest:
    """Whether this process was asked to stop, since when, and by when it must be gone."""

    def __init__(self, deadline_file: Path | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._deadline_file = deadline_file
        self._clock = clock
        self._deadline: float | None = None
        self.signalled_at: float | None = None

    @property
    def requested(self) -> bool:
        """True from the first signal on; it never becomes false again."""
        return self.signalled_at is not None

    def install(self, signals: Iterable[signal.Signals]) -> None:
        """Catch `signals` in this process. PID 1 re-delivers what arrived before this call.

        Python allows that in the main thread only; elsewhere nothing is caught, and a warning says so.
        """
        if threading.current_thread() is not threading.main_thread():
            log.warning("not in the main thread: stop signals are not caught, nothing is saved when they come")
            return
        for number in signals:
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self.signalled_at is None:
            self.signalled_at = self._clock()

    def deadline(self) -> float | None:
        """Unix time by which this process must be gone, margin already taken off; None while nobody has set one."""
        if self._deadline_file is None:
            return None
        try:
            given = json.loads(self._deadline_file.read_bytes()).get("deadline")
        except FileNotFoundError:
            return self._deadline
        except (OSError, ValueError):
            return self._deadline  # a stale NFS handle or a half-written file: what was read before still holds
        if isinstance(given, int | float):
            self._deadline = float(given) - DEADLINE_MARGIN_S
        return self._deadline

    def seconds_left(self) -> float | None:
        """Seconds until the deadline (negative when it has passed); None where there is none."""
        deadline = self.deadline()
        return None if deadline is None else deadline - self._clock()


class DeadlineWatchdog(threading.Thread):
    """Calls `missed` once when the deadline passes: a hung collective or a dead peer reaches no step boundary."""

    def __init__(self, request: StopRequest, missed: Callable[[], object], *, grace_s: float = 0.0) -> None:
        super().__init__(name="orch-deadline-watchdog", daemon=True)
        self._request = request
        self._missed = missed
        self._grace_s = grace_s
        self._stopped = threading.Event()

    def run(self) -> None:
        # Not only once our handler has run: that needs the main thread, which a collective can hold in C for ever. The
        # deadline is there from the moment the agent orders the stop.
        while not self._stopped.wait(WATCHDOG_POLL_S):
            left = self._request.seconds_left()
            if left is not None and left + self._grace_s <= 0:
                self._missed()
                return

    def stop(self) -> None:
        """Let the thread end; used where a process outlives its session (tests, notebooks)."""
        self._stopped.set()

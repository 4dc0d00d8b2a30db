"""Noticing that a run stands still: no new step although rank 0 lives (`watchdog.no_progress`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.files import read_json
from orchestrator.paths import RunPaths

_LOOKS = 10  # per limit; the shared disk is asked no more often than needed …
_LONGEST_PAUSE_S = 15.0  # … and not so rarely that the limit means little


class StallWatch:
    """Whether rank 0's step has stood still for `limit_s`. Other machines' clocks play no part."""

    def __init__(
        self, paths: RunPaths, attempt: int, limit_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._paths = paths
        self._attempt = attempt
        self._limit_s = limit_s
        self._clock = clock
        self._next_look = 0.0
        self._since: float | None = None
        self.step: int | None = None

    def stalled(self) -> bool:
        """Look now and then. False until rank 0 has spoken: a program without our library reports no step at all."""
        now = self._clock()
        if now < self._next_look:
            return False
        self._next_look = now + min(self._limit_s / _LOOKS, _LONGEST_PAUSE_S)
        step = self._of_this_attempt(self._paths.progress).get("step")
        if self._since is None and step is None and not self._of_this_attempt(self._paths.heartbeat):
            return False
        if self._since is None or step != self.step:
            self._since, self.step = now, step
        return now - self._since >= self._limit_s

    def _of_this_attempt(self, path: Path) -> dict[str, Any]:
        """The file's content; nothing where it is missing, stale (NFS) or an older attempt's."""
        with contextlib.suppress(OSError):
            content: dict[str, Any] = read_json(path)
            if content.get("attempt") == self._attempt:
                return content
        return {}

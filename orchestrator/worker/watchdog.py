"""Noticing that a run stands still: no new step although rank 0 lives (`watchdog.no_progress`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.errors import RegistryError
from orchestrator.files import read_json
from orchestrator.paths import RunPaths

_LOOKS = 10  # per limit; the shared disk is asked no more often than needed …
_LONGEST_PAUSE_S = 15.0  # … and not so rarely that the limit means little


class StallWatch:
    """Whether rank 0's step has stood still for `limit_s`. Other machines' clocks play no part.

    Only time during which we looked counts: a suspended job and a disk that did not answer stop us like the ranks, who
    must get as long as ever once they go on.
    """

    def __init__(
        self, paths: RunPaths, attempt: int, limit_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._paths = paths
        self._attempt = attempt
        self._limit_s = limit_s
        self._clock = clock
        self._pause_s = min(limit_s / _LOOKS, _LONGEST_PAUSE_S)
        self._looked_at = -_LONGEST_PAUSE_S
        self._still_s: float | None = None
        self.step: int | None = None

    def stalled(self) -> bool:
        """Look now and then. False until rank 0 has spoken: a program without our library reports no step at all."""
        if self._clock() < self._looked_at + self._pause_s:
            return False
        step = self._of_this_attempt(self._paths.progress).get("step")
        spoken = self._still_s is not None or step is not None or bool(self._of_this_attempt(self._paths.heartbeat))
        now = self._clock()  # reading may have taken long
        passed_s, self._looked_at = min(now - self._looked_at, 2 * self._pause_s), now
        if not spoken:
            return False
        if self._still_s is None or step != self.step:
            self._still_s, self.step = 0.0, step
        else:
            self._still_s += passed_s
        return self._still_s >= self._limit_s

    def _of_this_attempt(self, path: Path) -> dict[str, Any]:
        """The file's content; nothing where it is missing, stale (NFS), damaged or an older attempt's."""
        try:
            content: Any = read_json(path)
        except (OSError, RegistryError):
            return {}
        return content if isinstance(content, dict) and content.get("attempt") == self._attempt else {}

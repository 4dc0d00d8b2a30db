"""Watching a drill: from the signal to the first step of the next attempt, told from the run's own events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.backends import open_backend
from orchestrator.operations.describe import OpenBackend, status_at
from orchestrator.operations.record import load_record
from orchestrator.operations.results import RunStatus, Signalled
from orchestrator.paths import RunPaths

_LOOK_S = 0.2
_ASK_S = 5.0
_SILENT_S = 30.0  # a program that does not use our library never says that it resumed


@dataclass(frozen=True)
class DrillNews:
    """One thing that happened: saved | requeued | started | resumed | ended | time_up."""

    kind: str
    step: int | None = None
    seconds: float | None = None
    status: RunStatus | None = None


def watch_drill(
    drill: Signalled,
    *,
    timeout_s: float,
    open_backend: OpenBackend = open_backend,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[DrillNews]:
    """Yield news until the run goes on in a new attempt, ends, or the time is up. Blocks."""
    paths = RunPaths(Path(drill.run_dir))
    end, asked_at, told, started_at = clock() + timeout_s, clock(), set[str](), float("inf")
    while clock() < end:
        for news in _news(paths, drill):
            if news.kind not in told:
                told.add(news.kind)
                started_at = clock() if news.kind == "started" else started_at
                yield news
        if "resumed" in told or _begins_anew(paths, drill) or clock() - started_at > _SILENT_S:
            yield DrillNews("ended", status=status_at(paths, open_backend=open_backend))
            return
        if clock() - asked_at > _ASK_S or "finished" in told:
            asked_at = clock()
            status = status_at(paths, open_backend=open_backend)
            if status.state.terminal and not status.alive:
                yield DrillNews("ended", status=status)
                return
        sleep(_LOOK_S)
    yield DrillNews("time_up", status=status_at(paths, open_backend=open_backend))


def _begins_anew(paths: RunPaths, drill: Signalled) -> bool:
    """The next attempt makes steps without having resumed: nothing was saved."""
    attempt = load_record(paths).progress.get("attempt")
    return isinstance(attempt, int) and drill.attempt is not None and attempt > drill.attempt


_KINDS = {
    "verdict": "saved",  # not the commits: a periodic one may fall between the signal and the stop
    "requeued": "requeued",
    "attempt_started": "started",
    "resumed": "resumed",
    "finished": "finished",
    "cancelled": "finished",
}


def _news(paths: RunPaths, drill: Signalled) -> Iterator[DrillNews]:
    attempt = -1 if drill.attempt is None else drill.attempt
    for event in load_record(paths).events:
        kind = _KINDS.get(str(event.get("event")))
        number = event.get("attempt")
        if kind == "saved" and event.get("outcome") != "saved":  # a node's verdict, or one of another outcome
            continue
        if kind is None or float(event.get("time") or 0.0) < drill.time or not isinstance(number, int):
            continue
        later = kind in ("started", "resumed")
        if (number > attempt) if later else (number == attempt):
            step = event.get("step")
            yield DrillNews(kind, step if isinstance(step, int) else None, float(event.get("time") or 0.0) - drill.time)

"""`logs`: what a rank (or a node's agent) printed, attempt after attempt; `follow` goes on until the run ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.backends import open_backend
from orchestrator.errors import RegistryError, RunNotFound
from orchestrator.operations.describe import OpenBackend, status_at
from orchestrator.operations.record import load_record
from orchestrator.operations.roots import find_run
from orchestrator.paths import RunPaths

_LOOK_S = 0.3  # how often a followed file is looked at
_ASK_S = 5.0  # how often the run's state is asked for while nothing new is printed


@dataclass(frozen=True)
class LogLine:
    """One line without its newline; `heading` lines are ours, not the program's."""

    text: str
    attempt: int | None
    heading: bool = False


def logs(
    run: str,
    *,
    attempt: int | None = None,
    rank: int = 0,
    node: int | None = None,
    follow: bool = False,
    root: str | Path | None = None,
    open_backend: OpenBackend = open_backend,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[LogLine]:
    """Lines of one rank's log (or of one node's agent): of the newest attempt, or of `attempt`.

    With `follow`, blocks until the run ends, moving on to later attempts. Raises RunNotFound where there is no log.
    """
    paths = find_run(run, root)
    newest = load_record(paths).last_attempt
    number = attempt if attempt is not None else newest
    if number is not None and newest is not None and number > newest and not follow:
        raise RunNotFound(
            f"{paths.run_dir.name} has no attempt {number}",
            hint="it has attempt 0 only" if newest == 0 else f"its attempts are 0 to {newest}",
        )
    if follow:
        return _follow(paths, number, rank, node, attempt is not None, open_backend, sleep)
    chosen = _existing(paths, number, rank, node)
    if chosen is None:
        raise RunNotFound(_nothing(paths, number, rank, node), hint=f"how it stands: orch status {paths.run_dir.name}")
    return _read(chosen, number)


def _existing(paths: RunPaths, attempt: int | None, rank: int, node: int | None) -> Path | None:
    """The log asked for; before a rank has printed anything, what its agent or the batch script said."""
    wanted: list[Path] = []
    if attempt is not None:
        wanted = [paths.rank_log(attempt, rank)] if node is None else [paths.node_log(attempt, node)]
        if node is None and rank == 0:
            wanted.append(paths.node_log(attempt, 0))
    if node is None and rank == 0:
        wanted.append(paths.scheduler_log)
    return next((path for path in wanted if path.exists() and path.stat().st_size > 0), None)


def _nothing(paths: RunPaths, attempt: int | None, rank: int, node: int | None) -> str:
    who = f"rank {rank}" if node is None else f"node {node}"
    when = "has not started" if attempt is None else f"printed nothing in attempt {attempt}"
    return f"{paths.run_dir.name}: {who} {when}"


def _read(path: Path, attempt: int | None) -> Iterator[LogLine]:
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as stream:
            for line in stream:
                yield LogLine(line.rstrip("\n"), attempt)
    except OSError as error:
        raise RegistryError(f"cannot read {path}: {error}", hint="is the shared disk mounted here?") from error


def _follow(
    paths: RunPaths,
    attempt: int | None,
    rank: int,
    node: int | None,
    only_this: bool,
    open_backend: OpenBackend,
    sleep: Callable[[float], None],
) -> Iterator[LogLine]:
    """Tail the log; a file that appears later takes over from its stand-in, a new attempt from the old one."""
    reading: Path | None = None
    position, ended, last_asked = 0, False, float("-inf")
    while True:
        wanted = _existing(paths, attempt, rank, node)
        if wanted is not None and wanted != reading:
            if reading is not None or attempt:
                yield LogLine(f"── attempt {attempt} · {wanted.name} ──", attempt, heading=True)
            reading, position = wanted, 0
        lines, position = _tail(reading, position, flush=ended)
        yield from (LogLine(line, attempt) for line in lines)
        if lines:
            continue
        newest = load_record(paths).last_attempt if not only_this else attempt
        if newest is not None and newest != attempt:
            attempt = newest if attempt is None else attempt + 1
            continue
        if ended:
            return
        if time.monotonic() - last_asked >= _ASK_S or _said_its_last(paths):
            last_asked = time.monotonic()
            ended = not _goes_on(paths, open_backend, attempt if only_this else None)
        if not ended:
            sleep(_LOOK_S)


def _tail(path: Path | None, position: int, *, flush: bool) -> tuple[list[str], int]:
    """Whole new lines from `position` on; a line without its newline waits, unless it is the last there will be."""
    if path is None:
        return [], position
    try:
        with path.open("rb") as stream:
            stream.seek(position)
            data = stream.read(1 << 20)
    except FileNotFoundError:
        return [], position
    if not flush and len(data) < (1 << 20):
        data = data[: data.rfind(b"\n") + 1]
    lines = data.decode(errors="replace").splitlines()
    return lines, position + len(data)


def _said_its_last(paths: RunPaths) -> bool:
    """The files alone show the end (cheap), so there is no need to wait for the next question to the scheduler."""
    from orchestrator.operations.state import is_settled

    record = load_record(paths)
    return record.submission is not None and is_settled(record)


def _goes_on(paths: RunPaths, open_backend: OpenBackend, only_attempt: int | None) -> bool:
    status = status_at(paths, open_backend=open_backend)
    if only_attempt is not None and status.attempt is not None and status.attempt > only_attempt:
        return False
    return status.alive or not status.state.terminal

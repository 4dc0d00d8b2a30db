"""What happened to a run, one file per writer, merged when read: appends of two NFS clients to one file would tear."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import RegistryError
from orchestrator.files import append_line, read_bytes
from orchestrator.paths import RunPaths

_WRITER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")


class EventLog:
    """Appends events of one writer (`login`, `agent-n0`, `rank0` …); nobody else may write under that name."""

    def __init__(
        self,
        paths: RunPaths,
        writer: str,
        *,
        attempt: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if _WRITER.fullmatch(writer) is None:
            raise RegistryError(f"{writer!r} cannot be the name of an event writer", hint="use letters, digits, . _ -")
        self.path = paths.events(writer)
        self.writer = writer
        self.attempt = attempt
        self._clock = clock

    def append(self, event: str, **fields: Any) -> None:
        """Append one event; `attempt` may be among the fields. Raises RegistryError when it cannot be written."""
        line = {"time": self._clock(), "writer": self.writer, "event": event, "attempt": self.attempt, **fields}
        try:
            try:
                append_line(self.path, line)
            except FileNotFoundError:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                append_line(self.path, line)
        except OSError as error:
            raise RegistryError(
                f"could not record the event {event!r} in {self.path}: {error.strerror or error}",
                hint="check free space, quota and permissions of the run directory",
            ) from error


def read_events(paths: RunPaths) -> list[dict[str, Any]]:
    """All events of a run by time; within one writer always in the order written. Torn lines are left out.

    Empty for a run that has none yet. Raises RegistryError when a file cannot be read.
    """
    keyed: list[tuple[float, str, int, dict[str, Any]]] = []
    try:
        files = sorted(paths.events_dir.glob("*.jsonl"))
        for path in files:
            newest = float("-inf")
            for number, event in enumerate(_iter_events(path)):
                newest = max(newest, event["time"])  # a clock that was set back must not reorder a writer's own story
                keyed.append((newest, path.name, number, event))
    except OSError as error:
        raise RegistryError(f"cannot read the events in {paths.events_dir}: {error.strerror or error}") from error
    return [event for _, _, _, event in sorted(keyed, key=lambda item: item[:3])]


def _iter_events(path: Path) -> Iterator[dict[str, Any]]:
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return
    for line in data.split(b"\n"):
        # A writer that was killed, or a full disk, leaves a torn line, the last one or (after a restart) any one.
        try:
            event = json.loads(line) if line.strip() else None
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("time"), (int, float)) and "event" in event:
            yield event

"""`metrics.csv`: every logged number of a run, once, in long format `step,epoch,name,value` (PROTOCOLS 2)."""

from __future__ import annotations

import csv
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, SupportsFloat

from orchestrator.errors import RegistryError
from orchestrator.files import float_word, open_atomic

COLUMNS = ("step", "epoch", "name", "value")
_HEADER = ",".join(COLUMNS) + "\n"


class MetricRow(NamedTuple):
    """One logged number; `step` counts completed optimizer steps."""

    step: int
    epoch: int
    name: str
    value: float


class MetricsLog:
    """Appends metrics of one attempt. Owner: rank 0. No times in it: two exact runs have equal files.

    On opening, the rows an older attempt logged after its last checkpoint are dropped (they will be logged again):
    rows with step > `resumed_step`, or all when it is None. With `keep_rows` (the value of `rows` when the checkpoint
    was saved) rows beyond that count go too: those logged at the very step of the checkpoint, but after it.
    """

    def __init__(self, path: Path, *, resumed_step: int | None, keep_rows: int | None = None) -> None:
        """Raises RegistryError when the file cannot be written or is not a metrics file."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.rows = _rewrite(path, resumed_step, keep_rows)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise self._failure(error) from error

    def append(self, step: int, epoch: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Append one row per metric with a single write. Floats read back exactly. Raises RegistryError."""
        if not metrics:
            return
        rows = [_render_row(str(step), str(epoch), name, float_word(float(v))) for name, v in metrics.items()]
        data = "".join(rows).encode(errors="backslashreplace")
        try:
            size = os.fstat(self._fd).st_size
            if os.write(self._fd, data) != len(data):  # the disk is full: no half row stays
                os.ftruncate(self._fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._failure(error) from error
        self.rows += len(metrics)

    def sync(self) -> None:
        """Make the rows durable. To be called before the checkpoint that counts on them. Raises RegistryError."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Make the rows durable and close the file. May be called twice."""
        if self._fd >= 0:
            self.sync()
            os.close(self._fd)
            self._fd = -1

    def _failure(self, error: OSError) -> RegistryError:
        return RegistryError(
            f"cannot write {self.path}: {error.strerror or error}",
            hint="check free space, quota and permissions of the run directory",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def iter_metrics(path: Path) -> Iterator[MetricRow]:
    """The rows of a metrics file, oldest first; a last line that is still being written is left out.

    Nothing for a file that does not exist yet. Raises RegistryError for a file that is something else.
    """
    for step, epoch, name, value in _iter_rows(path):
        yield MetricRow(int(step), int(epoch), name, float(value))


def _rewrite(path: Path, resumed_step: int | None, keep_rows: int | None) -> int:
    """Replace the file by the rows to keep and return how many they are."""
    kept = 0
    with open_atomic(path) as handle:
        handle.write(_HEADER.encode())
        for row in _iter_rows(path) if resumed_step is not None else ():
            if resumed_step is None or int(row[0]) > resumed_step or kept == keep_rows:
                continue
            handle.write(_render_row(*row).encode(errors="surrogateescape"))
            kept += 1
    return kept


def _render_row(step: str, epoch: str, name: str, value: str) -> str:
    # Not csv.writer: which characters it quotes differs between Python versions, and a lone "\r", which some leave
    # unquoted, cannot be read back. Equal runs must have equal files on every interpreter.
    if any(character in name for character in ',"\r\n'):
        name = '"' + name.replace('"', '""') + '"'
    return f"{step},{epoch},{name},{value}\n"


def _iter_rows(path: Path) -> Iterator[list[str]]:
    try:
        handle = path.open(newline="\n", encoding="utf-8", errors="surrogateescape")  # a "\r" in a name ends no line
    except FileNotFoundError:
        return
    with handle:
        header = handle.readline()
        if header != _HEADER:
            if header and not _HEADER.startswith(header):
                raise RegistryError(
                    f"{path} does not start with {_HEADER.strip()!r}: it is not a metrics file of orch",
                    hint="move it aside",
                )
            return  # killed before the first line was complete
        for row in csv.reader(_complete_lines(handle)):
            if not _is_row(row):
                # Only the last row can be torn (a kill in the middle of a write); anything else is damage, and a run
                # that goes on with holes in its history would not be the run that was never touched.
                if next(handle, None) is None:
                    return
                raise RegistryError(
                    f"{path} has a damaged row: {row!r}", hint="restore it from a copy or move it aside"
                )
            yield row


def _complete_lines(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.endswith("\n"):
            yield line


def _is_row(row: list[str]) -> bool:
    if len(row) != len(COLUMNS):
        return False
    try:
        int(row[0]), int(row[1]), float(row[3])
    except ValueError:
        return False
    return True

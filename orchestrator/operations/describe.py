"""`status` and `ps`: what the run directories say, corrected by one question per backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from orchestrator.backends import open_backend
from orchestrator.backends.base import Backend, JobHandle, JobStatus
from orchestrator.backends.squeue import expand_nodes
from orchestrator.errors import BackendError, OrchError, RegistryError
from orchestrator.files import read_json
from orchestrator.operations.announcing import announce, nobody_said
from orchestrator.operations.record import Record, load_record
from orchestrator.operations.results import Attempt, CheckpointRef, Progress, RunRow, RunStatus
from orchestrator.operations.roots import find_run, known_roots, run_names
from orchestrator.operations.state import Standing, is_settled, reason_of, resolve
from orchestrator.paths import RootPaths, RunPaths
from orchestrator.states import ExitReason, JobState

OpenBackend: TypeAlias = Callable[[str], Backend]
_LONG_AGO_S = 300.0

Asked: TypeAlias = dict[JobHandle, JobStatus]


def status(run: str, *, root: str | Path | None = None, open_backend: OpenBackend = open_backend) -> RunStatus:
    """Where a run stands. Reads files and asks its scheduler once. Raises RunNotFound, RegistryError."""
    return status_at(find_run(run, root), open_backend=open_backend, announcing=True)


def status_at(paths: RunPaths, *, open_backend: OpenBackend = open_backend, announcing: bool = False) -> RunStatus:
    """`status` of a run whose directory is known; `announcing` has an end told that no agent could tell."""
    (record,), asked, silent = ask_schedulers([load_record(paths)], open_backend)
    if announcing:
        announce_ends([record], asked)
    return describe(record, asked, _as_warnings(silent))


def announce_ends(records: Iterable[Record], asked: Asked) -> None:
    """Have the ends told that no agent could tell (`notify`)."""
    announce((record, stand(record, asked), _job(record, asked)) for record in records)


def _as_warnings(silent: Iterable[str]) -> list[str]:
    return [f"{words}; shown is what the run directory says" for words in silent]


def ask_schedulers(
    records: Iterable[Record], open_backend: OpenBackend = open_backend
) -> tuple[list[Record], Asked, list[str]]:
    """One poll per backend for all runs the files do not settle: records, answers, and the words of silent backends.

    A run may end, with a word, between the look at its files and the answer: its record is read again.
    """
    records = list(records)
    by_backend: dict[str, list[JobHandle]] = {}
    for record in records:
        handle = record.handle
        if handle is not None and not is_settled(record):
            by_backend.setdefault(handle.backend, []).append(handle)
    answers: Asked = {}
    silent: list[str] = []
    for name, handles in by_backend.items():
        try:
            answers.update(open_backend(name).poll(handles))
        except BackendError as error:
            silent.append(f"{name}: {error.message}")
    return [_up_to_date(record, answers) for record in records], answers, silent


def _up_to_date(record: Record, asked: Asked) -> Record:
    job = _job(record, asked)
    if job is None or not nobody_said(record, stand(record, asked)):
        return record
    if job.end is not None and time.time() - job.end > _LONG_AGO_S:  # `ps` may have hundreds of them
        return record
    try:
        again = load_record(record.paths)
    except RegistryError:  # as readable as a moment ago it is not; what was read then still stands
        return record
    return again if again.handle == record.handle else record


def stand(record: Record, asked: Asked) -> Standing:
    """State of one run after the schedulers were asked."""
    return resolve(record, _job(record, asked))


def _job(record: Record, asked: Asked) -> JobStatus | None:
    """What its scheduler said of the newest submission; None when it was not asked, or gave no answer."""
    return asked.get(record.handle) if record.handle else None


def describe(record: Record, asked: Asked, warnings: Iterable[str] = ()) -> RunStatus:
    """Everything known about one run."""
    standing = stand(record, asked)
    attempts = _attempts(record, standing)
    handle = record.handle
    job = _job(record, asked)
    return RunStatus(
        run_id=record.run_id,
        run_dir=record.paths.run_dir,
        name=str(record.sidecar.get("name") or record.run_id.rpartition("-")[0]),
        state=standing.state,
        exit_reason=standing.exit_reason,
        message=standing.message,
        attempt=record.last_attempt,
        backend=record.submission.backend if record.submission else str(record.sidecar.get("backend") or ""),
        job_id=handle.job_id if handle else record.sidecar.get("job_id"),
        nodes=(job.nodes if job and job.nodes else attempts[-1].nodes if attempts else ()),
        alive=standing.alive,
        deadline=job.end if job and standing.state is JobState.RUNNING else None,
        progress=_progress(record),
        last_checkpoint=_last_checkpoint(record),
        lost_step=record.usable.lost,
        resumed_from=_resumed_from(record),
        attempts=attempts,
        events=record.events,
        warnings=(*warnings, *record.problems),
        drill=_newest_drill(record.paths),
    )


def _progress(record: Record) -> Progress:
    """Progress of the newest attempt; an older attempt's file is ignored (PROTOCOLS 2)."""
    seen = record.progress
    attempt = _integer(seen.get("attempt"))
    if attempt is None or (record.last_attempt is not None and attempt < record.last_attempt):
        return Progress(max_steps=_integer(seen.get("max_steps")))
    return Progress(
        step=_integer(seen.get("step")),
        epoch=_integer(seen.get("epoch")),
        max_steps=_integer(seen.get("max_steps")),
        throughput=_float(seen.get("throughput")),
        rank_seconds=tuple(float(seconds) for seconds in seen.get("rank_seconds") or ()),
        attempt=attempt,
        time=_float(seen.get("time")),
    )


def _last_checkpoint(record: Record) -> CheckpointRef | None:
    event = record.last_checkpoint
    if event is None or _integer(event.get("step")) is None:
        return None
    path, size_bytes = event.get("path"), _integer(event.get("size_bytes"))
    return CheckpointRef(int(event["step"]), None if path is None else str(path), _float(event.get("time")), size_bytes)


def _resumed_from(record: Record) -> dict[str, Any] | None:
    """What the newest attempt started from, in the words of its `resumed` event."""
    event = record.newest("resumed")
    if event is None or event.get("attempt") != record.last_attempt or _integer(event.get("step")) is None:
        return None
    return {
        "step": event["step"],
        "attempt": event.get("from_attempt"),
        "path": event.get("checkpoint"),
        "skipped": list(event.get("skipped") or ()),
    }


def _newest_drill(paths: RunPaths) -> dict[str, Any] | None:
    """The newest certificate; a file that is none is not worth losing a status for."""
    certificates = (_certificate(path) for path in reversed(paths.certificates()))
    return next((certificate for certificate in certificates if certificate is not None), None)


def _certificate(path: Path) -> dict[str, Any] | None:
    try:
        value = read_json(path)
    except (OSError, RegistryError):
        return None
    return value if isinstance(value, dict) and _float(value.get("time")) is not None else None


def _attempts(record: Record, standing: Standing) -> tuple[Attempt, ...]:
    resumed = {event.get("attempt"): event for event in record.events if event.get("event") == "resumed"}
    rows = [
        _attempt(row, resumed.get(row["attempt"], {}))
        for row in record.attempts
        if _integer(row.get("attempt")) is not None
    ]
    return tuple(_with_losses(row, rows[index + 1 :], record, standing) for index, row in enumerate(rows))


def _attempt(row: Mapping[str, Any], resumed: Mapping[str, Any]) -> Attempt:
    """A row of the sidecar; it learns where the attempt began only at its end, the `resumed` event knows at once."""
    resumed_step = _integer(resumed.get("step"))
    start = _integer(row.get("step_start"))
    return Attempt(
        number=int(row["attempt"]),
        job_id=None if row.get("job_id") is None else str(row["job_id"]),
        nodes=_nodes(row.get("nodes")),
        started=_float(row.get("started")),
        ended=_float(row.get("ended")),
        outcome=row.get("outcome"),
        exit_reason=reason_of(row.get("exit_reason")),
        step_start=start if resumed_step is None else resumed_step,
        step_end=_integer(row.get("step_end")),
        saved_in_s=_float(row.get("saved_in_s")),
        resumed_step=resumed_step,
        start_from=resumed.get("start_from"),
        exit_code=_integer(row.get("exit_code")),
    )


def _nodes(value: Any) -> tuple[str, ...]:
    """A list, or Slurm's own compressed text."""
    return tuple(expand_nodes(value)) if isinstance(value, str) else tuple(value or ())


def _with_losses(attempt: Attempt, later: list[Attempt], record: Record, standing: Standing) -> Attempt:
    """Steps lost = where it ended minus where the next one started (or the newest checkpoint, if none did)."""
    from dataclasses import replace

    if attempt.step_end is None or attempt.ended is None:
        return attempt
    if attempt.exit_reason is ExitReason.COMPLETED or attempt.outcome == "completed":
        return replace(attempt, steps_lost=0)
    following = next((row.step_start for row in later if row.step_start is not None), None)
    if following is None:
        if later or standing.state is JobState.RUNNING:
            return attempt
        newest = _last_checkpoint(record)
        following = newest.step if newest else 0
    return replace(attempt, steps_lost=max(0, attempt.step_end - following))


def ps(
    *,
    root: str | Path | None = None,
    states: Iterable[JobState] = (),
    open_backend: OpenBackend = open_backend,
) -> tuple[list[RunRow], list[str]]:
    """Runs under the root (all known roots when none is given), newest first, and warnings about unreadable ones."""
    places = [Path(root).expanduser().absolute()] if root else known_roots()
    records, unreadable = records_of(places)
    records, asked, silent = ask_schedulers(records, open_backend)
    announce_ends(records, asked)
    warnings = [f"{run_id}: {error.message}" for run_id, error in unreadable.items()]
    wanted = set(states)
    rows = [_row(record, stand(record, asked)) for record in records]
    kept = [row for row in rows if not wanted or row.state in wanted]
    return sorted(kept, key=lambda row: row.submitted or 0.0, reverse=True), warnings + _as_warnings(silent)


def records_of(places: Iterable[Path]) -> tuple[list[Record], dict[str, OrchError]]:
    """All runs under these roots, and what is wrong with those that cannot be read."""
    records: list[Record] = []
    unreadable: dict[str, OrchError] = {}
    now = time.time()
    for place in places:
        for run_id in run_names(place):
            try:
                records.append(load_record(RootPaths(place).run(run_id), now=now))
            except RegistryError as error:  # one broken run must not hide the others
                unreadable[run_id] = error
    return records, unreadable


def _row(record: Record, standing: Standing) -> RunRow:
    progress = _progress(record)
    submission = record.submission
    return RunRow(
        run_id=record.run_id,
        run_dir=record.paths.run_dir,
        state=standing.state,
        attempt=record.last_attempt,
        job_id=submission.job_id if submission else None,
        backend=submission.backend if submission else str(record.sidecar.get("backend") or ""),
        step=progress.step,
        max_steps=progress.max_steps,
        submitted=submission.time if submission else None,
        message=standing.message,
    )


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

"""`cancel`, `preempt`, `resume`: what a person may do to a run that exists."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.backends import open_backend
from orchestrator.backends.base import JobHandle, SchedulerState
from orchestrator.errors import BackendError, OrchError, RefusedError, SchedulerUnavailable
from orchestrator.files import write_json
from orchestrator.operations.dependencies import upstreams_first
from orchestrator.operations.describe import OpenBackend, announce_ends, ask_schedulers, records_of, stand
from orchestrator.operations.drift import Change, changes, refuse_drift
from orchestrator.operations.record import Record, agent_plan, is_ours, load_record
from orchestrator.operations.results import Cancelled, Signalled, Submitted
from orchestrator.operations.roots import find_run, known_roots
from orchestrator.operations.state import Standing
from orchestrator.operations.submission import (
    ask_or_raise,
    check,
    nothing_to_do,
    reconcile,
    restore_secrets,
    run_lock,
    start,
    translated,
)
from orchestrator.paths import RunPaths
from orchestrator.registry import EventLog
from orchestrator.states import JobState

if TYPE_CHECKING:
    from orchestrator.operations.snapshot import Snapshot
    from orchestrator.spec import JobSpec

STOPPING_DEADLINE_S = 30.0  # how long `resume` waits for a cancelled job to leave


def cancel(run: str, *, root: str | Path | None = None, open_backend: OpenBackend = open_backend) -> Cancelled:
    """Stop a run for good: tombstone first, so that nothing requeues it, then the scheduler. Doing it twice is fine.

    Raises BackendError when the scheduler cannot be told; the tombstone stands then and the call can be repeated.
    """
    paths = find_run(run, root)
    with translated(paths.run_dir):
        record = load_record(paths)
        if record.interrupted:
            record = reconcile(record, open_backend)
        (record,), asked, _ = ask_schedulers([record], open_backend)
        before = stand(record, asked)
        if before.state is JobState.COMPLETED:
            return _cancelled(record, "already_completed")
        if not record.tombstone:
            write_json(paths.tombstone, {"time": time.time(), "user": _user()})
        if before.state is JobState.CANCELLED and not before.alive:
            paths.secrets.unlink(missing_ok=True)  # its agent was killed before it could
            return _cancelled(record, "already_cancelled")
        return _stop(record, before, open_backend)


def _stop(record: Record, before: Standing, open_backend: OpenBackend) -> Cancelled:
    handle = record.handle
    running = False
    if before.alive:
        _must_be_here(record, "cancel")
    if handle is not None and before.alive:
        backend = open_backend(handle.backend)
        try:
            backend.cancel(handle)
        except SchedulerUnavailable as error:
            raise SchedulerUnavailable(
                f"{error.message}; the job may still run, but it is marked as cancelled and will not be requeued",
                hint=f"run `orch cancel {record.run_id}` again when the scheduler answers",
            ) from error
        running = backend.poll([handle])[handle].state in (SchedulerState.RUNNING, SchedulerState.COMPLETING)
    if not running:
        # No agent is left that would remove them.
        record.paths.secrets.unlink(missing_ok=True)
    if record.newest("cancelled") is None or not record.tombstone:
        EventLog(record.paths, "login").append("cancelled", by=_user(), job_id=handle.job_id if handle else None)
    return _cancelled(record, "cancelling" if running else "cancelled")


def _must_be_here(record: Record, verb: str) -> None:
    if record.elsewhere is not None:
        raise BackendError(
            f"{record.run_id} runs on {record.elsewhere}, and a local run can only be reached from its own machine",
            hint=f"on {record.elsewhere}:  orch {verb} {record.paths.run_dir}",
        )


def _cancelled(record: Record, action: str) -> Cancelled:
    job_id = record.submission.job_id if record.submission else None
    return Cancelled(record.run_id, record.paths.run_dir, job_id, action, _safe_step(record), record.usable.lost)


def _user() -> str:
    return os.environ.get("USER") or str(os.getuid())


_NEEDS_RUNNING = {"preempt": "a drill"}


def running_here(record: Record, open_backend: OpenBackend, verb: str) -> JobHandle:
    """The job of a run that is running and can be reached from this machine, else BackendError."""
    handle = record.handle
    (record,), asked, silent = ask_schedulers([record], open_backend)
    standing = stand(record, asked)
    if handle is None or standing.state is not JobState.RUNNING:
        reason = f" ({silent[0]})" if silent else ""
        raise BackendError(
            f"{record.run_id} is {standing.state.value}, not running{reason}",
            hint=f"{_NEEDS_RUNNING.get(verb, f'`orch {verb}`')} needs a running job; `orch status` shows where it is",
        )
    _must_be_here(record, verb)
    return handle


def preempt(
    run: str,
    *,
    root: str | Path | None = None,
    open_backend: OpenBackend = open_backend,
    clock: Callable[[], float] = time.time,
) -> Signalled:
    """The drill: send the run's preemption signal to its agents. Does not wait. Raises BackendError if not running."""
    paths = find_run(run, root)
    record = load_record(paths)
    handle = running_here(record, open_backend, "preempt")
    plan = agent_plan(paths)
    name = str(plan.get("signal") or "USR1")
    now = clock()
    open_backend(handle.backend).signal(handle, name)
    EventLog(paths, "login").append("action", action="preempt", signal=name, by=_user(), job_id=handle.job_id)
    lead = plan.get("lead_time_s")
    return Signalled(
        run_id=record.run_id,
        run_dir=paths.run_dir,
        job_id=handle.job_id,
        signal=name,
        attempt=record.last_attempt,
        lead_time_s=lead if isinstance(lead, int) else 0,
        time=now,
    )


def resume(
    run: str,
    *,
    overrides: Iterable[str] = (),
    code: bool = False,
    allow_drift: Iterable[str] = (),
    root: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
    open_backend: OpenBackend = open_backend,
    sleep: Callable[[float], None] = time.sleep,
) -> Submitted:
    """Continue a stopped run with the code it began with (`code`: as it is now); lifts a cancellation.

    `overrides` may change what is not part of the run's identity (resources, slurm, checkpoint …); anything else, and
    other code, only where `allow_drift` names it. Raises RefusedError with what would change.
    """
    paths = find_run(run, root)
    allowed = tuple(allow_drift)
    with translated(paths.run_dir), run_lock(paths):
        plan = agent_plan(paths)
        place = paths.run_dir.parent.parent  # not the plan's: the root may have been moved since
        record = load_record(paths)
        spec, snapshot, drift = _changed(record, plan, place, tuple(overrides), code, environ)
        refuse_drift(record.run_id, drift, allowed, step=_safe_step(record))
        interrupted = record.interrupted
        if interrupted:
            record = reconcile(record, open_backend)
        if record.tombstone:
            record = _lift_tombstone(record, open_backend, sleep)
        record, standing = ask_or_raise(record, open_backend)
        if interrupted:
            restore_secrets(spec, record, standing, environ)
        done = nothing_to_do(record, standing)
        if done is not None:
            return done
        check(spec, environ)
        backend = open_backend(spec.backend)
        done = start(spec, record, place, snapshot, environ, backend, drift=drift, allow_drift=allowed)
        return replace(done, warnings=(*done.warnings, *(f"changed from here on: {change}" for change in drift)))


def _lift_tombstone(record: Record, open_backend: OpenBackend, sleep: Callable[[float], None]) -> Record:
    """Only once the cancelled job has left: it looks at the tombstone to know that it must not requeue."""
    end = time.monotonic() + STOPPING_DEADLINE_S
    while True:
        record, standing = ask_or_raise(record, open_backend)
        if standing is None or not standing.alive:
            break
        if time.monotonic() > end:
            raise RefusedError(
                f"{record.run_id} is still stopping after its cancellation",
                hint="wait until `orch status` says cancelled, then resume again",
            )
        sleep(0.5)
        record = load_record(record.paths)
    if standing is not None and standing.state is JobState.COMPLETED:
        return record
    record.paths.tombstone.unlink(missing_ok=True)
    EventLog(record.paths, "login").append("action", action="tombstone_lifted", by=_user())
    return load_record(record.paths)


def _changed(
    record: Record,
    plan: Mapping[str, Any],
    place: Path,
    overrides: tuple[str, ...],
    code: bool,
    environ: Mapping[str, str],
) -> tuple[JobSpec, Snapshot | str, tuple[Change, ...]]:
    """The stored spec with `--set` applied, its code, and what of it is not as it was. Raises RefusedError for what
    would make it another run altogether."""
    from orchestrator.spec import load_spec

    spec = load_spec(record.paths.spec, environ=environ)
    snapshot: Snapshot | str = str(plan["code_hash"])
    if not overrides and not code:
        return spec, snapshot, ()
    changed = load_spec(record.paths.spec, overrides=overrides, environ=environ)
    fixed = [field for field in ("name", "root", "backend") if getattr(changed, field) != getattr(spec, field)]
    if fixed:
        raise RefusedError(
            f"--set would change {', '.join(fixed)}, which makes it another run",
            hint="resume keeps a run's name and place; to have it elsewhere, submit again",
        )
    new_code = str(plan["code_hash"])
    if code:
        from orchestrator.operations.snapshot import hash_workspace

        snapshot = hash_workspace(changed, spec_path=record.spec_path, root=place)
        new_code = snapshot.code_hash
    return changed, snapshot, changes(spec, str(plan["code_hash"]), changed, new_code)


def _safe_step(record: Record) -> int | None:
    event = record.last_checkpoint
    step = event.get("step") if event else None
    return step if isinstance(step, int) else None


def _must_be_ours(paths: RunPaths) -> None:
    if not is_ours(paths):
        raise RefusedError(
            f"{paths.run_dir.name} belongs to somebody else, and would run under your name",
            hint=f"if that is meant:  orch resume {paths.run_dir}",
        )


def resume_all(
    *,
    root: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
    open_backend: OpenBackend = open_backend,
) -> tuple[list[Submitted], dict[str, OrchError]]:
    """Resume every run of this user that waits for it (`needs_resume`) under the root, or under all known roots.

    One run that cannot be resumed does not stop the others: its error is in the second result.
    """
    places = [Path(root).expanduser().absolute()] if root else known_roots()
    done: list[Submitted] = []
    problems: dict[str, OrchError] = {}
    records, unreadable = records_of(places)
    records, asked, _ = ask_schedulers(records, open_backend)
    announce_ends(records, asked)
    waiting = [record.paths for record in records if stand(record, asked).state is JobState.NEEDS_RESUME]
    for paths in upstreams_first(waiting):
        try:
            _must_be_ours(paths)
            done.append(resume(str(paths.run_dir), environ=environ, open_backend=open_backend))
        except OrchError as error:
            problems[paths.run_dir.name] = error
    return done, {**unreadable, **problems}

"""`submit`: put a run in the queue exactly once, or say why nothing needs to be done (PROTOCOLS 1)."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from orchestrator.backends import open_backend
from orchestrator.backends.base import Backend
from orchestrator.errors import (
    ContainerError,
    OrchError,
    RefusedError,
    RegistryError,
    SchedulerUnavailable,
    SpecError,
)
from orchestrator.files import read_json, write_atomic, write_json
from orchestrator.operations.dependencies import Awaited, full_ids, planned, settle
from orchestrator.operations.describe import OpenBackend, ask_schedulers, stand
from orchestrator.operations.drift import Change, changes
from orchestrator.operations.record import Record, agent_plan, load_record
from orchestrator.operations.results import Submitted
from orchestrator.operations.roots import locked, remember
from orchestrator.operations.state import Standing
from orchestrator.paths import RootPaths, RunPaths
from orchestrator.registry import EventLog
from orchestrator.states import JobState
from orchestrator.worker.upstream import note_waiting

if TYPE_CHECKING:
    from orchestrator.operations.snapshot import Snapshot
    from orchestrator.plan import Plan
    from orchestrator.spec import JobSpec

SpecLike: TypeAlias = "JobSpec | str | Path | Mapping[str, Any]"

LOCK_DEADLINE_S = 90.0  # longer than one sbatch with its time-out: the other submitter finishes or fails first
_MAX_ORDINAL = 10_000


@dataclass(frozen=True)
class Request:
    """A spec with everything that names its run: root and code."""

    spec: JobSpec
    root: Path
    snapshot: Snapshot
    spec_path: Path | None = None

    def run_id(self, ordinal: int = 1) -> str:
        from orchestrator.identity import run_id

        return run_id(self.spec, self.snapshot.code_hash, ordinal)


def submit(
    spec: SpecLike,
    *,
    overrides: Iterable[str] = (),
    root: str | Path | None = None,
    new: bool = False,
    environ: Mapping[str, str] = os.environ,
    open_backend: OpenBackend = open_backend,
) -> Submitted:
    """Queue the run this spec names, continue it if it stopped, or report that it is under way or done.

    Blocks until the scheduler has accepted the job. Raises SpecError, BackendError, ContainerError, RegistryError;
    RefusedError for a cancelled run. A failure leaves nothing behind that looks queued.
    """
    request = prepare(spec, overrides=overrides, root=root, environ=environ)
    layout = RootPaths(request.root)
    if new or not layout.run(request.run_id()).run_dir.is_dir():
        check(request.spec, environ)  # before anything is written; for a run that exists only if it has to go on
    with translated(request.root):
        paths = layout.run(_fresh_id(request) if new else request.run_id())
        with run_lock(paths):
            return _submit_locked(request, paths, environ, open_backend)


def plan_of(
    spec: SpecLike,
    *,
    overrides: Iterable[str] = (),
    root: str | Path | None = None,
    new: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> Plan:
    """What `submit` would submit now (`--dry-run`). Writes nothing; needs neither scheduler nor container engine."""
    request = prepare(spec, overrides=overrides, root=root, environ=environ)
    with translated(request.root):
        run_id = _free_id(request) if new else request.run_id()
        paths = RootPaths(request.root).run(run_id)
        record = load_record(paths) if paths.run_dir.is_dir() else None
        awaited = planned(full_ids(request.spec.after, request.root, run_id), request.root)
        return render(request.spec, paths, request.root, request.snapshot.code_hash, record, awaited)


def prepare(
    spec: SpecLike, *, overrides: Iterable[str], root: str | Path | None, environ: Mapping[str, str]
) -> Request:
    """Load the spec, settle the root, hash the code. Writes nothing."""
    from orchestrator.operations.snapshot import hash_workspace
    from orchestrator.spec import resolve_root

    loaded, spec_path = load(spec, overrides, root=root, environ=environ)
    place = resolve_root(root or loaded.root, environ)
    snapshot = hash_workspace(loaded, spec_path=spec_path, root=place)
    return Request(loaded, place, snapshot, spec_path)


def load(
    spec: SpecLike,
    overrides: Iterable[str] = (),
    *,
    root: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> tuple[JobSpec, Path | None]:
    """A spec from a file, a mapping (paths relative to the working directory) or an object, and the file's path."""
    from orchestrator.spec import JobSpec, load_site, load_spec, parse_spec

    chosen = tuple(overrides)
    place = None if root is None else str(root)
    if isinstance(spec, JobSpec):
        if chosen:
            raise SpecError("overrides need a spec file or a mapping", hint="or use spec.model_copy(update=…)")
        return spec, None
    site = load_site(environ)
    if isinstance(spec, (str, Path)):
        path = Path(spec)
        return load_spec(path, overrides=chosen, site=site, root=place, environ=environ), path.absolute()
    loaded = parse_spec(spec, base_dir=Path.cwd(), overrides=chosen, site=site, root=place, environ=environ)
    return loaded, None


def check(spec: JobSpec, environ: Mapping[str, str]) -> None:
    """What can be known to fail before anything is written. Raises SpecError or ContainerError."""
    missing = [name for name in spec.secrets if name not in environ]
    if missing:
        raise SpecError(
            f"secrets: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set in this environment",
            hint="export the value in this shell (it is handed over in a file only you can read) and run the same "
            "command again",
        )
    _check_webhook(spec, environ)
    if spec.backend == "local":
        _check_mounts(spec)
        _check_engine(spec, environ)


def _check_webhook(spec: JobSpec, environ: Mapping[str, str]) -> None:
    name = None if spec.notify is None else spec.notify.webhook_secret
    if name is not None:
        from orchestrator.spec.webaddress import is_web_address

        if not is_web_address(environ[name]):
            raise SpecError(
                f"notify.webhook: the value of ${name} is no http:// or https:// URL",
                hint="export the whole URL in this shell, without quotes or a line break in it",
            )


def _check_mounts(spec: JobSpec) -> None:
    for index, mount in enumerate(spec.container.mounts):
        if not Path(mount.source).exists():
            raise ContainerError(
                f"container.mounts[{index}].source: {mount.source} does not exist on this machine",
                hint="create it, or correct the path (it is relative to the spec file)",
            )


def _check_engine(spec: JobSpec, environ: Mapping[str, str]) -> None:
    """Here the engine that will run the job can be asked beforehand."""
    runtime, image = spec.container.runtime, spec.container.image
    if image is None:
        return
    from orchestrator.containers.image_file import file_of
    from orchestrator.containers.payload import ENGINES, open_engine
    from orchestrator.spec.images import file_pin

    if runtime in ENGINES:
        open_engine(runtime, environ).ensure_image(image)
    elif file_pin(image) is not None:
        file_of(image, node="this machine", verify=False)


def _free_id(request: Request) -> str:
    """The first run id of this spec that no directory has."""
    for ordinal in range(1, _MAX_ORDINAL):
        run_id = request.run_id(ordinal)
        if not RootPaths(request.root).run(run_id).run_dir.exists():
            return run_id
    raise RefusedError(f"{request.run_id()} has {_MAX_ORDINAL} copies", hint="change its name")


def _fresh_id(request: Request) -> str:
    """Claim a free run id by creating its directory, so that two `--new` never share one."""
    while True:
        run_id = _free_id(request)
        run_dir = RootPaths(request.root).run(run_id).run_dir
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        try:
            run_dir.mkdir()
        except FileExistsError:
            continue
        return run_id


@contextmanager
def run_lock(paths: RunPaths) -> Iterator[None]:
    """Serialise submissions of one run; the directory is created, and removed again if nothing came to lie in it."""
    try:
        with locked(paths.submit_lock, deadline_s=LOCK_DEADLINE_S):
            try:
                yield
            finally:
                _remove_if_empty(paths)
    except TimeoutError as error:
        raise RegistryError(
            f"another `orch` is submitting {paths.run_dir.name} and has not finished",
            hint="wait for it; if none is running, the machine it ran on still holds the lock file",
        ) from error


def _remove_if_empty(paths: RunPaths) -> None:
    """A refused first submission leaves no run directory: it would look like a run."""
    left = {entry.name for entry in paths.run_dir.iterdir()} if paths.run_dir.is_dir() else set()
    if left == {paths.submit_lock.name}:
        shutil.rmtree(paths.run_dir, ignore_errors=True)


@contextmanager
def translated(root: Path) -> Iterator[None]:
    """OSError while writing the root → RegistryError with the fix."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        where = error.filename or root
        raise RegistryError(
            f"cannot write {where}: {what}",
            hint=f"the root is {root}; choose a writable one with --root DIR, `root:` in the spec or $ORCH_ROOT",
        ) from error


def _submit_locked(
    request: Request, paths: RunPaths, environ: Mapping[str, str], open_backend: OpenBackend
) -> Submitted:
    record = load_record(paths)
    backend = open_backend(request.spec.backend)
    interrupted = record.interrupted
    if interrupted:
        record = reconcile(record, open_backend)
    record, standing = ask_or_raise(record, open_backend)
    if interrupted:
        restore_secrets(request.spec, record, standing, environ)
    done = nothing_to_do(record, standing)
    if done is not None:
        return replace(done, warnings=_remembered(paths, request.root, environ))
    if standing is not None and standing.state is JobState.CANCELLED:
        raise RefusedError(
            f"{record.run_id} was cancelled",
            hint=f"`orch resume {record.run_id}` lifts that and goes on; a fresh copy: orch submit --new",
        )
    if standing is not None:
        _refuse_to_undo_drift(request, record, environ)
        check(request.spec, environ)
    spec_path = request.spec_path
    return start(request.spec, record, request.root, request.snapshot, environ, backend, spec_path=spec_path)


def _refuse_to_undo_drift(request: Request, record: Record, environ: Mapping[str, str]) -> None:
    """A run keeps its id when it goes on with other arguments or code (`orch resume --allow-drift`): its first spec,
    submitted again, must not turn it back in silence."""
    from orchestrator.spec import load_spec

    paths = record.paths
    if not (paths.spec.exists() and paths.agent_plan.exists()):
        return  # its first submission did not get that far
    stored, code = load_spec(paths.spec, environ=environ), str(agent_plan(paths)["code_hash"])
    found = changes(stored, code, request.spec, request.snapshot.code_hash)
    if found:
        raise RefusedError(
            f"{record.run_id} has gone on with something else since; this spec would turn it back:\n"
            + "\n".join(f"  {change}" for change in found),
            hint=f"`orch resume {record.run_id}` goes on as it is now; a fresh copy: orch submit --new",
        )


def reconcile(record: Record, open_backend: OpenBackend) -> Record:
    """A submitter died between queueing and noting the job id: look for its token, and note the id now."""
    submission = record.submission
    assert submission is not None
    handle = open_backend(submission.backend).find(submission.token)
    if handle is None:
        return record
    _note_submitted(record.paths, handle.job_id, submission.backend, submission.token, submission.attempt_base)
    return load_record(record.paths)


def restore_secrets(spec: JobSpec, record: Record, standing: Standing | None, environ: Mapping[str, str]) -> None:
    """Hand them over again to a job found by its token: its submitter took them away when it failed."""
    if standing is not None and standing.alive:
        check(spec, environ)
        _write_secrets(spec, record.paths, environ)


def ask_or_raise(record: Record, open_backend: OpenBackend) -> tuple[Record, Standing | None]:
    """The record, up to date, and where the run stands, None if it was never submitted.

    A silent scheduler is an error, not a guess.
    """
    if record.submission is None and not record.sidecar and record.last_attempt is None:
        return record, None
    (record,), asked, silent = ask_schedulers([record], open_backend)
    if silent:
        raise SchedulerUnavailable(
            f"whether {record.run_id} is still in the queue is not known: {silent[0]}",
            hint="try again when the scheduler answers; nothing was submitted",
        )
    return record, stand(record, asked)


def nothing_to_do(record: Record, standing: Standing | None) -> Submitted | None:
    """The answer for a run that is under way or done; None when it has to be queued. RefusedError while it stops."""
    if standing is None or (record.tombstone and standing.state is not JobState.COMPLETED):
        return None if standing is None or not standing.alive else _refuse_stopping(record)
    if standing.state is JobState.COMPLETED:
        return _already(record, "already_completed")
    if not standing.alive or standing.state in (JobState.FAILED, JobState.NEEDS_RESUME, JobState.LOST):
        return None
    return _already(record, "already_running" if standing.state is JobState.RUNNING else "already_queued")


def _refuse_stopping(record: Record) -> Submitted:
    raise RefusedError(
        f"{record.run_id} is being cancelled and has not stopped yet",
        hint=f"wait for it (`orch wait {record.run_id}`), then `orch resume {record.run_id}`",
    )


def _already(record: Record, action: str) -> Submitted:
    submission = record.submission
    step = record.progress.get("step")
    return Submitted(
        run_id=record.run_id,
        run_dir=record.paths.run_dir,
        backend=submission.backend if submission else str(record.sidecar.get("backend") or ""),
        job_id=submission.job_id if submission else record.sidecar.get("job_id"),
        action=action,
        step=step if isinstance(step, int) else None,
    )


def render(
    spec: JobSpec,
    paths: RunPaths,
    root: Path,
    code_hash: str,
    record: Record | None,
    awaited: Awaited,
    allow_drift: Sequence[str] = (),
) -> Plan:
    """The plan of the next submission. The same state of the run directory gives the same bytes."""
    from orchestrator.plan import render_plan

    last = record.last_attempt if record else None
    library = library_of(paths)
    return render_plan(
        spec.model_copy(update={"after": awaited.run_ids}),
        run_id=paths.run_dir.name,
        root=root,
        code_hash=code_hash,
        library_hash=library if isinstance(library, str) else library.code_hash,
        attempt_base=0 if last is None else last + 1,
        python=sys.executable,
        nonce=str(_submissions(record) if record else 0),
        after_jobs=awaited.jobs,
        allow_drift=allow_drift,
    )


def library_of(paths: RunPaths) -> Snapshot | str:
    """Our own code for this run: the hash of what it began with, or for a new run what is installed here."""
    from orchestrator.operations.snapshot import library_snapshot

    try:
        begun: str | None = read_json(paths.agent_plan).get("library_hash")
    except FileNotFoundError:
        begun = None
    return begun or library_snapshot()


def _submissions(record: Record) -> int:
    return sum(1 for event in record.events if event.get("event") == "action" and event.get("action") == "submitting")


def start(
    spec: JobSpec,
    record: Record,
    root: Path,
    snapshot: Snapshot | str,
    environ: Mapping[str, str],
    backend: Backend,
    *,
    spec_path: Path | None = None,
    drift: Sequence[Change] = (),
    allow_drift: Sequence[str] = (),
) -> Submitted:
    """Write the run directory and queue it; the caller holds the run's lock and knows that nothing of it is alive.

    `snapshot` is a code hash when the code is already stored (resume). `drift` is what changes in a run that goes on.
    """
    paths = record.paths
    first = record.submission is None and record.last_attempt is None
    code_hash = snapshot if isinstance(snapshot, str) else snapshot.code_hash
    _refuse_to_leave_checkpoints(spec, record)
    awaited = settle(full_ids(spec.after, root, paths.run_dir.name), root, paths.run_dir.name, backend)
    spec = spec.model_copy(update={"after": awaited.run_ids})
    plan = render(spec, paths, root, code_hash, record, awaited, allow_drift)
    try:
        _store_code(snapshot, root)
        _store_code(library_of(paths), root)
        if drift:
            _note_drift(record, plan, drift)
        _write_run(spec, plan, paths, environ)
        job_id = _queue(plan, paths, environ, backend, spec_path)
        if awaited.waiting_for:
            note_waiting(EventLog(paths, "login"), awaited.waiting_for, job_id)
    except BaseException:
        # Secrets never outlive a submission that did not happen, whatever stopped it (Ctrl-C included).
        paths.secrets.unlink(missing_ok=True)
        if first and not _perhaps_queued(paths):
            shutil.rmtree(paths.run_dir, ignore_errors=True)
        raise
    return Submitted(
        run_id=plan.run_id,
        run_dir=paths.run_dir,
        backend=plan.backend,
        job_id=job_id,
        action="submitted" if record.handle is None and record.last_attempt is None else "resumed",
        summary=summarise(spec),
        warnings=_remembered(paths, root, environ),
    )


def _refuse_to_leave_checkpoints(spec: JobSpec, record: Record) -> None:
    """Where checkpoints are is no part of a run's identity, but one that looks elsewhere would begin anew."""
    from orchestrator.spec import load_spec

    if record.newest("checkpoint_committed") is None:
        return
    begun, wanted = load_spec(record.paths.spec).checkpoint, spec.checkpoint
    if begun.uri != wanted.uri:
        raise RefusedError(
            f"{record.run_id} has its checkpoints in {begun.uri or 'its run directory'}, and checkpoint.uri now says "
            f"{wanted.uri or 'the run directory'}: it would begin at the beginning",
            hint="leave checkpoint.uri as it is, or begin another run:  orch submit … --new",
        )
    now = _whereabouts(wanted.storage_options)
    for name, value in _whereabouts(begun.storage_options).items():
        if value != now[name]:
            key = f"checkpoint.storage_options.{name}"
            raise RefusedError(
                f"{record.run_id} has its checkpoints where {key} is {value or 'not set'}, and it now "
                f"{f'says {now[name]}' if now[name] else 'is not set'}: it would begin at the beginning",
                hint=f"leave {key} as it is, or begin another run:  orch submit … --new",
            )


def _whereabouts(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide which store a URI is in: the same bucket name may exist at another endpoint."""
    client = options.get("client_kwargs")
    below = client.get("endpoint_url") if isinstance(client, Mapping) else None
    decisive = {name: options.get(name) for name in ("profile", "account_name", "account_host")}
    return {"endpoint_url": options.get("endpoint_url") or below, **decisive}


def _note_drift(record: Record, plan: Plan, drift: Sequence[Change]) -> None:
    """From which attempt on it runs with what; every checkpoint names its code and image besides."""
    event = record.last_checkpoint
    EventLog(record.paths, "login").append(
        "drift",
        attempt=int(plan.agent["attempt_base"]),
        step=None if event is None else event.get("step"),
        changes=[change.as_json() for change in drift],
    )


def _perhaps_queued(paths: RunPaths) -> bool:
    """True while an intent to submit is open: no answer, or Ctrl-C while waiting for one. The job may start yet, and
    only its token in this directory keeps the next submit from queueing it a second time."""
    return load_record(paths).submission is not None


def _store_code(code: Snapshot | str, root: Path) -> None:
    """A hash names code that is stored already."""
    if isinstance(code, str):
        return
    from orchestrator.operations.snapshot import ensure_snapshot

    ensure_snapshot(code, RootPaths(root))


def _write_run(spec: JobSpec, plan: Plan, paths: RunPaths, environ: Mapping[str, str]) -> None:
    """Files of the run; the secrets last, with their mode from the first byte on."""
    from orchestrator.spec import dump_spec

    start_files(plan)
    write_atomic(paths.spec, dump_spec(spec).encode())
    if not paths.labels.exists():
        write_json(paths.labels, {"version": 1, "tags": list(spec.tags), "notes": spec.notes})
    _write_secrets(spec, paths, environ)


def _write_secrets(spec: JobSpec, paths: RunPaths, environ: Mapping[str, str]) -> None:
    if spec.secrets:
        values = {name: environ[name] for name in spec.secrets}
        write_atomic(paths.secrets, json.dumps(values).encode(), mode=0o600)


def start_files(plan: Plan) -> None:
    """What a backend needs to find in the run directory: the script and the agent's orders."""
    paths = RunPaths(plan.run_dir)
    paths.plan_dir.mkdir(parents=True, exist_ok=True)
    paths.events_dir.mkdir(exist_ok=True)
    paths.scheduler_log.parent.mkdir(exist_ok=True)  # Slurm does not create the directory of --output
    write_atomic(paths.agent_plan, plan.agent_json.encode())
    if plan.script:
        write_atomic(paths.script, plan.script.encode(), mode=0o755)


def _queue(
    plan: Plan, paths: RunPaths, environ: Mapping[str, str], backend: Backend, spec_path: Path | None = None
) -> str:
    """Intent, submission, a note of the job id, which is returned: a crash in between is resolved by the token."""
    log = EventLog(paths, "login")
    base = int(plan.agent["attempt_base"])
    source = {} if spec_path is None else {"spec_path": str(spec_path)}
    log.append("action", action="submitting", token=plan.token, backend=plan.backend, attempt_base=base, **source)
    try:
        handle = backend.submit(plan, environ=environ)
    except SchedulerUnavailable:
        raise  # whether it is queued is not known: the open intent makes the next submit look first
    except OrchError as error:
        log.append("action", action="submission_failed", token=plan.token, message=error.message)
        raise
    _note_submitted(paths, handle.job_id, plan.backend, plan.token, base)
    return handle.job_id


def _note_submitted(paths: RunPaths, job_id: str, backend: str, token: str, attempt_base: int) -> None:
    EventLog(paths, "login").append(
        "submitted", job_id=job_id, backend=backend, token=token, attempt_base=attempt_base, host=os.uname().nodename
    )


def _remembered(paths: RunPaths, root: Path, environ: Mapping[str, str]) -> tuple[str, ...]:
    warning = remember(paths.run_dir.name, root, environ)
    return () if warning is None else (warning,)


def summarise(spec: JobSpec) -> str:
    """`preempt, 2 nodes × 4 GPUs, 4 h`: what was asked for, in a few words."""
    resources = spec.resources
    each = f" × {resources.gpus_per_node} GPUs" if resources.gpus_per_node else ""
    parts = [
        spec.slurm.partition if spec.backend == "slurm" else None,
        f"{resources.nodes} node{'s' if resources.nodes > 1 else ''}{each}",
        None if resources.time is None else str(resources.time),
    ]
    return ", ".join(part for part in parts if part)

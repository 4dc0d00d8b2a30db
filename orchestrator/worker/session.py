"""What training code sees of `orch`: where it runs, whether it must stop, where checkpoints go, how it leaves.

Works the same in three settings: inside a run of `orch submit` (ORCH_RUN_ID is set: *managed*), under a bare torchrun
or Slurm, and as a plain `python`. Imports neither torch nor Lightning; `orchestrator.integrations` connects it to them.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from orchestrator.checkpoint import (
    Best,
    CheckpointName,
    CheckpointStore,
    Fence,
    FileEntry,
    Found,
    Load,
    Manifest,
    Refuge,
    Retention,
    open_store,
    take_over,
)
from orchestrator.checkpoint.lineage import parse_fence_name
from orchestrator.checkpoint.manifest import Origin, finite
from orchestrator.errors import CheckpointCorrupt, CheckpointError, Fenced, OrchError, RegistryError
from orchestrator.files import read_json, write_json
from orchestrator.paths import DEFAULT_ROOT, RunPaths, is_object_store
from orchestrator.registry import EventLog, HeartbeatThread, MetricsLog, ProgressWriter, read_events
from orchestrator.states import ExitCode, ExitReason
from orchestrator.worker.background import InFlight
from orchestrator.worker.places import Places
from orchestrator.worker.ranks import ATTACHED
from orchestrator.worker.scratch import remove_scratch, scratch_directory
from orchestrator.worker.stop import DeadlineWatchdog, StopRequest

log = logging.getLogger("orchestrator.worker")

PATIENCE_S = 60.0  # of one request to an object store, with its repetitions
PEER_WATCHDOG_GRACE_S = 0.5  # rank 0 writes the verdict, so it goes first
VERDICT_WAIT_S = 1.0
SAVE_SAFETY = 1.5  # a second save is begun before the deadline only if this many times the last one's duration is left


@dataclass(frozen=True)
class CheckpointSettings:
    """When to save (None = not by this rule), whether beside the training, and how many checkpoints to keep."""

    every_steps: int | None = None
    every_minutes: float | None = None
    every_epochs: int | None = 1
    keep_last: int = 3
    asynchronous: bool = False  # `checkpoint.async`: Python keeps that word for itself
    keep_every: int | None = None
    keep_best: Best | None = None

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any]) -> CheckpointSettings:
        """The `checkpoint` part of plan/agent.json; keys of later versions are ignored."""
        known = {key: plan[key] for key in cls.__dataclass_fields__ if key in plan}
        settings = cls(**known, asynchronous=bool(plan.get("async", cls.asynchronous)))
        return replace(settings, keep_best=Retention.from_plan(plan).keep_best)


@dataclass(frozen=True)
class Identity:
    """Which run and attempt this process belongs to, and which of its ranks it is."""

    run_id: str
    run_dir: Path
    attempt: int
    rank: int
    world_size: int
    managed: bool


def identify(environ: Mapping[str, str], *, default_dir: Path | None, agree: Callable[[str], str] | None) -> Identity:
    """PROTOCOLS 1: who am I? `agree` (rank 0's text on every rank) is asked only where the environment does not say."""
    rank, world_size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    managed = "ORCH_RUN_ID" in environ
    if managed:
        if "ORCH_RUN_DIR" not in environ:
            raise CheckpointError(
                "ORCH_RUN_ID is set but ORCH_RUN_DIR is not",
                hint="both come from `orch submit`; unset ORCH_RUN_ID to run on your own",
            )
        return Identity(
            run_id=environ["ORCH_RUN_ID"],
            run_dir=Path(environ["ORCH_RUN_DIR"]),
            attempt=int(environ.get("ORCH_ATTEMPT", "0")),
            rank=rank,
            world_size=world_size,
            managed=True,
        )
    run_id = _standalone_run_id(environ)
    run_dir = _standalone_dir(environ, run_id, default_dir)
    mine = json.dumps({"run_id": run_id, "run_dir": str(run_dir), "attempt": _next_attempt(RunPaths(run_dir))})
    if world_size > 1:
        if agree is None:
            raise CheckpointError(
                "several ranks were started without `orch submit`, and nothing lets them agree on one run",
                hint="pass agree=orchestrator.integrations.torch.agree to Session.start",
            )
        mine = agree(mine)
    agreed = json.loads(mine)
    return Identity(agreed["run_id"], Path(agreed["run_dir"]), agreed["attempt"], rank, world_size, managed=False)


def _standalone_run_id(environ: Mapping[str, str]) -> str:
    if "SLURM_ARRAY_JOB_ID" in environ and "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    if "SLURM_JOB_ID" in environ:
        return environ["SLURM_JOB_ID"]
    elastic = environ.get("TORCHELASTIC_RUN_ID", "none")
    return elastic if elastic != "none" else uuid.uuid4().hex[:12]


def _standalone_dir(environ: Mapping[str, str], run_id: str, default_dir: Path | None) -> Path:
    if default_dir is not None:
        return default_dir.absolute()
    return (Path(environ.get("ORCH_ROOT", DEFAULT_ROOT)) / "runs" / run_id).absolute()


def _next_attempt(paths: RunPaths) -> int:
    """Attempts are numbered by the verdicts and event files they left; nobody else counts them here."""
    attempt = 0
    while paths.verdict(attempt).exists() or paths.events(_writer(attempt)).exists():
        attempt += 1
    return attempt


def _writer(attempt: int) -> str:
    return f"rank0-{attempt:03d}"


@dataclass(frozen=True)
class Saving:
    """A save in parts. Rank 0 decides where it goes, because the others may not have been told to stop yet."""

    name: CheckpointName
    emergency: bool  # into the run directory: the object store would take too long


class Session:
    """One training process of one attempt. `start` builds it; `guard` wraps the training; `commit` saves."""

    def __init__(
        self,
        identity: Identity,
        *,
        settings: CheckpointSettings,
        store: CheckpointStore,
        stop: StopRequest,
        refuge: Refuge | None = None,
        scratch: Path | None = None,
        signals: tuple[signal.Signals, ...] = (signal.SIGUSR1, signal.SIGTERM),
        code_hash: str | None = None,
        image: str | None = None,
        allowed_drift: Sequence[str] = (),
        exit_process: Callable[[int], NoReturn] = os._exit,
    ) -> None:
        self.run_id, self.run_dir, self.attempt = identity.run_id, identity.run_dir, identity.attempt
        self.rank, self.world_size, self.managed = identity.rank, identity.world_size, identity.managed
        self.settings = settings
        self.store = store
        self._places = Places(store, refuge, stop)
        self._scratch = scratch
        self.paths = RunPaths(self.run_dir)
        self.signals = signals
        self.resumed_step: int | None = None
        self.last_manifest: Manifest | None = None
        self._stop = stop
        self._origin = Origin(world_size=identity.world_size, code_hash=code_hash, image=image, data=None)
        self.allowed_drift = frozenset(allowed_drift)
        self._exit_process = exit_process
        self._fence: Fence | None = None
        self._verdict_lock = threading.RLock()
        self._verdict_written: str | None = None
        self._position = (0, 0)
        self._committed_at: float | None = None
        self._commit_s: float | None = None  # how long the last commit took
        self._in_flight = InFlight()
        self._watchdog: DeadlineWatchdog | None = None
        self._heartbeat: HeartbeatThread | None = None
        self._events: EventLog | None = None
        self._progress: ProgressWriter | None = None
        if self.is_chief:
            self._events = EventLog(self.paths, _writer(self.attempt), attempt=self.attempt)
            self._progress = ProgressWriter(self.paths, self.attempt)

    @classmethod
    def start(
        cls,
        *,
        environ: Mapping[str, str] = os.environ,
        default_dir: Path | None = None,
        agree: Callable[[str], str] | None = None,
        settings: CheckpointSettings | None = None,
        exit_process: Callable[[int], NoReturn] = os._exit,
    ) -> Session:
        """The session of this process. Collective (through `agree`) only where `orch` did not start it.

        Args:
            default_dir: run directory where none is given by the environment; else `$ORCH_ROOT/runs/<run_id>`.
            settings: when to save, where the plan of `orch submit` does not say.
        """
        if ATTACHED in environ:  # it would take the run over from the ranks beside it, which then end for good
            raise CheckpointError(
                f"this shell stands beside a running rank of {environ.get('ORCH_RUN_ID', 'a run')}, which alone may "
                "write its checkpoints",
                hint='give the program a clean environment: env -i HOME="$HOME" PATH="$PATH" python …',
            )
        identity = identify(environ, default_dir=default_dir, agree=agree)
        paths = RunPaths(identity.run_dir)
        identity.run_dir.mkdir(parents=True, exist_ok=True)
        plan = _load_plan(paths) if identity.managed else {}
        deadline_file = environ.get("ORCH_DEADLINE_FILE")
        stop = StopRequest(Path(deadline_file) if deadline_file else None)
        uri = environ.get("ORCH_CHECKPOINT_URI") or str(paths.checkpoints)
        scratch = _make_scratch(identity, plan.get("checkpoint", {})) if is_object_store(uri) else None
        wanted = signal.Signals[f"SIG{plan.get('signal', 'USR1')}"]
        return cls(
            identity,
            settings=CheckpointSettings.from_plan(plan["checkpoint"])
            if "checkpoint" in plan
            else settings or CheckpointSettings(),
            store=_open_store(uri, paths, plan.get("checkpoint", {}), stop, scratch),
            stop=stop,
            refuge=None if scratch is None else Refuge(paths.checkpoints),
            scratch=scratch,
            signals=tuple(dict.fromkeys((wanted, signal.SIGTERM))),
            code_hash=plan.get("code_hash"),
            image=(plan.get("container") or {}).get("image"),
            allowed_drift=plan.get("allow_drift", ()),
            exit_process=exit_process,
        )

    # --- being stopped

    @property
    def is_chief(self) -> bool:
        """Rank 0: the only one that writes into the run directory, except for a failing rank's own verdict."""
        return self.rank == 0

    @property
    def stop_requested(self) -> bool:
        """True once this process got a signal. Other ranks may not have: agree before acting on it."""
        return self._stop.requested

    @property
    def signalled_at(self) -> float | None:
        """Unix time of the first signal."""
        return self._stop.signalled_at

    def install_signal_handlers(self) -> None:
        """Catch the stop signals (flag only), start the watchdog and, on rank 0, the heartbeat. Idempotent."""
        self._stop.install(self.signals)
        if self._watchdog is None:
            grace_s = 0.0 if self.is_chief else PEER_WATCHDOG_GRACE_S
            self._watchdog = DeadlineWatchdog(self._stop, self._deadline_missed, grace_s=grace_s)
            self._watchdog.start()
        if self.is_chief and self._heartbeat is None:
            self._heartbeat = HeartbeatThread(self.paths, self.attempt)
            self._heartbeat.start()

    def deadline(self) -> float | None:
        """Unix time by which this process must be gone; None without one."""
        return self._stop.deadline()

    def seconds_left(self) -> float | None:
        """Seconds until the deadline; None without one."""
        return self._stop.seconds_left()

    def _deadline_missed(self) -> None:
        """In the watchdog's thread. Whatever goes wrong here, and whatever the main thread holds, the process ends.

        Rank 0 leaves with 0 only behind a verdict: alone, a 0 would say that the run has completed.
        """
        said = not self.is_chief
        try:
            if self.is_chief and self._verdict_lock.acquire(timeout=VERDICT_WAIT_S):
                step, epoch = self._position
                self.verdict(
                    "unsaved",
                    step=step,
                    epoch=epoch,
                    reason=ExitReason.DEADLINE_MISSED,
                    message="no step boundary with a finished save was reached before the deadline; "
                    + self._standing_checkpoint(),
                )
                said = True
        finally:
            if said:
                self.leave_stopped()
            self.leave(ExitCode.SAVED)

    def _standing_checkpoint(self) -> str:
        manifest = self.last_manifest
        return "there is no checkpoint yet" if manifest is None else f"the checkpoint of step {manifest.step} stands"

    # --- checkpoints

    def declare_data(self, fingerprint: str) -> None:
        """Say which data this program trains on, before `resume`: checkpoints carry it, and to go on from one that was
        made with other data is refused (`orch resume --allow-drift data`). Compared as text."""
        self._origin["data"] = fingerprint

    def _refuse_other_data(self, manifest: Manifest) -> None:
        data = self._origin["data"]
        if data is None or manifest.data in (None, data):
            return
        if "data" in self.allowed_drift:
            self.event("drift", step=manifest.step, changes=[{"key": "data", "old": manifest.data, "new": data}])
            return
        insist = f"orch resume {self.run_id} --allow-drift data" if self.managed else "start in another run directory"
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} was made with other data: {manifest.data} then, {data} now",
            hint=f"restore the data, or if other data is meant:  {insist}",
        )

    def resume(self, load: Load | None = None) -> Found | None:
        """Rank 0: the newest good checkpoint (None: start from the beginning), and this attempt's fence epoch.

        `load` makes a state of its file while its bytes are still being compared (`CheckpointStore.find`).
        Other ranks get None at once; what was found is told to them by `orchestrator.integrations.torch.resume_path`.
        """
        if not self.is_chief:
            return None
        for weakness in self.store.weaknesses():
            log.warning("%s: %s", self.store.uri, weakness)
            self.event("action", action="weak_store", message=weakness)
        self._bring_in_emergency_saves()
        try:
            found, self._fence = take_over(self.store, attempt=self.attempt, accept=self._accept, load=load)
        except CheckpointCorrupt as error:  # all that there is in the store
            self.event("checkpoint_rejected", path=self.store.uri, reason=error.message)
            raise
        skipped = [{"path": skip.location, "reason": skip.reason} for skip in found.skipped] if found else []
        for skip in skipped:
            log.warning("passed over %s: %s", skip["path"], skip["reason"])
            self.event("checkpoint_rejected", **skip)
        if found is not None:
            self._refuse_other_data(found.manifest)
            self.resumed_step = found.manifest.step
            self.last_manifest = found.manifest
            self._position = (found.manifest.step, found.manifest.epoch)
            if self._places.refuge is not None:
                try:
                    self._places.refuge.clear(self._fence)
                except CheckpointError as error:  # what stays there takes room, no more
                    log.warning("emergency saves that are in the store were not removed: %s", error)
            log.info(
                "resumed from step %d of attempt %d: %s",
                found.manifest.step,
                found.manifest.attempt,
                found.manifest.location,
            )
            self.event(
                "resumed",
                step=found.manifest.step,
                epoch=found.manifest.epoch,
                from_attempt=found.manifest.attempt,
                checkpoint=found.manifest.location,
                skipped=skipped,
            )
        return found

    def _accept(self, found: Found | None) -> None:
        """Before the claim, which makes everything beyond `found` dead. Raises CheckpointError."""
        if self._places.refuge is not None:
            self._places.refuge.require_base(self.store, found)
        if found is None and not any(n.startswith("step-") or parse_fence_name(n) for n in self.store.sizes()):
            self._refuse_to_forget()

    def _refuse_to_forget(self) -> None:
        """A place that was emptied, another one or a disk that is not mounted looks like a run that never saved."""
        if not (steps := [event["step"] for event in read_events(self.paths) if _tells_of_a_checkpoint(event)]):
            return
        another = "orch submit --new SPEC" if self.managed else "start in another run directory"
        self.event("checkpoint_rejected", path=self.store.uri, reason="there is nothing at all")
        raise CheckpointError(
            f"this run has saved step {steps[-1]}, but there is nothing at all in {self.store.uri}",
            hint="nothing was changed; mount or restore what was there, or set checkpoint.uri back; to start from the "
            f"beginning, make another run:  {another}",
        )

    @property
    def shares_files(self) -> bool:
        """Whether the file that rank 0 found is there for all ranks; else every node must `fetch` its own."""
        return self._places.refuge is None

    def fetch(self, manifest_name: str) -> Path:
        """A verified local copy of the checkpoint that rank 0 chose. Raises CheckpointError."""
        return self.store.fetch(manifest_name).path

    def _bring_in_emergency_saves(self) -> None:
        """The store gets what an attempt before us had to leave in the run directory."""
        if self._places.refuge is None:
            return
        for brought in self._places.refuge.bring_to(self.store):
            path = self.checkpoint_path(brought.manifest)
            if brought.problem is not None:
                log.warning("passed over %s: %s", path, brought.problem)
                self.event("checkpoint_rejected", path=path, reason=brought.problem)
            elif brought.published:
                self.event(
                    "action",
                    action="pushed",
                    step=brought.manifest.step,
                    path=f"{self.store.uri}/{brought.manifest.name.data}",
                    size_bytes=brought.manifest.size_bytes,
                )

    def started_from(self, path: str, *, step: int, epoch: int) -> None:
        """This run has no checkpoint of its own and begins with one that was written elsewhere."""
        self._position = (step, epoch)
        self.event("resumed", step=step, epoch=epoch, from_attempt=None, checkpoint=path, start_from=path, skipped=[])

    def commit(
        self,
        write: Callable[[BinaryIO], object],
        *,
        step: int,
        epoch: int,
        metrics: Mapping[str, float] | None = None,
    ) -> Manifest:
        """Rank 0: make what `write` streams a checkpoint. On Fenced and CheckpointError the previous one stands.

        `metrics`: the numbers known by now; `checkpoint.keep_best` chooses by one of them.
        """
        fence = self._require_fence()
        self.finish_save()
        manifest = self._commit(fence, write, step, epoch, metrics, emergency=self.stop_requested)
        self._position = (step, epoch)
        self._tidy_up(fence)
        return manifest

    def commit_async(
        self,
        freeze: Callable[[], Callable[[BinaryIO], object]],
        *,
        step: int,
        epoch: int,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Rank 0: make a checkpoint beside the training; returns once `freeze` has, whose result writes the state.

        One save at a time: waits for the one in flight before `freeze` is called, so that it can use the same memory
        again. Raises what went wrong with that one; what goes wrong with this one is raised by the next `report`.
        """
        fence = self._require_fence()
        self.finish_save()
        write = freeze()
        known = finite(metrics or {})  # now: the loop goes on to change them
        self._in_flight.begin(
            lambda: self._commit(fence, write, step, epoch, known, emergency=False), lambda: self._tidy_up(fence)
        )

    def commit_before_leaving(
        self,
        write: Callable[[BinaryIO], object],
        *,
        step: int,
        epoch: int,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Rank 0: the save that a stop asks for. One in flight comes first, and may leave too little time for this one:
        then its checkpoint is the last. An upload is not waited for: this save goes to the run directory at once."""
        self._places.leaving = True
        flying = self._in_flight.flying
        if self._places.refuge is not None:
            self._in_flight.drop()
            flying = False
        self.finish_commit()
        left = self.seconds_left()
        if flying and left is not None and self._commit_s is not None and left < SAVE_SAFETY * self._commit_s:
            log.warning("%.0f s are left, too few to save step %d: %s", left, step, self._standing_checkpoint())
            return
        self._commit(self._require_fence(), write, step, epoch, metrics, emergency=True)
        self._position = (step, epoch)

    def finish_save(self) -> None:
        """Wait for the save in flight, if there is one, and raise what went wrong with it."""
        self._in_flight.finish()

    def finish_commit(self) -> None:
        """As `finish_save`, but does not wait for old checkpoints to be removed."""
        self._in_flight.finish_commit()

    def _commit(
        self,
        fence: Fence,
        write: Callable[[BinaryIO], object],
        step: int,
        epoch: int,
        metrics: Mapping[str, float] | None,
        *,
        emergency: bool,
    ) -> Manifest:
        """In the thread of the save, where there is one."""
        started = time.monotonic()
        manifest, in_refuge = self._places.in_either(
            lambda place: place.commit(fence, write, step=step, epoch=epoch, metrics=metrics, **self._origin), emergency
        )
        if in_refuge and emergency:
            self._places.require_newest(fence)
        self._tell(manifest, time.monotonic() - started)
        return manifest

    def begin(self, step: int, *, leaving: bool = False) -> Saving:
        """Rank 0: open a save in parts; every rank may now `write_part`. Raises as `commit`.

        `leaving`: the save that a stop asks for, whichever rank has heard of it.
        """
        self._places.leaving = self._places.leaving or leaving
        fence = self._require_fence()
        return Saving(*self._places.in_either(lambda place: place.begin(fence, step=step), self._places.hurried))

    def write_part(self, saving: Saving, write: Callable[[BinaryIO], object], *, part: str | None = None) -> FileEntry:
        """Any rank: one file of the checkpoint that rank 0 has begun. Raises CheckpointError."""
        return self._places.choose(saving.emergency).write_part(saving.name, write, part=part)

    def publish(
        self, saving: Saving, files: Sequence[FileEntry], *, epoch: int, metrics: Mapping[str, float] | None = None
    ) -> Manifest:
        """Rank 0: make the parts a checkpoint; then call `committed`. Raises as `commit`."""
        fence = self._require_fence()
        store = self._places.choose(saving.emergency)
        manifest = store.publish(fence, saving.name, files, epoch=epoch, metrics=metrics, **self._origin)
        if saving.emergency and self._places.hurried:
            self._places.require_newest(fence)
        return manifest

    def abandon(self, saving: Saving) -> None:
        """Rank 0: remove the parts of a checkpoint that `publish` was not called for. Raises Fenced, if that is why."""
        self._places.choose(saving.emergency).abandon(self._require_fence(), saving.name)

    def committed(self, manifest: Manifest, *, seconds: float) -> None:
        """Rank 0: tell everybody about a checkpoint, and remove old ones."""
        self._tell(manifest, seconds)
        self._position = (manifest.step, manifest.epoch)
        self._tidy_up(self._require_fence())

    def _tell(self, manifest: Manifest, seconds: float) -> None:
        if (
            self.last_manifest is None or manifest.rank > self.last_manifest.rank
        ):  # an upload may end after a later save
            self.last_manifest = manifest
        self._committed_at = time.time()
        self._commit_s = seconds
        self.event(
            "checkpoint_committed",
            step=manifest.step,
            epoch=manifest.epoch,
            path=self.checkpoint_path(manifest),
            size_bytes=manifest.size_bytes,
            seconds=round(seconds, 3),
        )
        if self._progress is not None:
            self._progress.flush()

    def _require_fence(self) -> Fence:
        if self._fence is None:
            raise CheckpointError(
                "commit before resume", hint="call Session.resume() on rank 0 first: it opens the fence"
            )
        return self._fence

    def wrote(self, path: str) -> bool:
        """Whether the file at `path` is a checkpoint of this run: in its store, or a verified copy on this node."""
        places = [self.store.uri] if self._scratch is None else [str(self._scratch.parent)]
        return any(path.startswith(f"{place}/") for place in places)

    def _tidy_up(self, fence: Fence) -> None:
        keep = self.settings
        retention = Retention(keep.keep_last, keep.keep_every, keep.keep_best)
        self._places.tidy_up(fence, retention, newest=self.last_manifest)

    def checkpoint_path(self, manifest: Manifest) -> str:
        """Where the (first) data file of a manifest lies."""
        return manifest.location

    # --- telling others

    def event(self, event: str, **fields: object) -> None:
        """Append to this rank's event file (rank 0 only; a no-op elsewhere). Events are for people: one that cannot
        be written must not turn a finished save into a failure."""
        if self._events is not None:
            try:
                self._events.append(event, **fields)
            except RegistryError as error:
                log.warning("%s", error)

    def report(
        self,
        step: int,
        epoch: int,
        max_steps: int | None,
        throughput: float | None = None,
        *,
        rank_seconds: Sequence[float] | None = None,
        stopping: bool = False,
    ) -> None:
        """Note the progress; written at most every second, by rank 0. `rank_seconds`: own step time of each rank.

        Raises what went wrong with a save beside the training: the run must not go on for hours without one. Not when
        it is `stopping` and the last save goes elsewhere, to the run directory: that save is what matters now.
        """
        self._position = (step, epoch)
        elsewhere = self._places.refuge is not None and (stopping or self.stop_requested)
        self._in_flight.raise_failure(Fenced if elsewhere else BaseException)
        if self._progress is not None:
            self._progress.update(step, epoch, max_steps, throughput, rank_seconds)

    def open_metrics(self, *, keep_rows: int | None = None) -> MetricsLog:
        """metrics.csv (rank 0), cut back to the resumed step and to the `keep_rows` its checkpoint knew of."""
        return MetricsLog(self.paths.metrics, resumed_step=self.resumed_step, keep_rows=keep_rows)

    def verdict(
        self,
        outcome: str,
        *,
        step: int,
        epoch: int,
        reason: ExitReason | None = None,
        message: str = "",
        checkpoint: str | None = None,
    ) -> None:
        """Say how this attempt ended. Rank 0 speaks for the run; another rank only when it fails. The first verdict
        stands, unless a failure comes after it. Nothing has completed whose last save has not: that is waited for."""
        if outcome == "completed":
            self.finish_save()
        if checkpoint is None and outcome != "failed" and self.last_manifest is not None:
            checkpoint = self.checkpoint_path(self.last_manifest)
        if outcome == "completed" and self._progress is not None:
            self._progress.flush()  # the last step, though the second between two writes has not passed
        committed = self._committed_at if outcome == "saved" else None
        signalled = self.signalled_at
        with self._verdict_lock:
            if self._verdict_written is not None and outcome not in ("failed", "fenced"):
                return
            write_json(
                self.paths.verdict(self.attempt, None if self.is_chief else self.rank),
                {
                    "run_id": self.run_id,
                    "attempt": self.attempt,
                    "rank": self.rank,
                    "outcome": outcome,
                    "reason": None if reason is None else str(reason),
                    "step": step,
                    "epoch": epoch,
                    "checkpoint": checkpoint,
                    "message": message,
                    "signalled_at": signalled,
                    "saved_in_s": None if committed is None or signalled is None else round(committed - signalled, 3),
                    "time": time.time(),
                },
            )
            self._verdict_written = outcome
        self.event("verdict", outcome=outcome, reason=None if reason is None else str(reason), step=step)

    # --- leaving

    def leave(self, code: int) -> NoReturn:
        """End the process now: interpreter teardown of torch costs seconds of the grace period (FACTS 4)."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a closed pipe must not keep the process
                stream.flush()
        if self._scratch is not None:
            remove_scratch(self._scratch)
        self._exit_process(code)

    def leave_stopped(self) -> NoReturn:
        """Leave after a stop: 0 under `orch` (torchrun kills the peers of the first non-zero exit, in the middle of a
        save; PID 1 reads the verdict), else 75."""
        self.leave(0 if self.managed else ExitCode.SAVED)

    def stopped(self, *, step: int, epoch: int, barrier: Callable[[], object] | None = None) -> NoReturn:
        """After the save that a stop asked for, on every rank: verdict (rank 0), then leave.

        Nobody leaves before all have come here (`barrier`): a rank that is still inside the collectives of the save
        would see its peers' connections break and call that a failure.
        """
        if self.is_chief:
            self.finish_commit()
            saved = self.last_manifest
            if saved is not None and saved.step != step:  # a save in flight left no time for another
                message = f"stopped at step {step} and saved at step {saved.step}"
                step, epoch = saved.step, saved.epoch
            else:
                message = f"stopped and saved at step {step}"
            self.verdict("saved", step=step, epoch=epoch, reason=ExitReason.PREEMPTED, message=message)
        if barrier is not None:
            with suppress(RuntimeError):  # a peer that is through has left; so rank 0 has been here, with its verdict
                barrier()
        self.leave_stopped()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Training goes inside: what it raises becomes a verdict first. Fenced leaves with 93 at once."""
        try:
            try:
                yield
            except SystemExit as error:
                if error.code in (None, 0):
                    self.finish_save()
                raise
            self.finish_save()
        except SystemExit as error:
            if error.code not in (None, 0):
                self.record_failure(error)
                self._let_save_end()
            raise
        except BaseException as error:
            self.record_failure(error)
            self._let_save_end()
            raise

    def _let_save_end(self) -> None:
        """After a failure: a save in flight may be good, and an interpreter that is ending lets it start no thread."""
        left = self.seconds_left()
        error = self._in_flight.wait(PATIENCE_S if left is None else min(PATIENCE_S, max(0.0, left)))
        if error is not None:
            log.warning("the save beside the training failed, too: %s", error)

    def record_failure(self, error: BaseException) -> None:
        """Write this rank's verdict for `error`; returns so that the caller can raise on. Does not return when the
        error only echoes that rank 0 has left on purpose, or that this attempt was fenced."""
        step, epoch = self._position
        if isinstance(error, Fenced):
            log.error("%s", error)
            with self._unheard():
                self.verdict("fenced", step=step, epoch=epoch, reason=ExitReason.FENCED, message=str(error))
            self.leave(ExitCode.NEVER_RESTART)
        said = None if self.is_chief else self._what_the_chief_said()
        if said in ("saved", "unsaved", "fenced"):
            self.leave_stopped()
        if said == "failed":
            return  # rank 0 failed first and has said why; what broke here is the connection to it
        if isinstance(error, OrchError):  # words for people: its class says nothing to them
            summary = error.message if error.hint is None else f"{error.message}; hint: {error.hint}"
        else:
            summary = "".join(traceback.format_exception_only(error)).strip()
        with self._unheard():
            self.verdict("failed", step=step, epoch=epoch, reason=_failure_reason(error), message=summary)

    @contextmanager
    def _unheard(self) -> Iterator[None]:
        """A failure whose verdict cannot be written (a full disk caused both): the failure itself is what to raise."""
        try:
            yield
        except OSError as error:
            log.error("the verdict of rank %d could not be written: %s", self.rank, error)

    def _what_the_chief_said(self) -> str | None:
        """Rank 0's verdict: a connection that breaks right after it is how rank 0's leaving looks from here."""
        limit = time.monotonic() + (VERDICT_WAIT_S if self.stop_requested else 0.0)
        while True:
            try:
                return str(read_json(self.paths.verdict(self.attempt))["outcome"])
            except FileNotFoundError:
                if time.monotonic() >= limit:
                    return None
            time.sleep(0.05)

    def close(self) -> None:
        """Stop the threads of this session; for processes that go on afterwards."""
        self._in_flight.wait()
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._progress is not None:
            self._progress.close()
        if self._scratch is not None:
            remove_scratch(self._scratch)


def _tells_of_a_checkpoint(event: Mapping[str, Any]) -> bool:
    return event["event"] == "checkpoint_committed" or event.get("action") == "pushed"


def _make_scratch(identity: Identity, plan: Mapping[str, Any]) -> Path:
    return scratch_directory(
        plan.get("scratch"),
        run_id=identity.run_id,
        run_dir=identity.run_dir,
        attempt=identity.attempt,
        rank=identity.rank,
    )


def _open_store(
    uri: str, paths: RunPaths, plan: Mapping[str, Any], stop: StopRequest, scratch: Path | None
) -> CheckpointStore:
    """The store of this run as its plan describes it."""
    return open_store(
        uri,
        storage_options=plan.get("storage_options"),
        scratch=scratch,
        shared_disk=paths.checkpoints,
        claim_on_disk=plan.get("fence") == "disk",
        patience_s=lambda: PATIENCE_S if (left := stop.seconds_left()) is None else min(PATIENCE_S, max(0.0, left)),
    )


def _failure_reason(error: BaseException) -> ExitReason:
    if isinstance(error, CheckpointError):
        return ExitReason.CHECKPOINT_FAILURE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ExitReason.OUT_OF_MEMORY
    return ExitReason.FAILURE


def _load_plan(paths: RunPaths) -> dict[str, Any]:
    """plan/agent.json of a managed run; {} where the run directory has none (a test, an older layout)."""
    try:
        plan = read_json(paths.agent_plan)
    except FileNotFoundError:
        return {}
    return dict(plan)

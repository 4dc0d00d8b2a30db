"""What a run directory says about its run, read once: submission, sidecar, events, progress, heartbeat."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.backends.base import JobHandle
from orchestrator.errors import RegistryError
from orchestrator.files import read_json
from orchestrator.paths import RunPaths
from orchestrator.registry import load_run, read_events
from orchestrator.registry.submissions import Submission, is_current, newest_submission, stated
from orchestrator.registry.usable import Usable, usable_checkpoint
from orchestrator.states import JobState

HEARTBEAT_FRESH_S = 60.0  # four beats of 15 s: one lost write does not declare a run dead

_ENDED = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.NEEDS_RESUME)


@dataclass(frozen=True)
class Record:
    """A snapshot of the files of one run; plain data, nothing is asked of a scheduler here."""

    paths: RunPaths
    sidecar: Mapping[str, Any]
    events: tuple[dict[str, Any], ...]
    progress: Mapping[str, Any]
    verdict: Mapping[str, Any]
    submission: Submission | None
    tombstone: bool
    heartbeat_age_s: float | None
    logged_attempts: tuple[int, ...] = ()  # from the log directories: an attempt's earliest trace
    waiting_for: tuple[str, ...] = ()  # runs that are not completed, before the first attempt of this submission
    problems: tuple[str, ...] = ()  # files that could not be read, in words

    @property
    def run_id(self) -> str:
        return self.paths.run_dir.name

    @property
    def handle(self) -> JobHandle | None:
        """The job of the newest submission; None while there is none, or its id is not known."""
        submission = self.submission
        if submission is None or submission.job_id is None:
            return None
        return JobHandle(submission.backend, submission.job_id)

    @property
    def interrupted(self) -> bool:
        """True when a submitter died (or still waits) between its intent and the job id: the token may be queued."""
        return self.submission is not None and self.submission.job_id is None

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """Attempts as the agent of node 0 wrote them, oldest first."""
        return list(self.sidecar.get("attempts") or ())

    @property
    def last_attempt(self) -> int | None:
        """Number of the newest attempt that left any trace; None before the first one."""
        numbers = [int(row["attempt"]) for row in self.attempts if row.get("attempt") is not None]
        numbers += [int(event["attempt"]) for event in self._traces()]
        numbers += self.logged_attempts
        return max(numbers, default=None)

    def _traces(self) -> Iterable[dict[str, Any]]:
        kinds = ("attempt_started", "resumed", "verdict")
        return (event for event in self.events if event.get("event") in kinds and event.get("attempt") is not None)

    @property
    def sidecar_is_current(self) -> bool:
        """True when the sidecar speaks about the newest submission, not about one before it."""
        return is_current(self.sidecar, self.submission)

    @property
    def stated(self) -> JobState | None:
        """The state the agent of node 0 wrote about the newest submission."""
        return stated(self.sidecar, self.submission)

    @property
    def elsewhere(self) -> str | None:
        """The machine a local run was started on, when it is not this one: its processes cannot be seen from here."""
        if self.submission is None or self.submission.backend != "local":
            return None
        nodes = (self.attempts[-1].get("nodes") if self.sidecar_is_current and self.attempts else None) or ()
        nodes = nodes or self.submission.host or ()
        names = [nodes] if isinstance(nodes, str) else list(nodes)
        return str(names[0]) if names and os.uname().nodename not in names else None

    @property
    def heartbeat_fresh(self) -> bool:
        """True while rank 0 has given a sign of life lately."""
        return self.heartbeat_age_s is not None and self.heartbeat_age_s < HEARTBEAT_FRESH_S

    def newest(self, *kinds: str) -> dict[str, Any] | None:
        """The newest event of one of these kinds."""
        return next((event for event in reversed(self.events) if event.get("event") in kinds), None)

    @property
    def spec_path(self) -> Path | None:
        """The file this run was last submitted from, which is no part of its code; None where it was none."""
        given = (event["spec_path"] for event in reversed(self.events) if event.get("spec_path"))
        path = next(given, None)
        return None if path is None else Path(path)

    @cached_property
    def usable(self) -> Usable:
        """The checkpoint to go on from, as far as files tell."""
        saving = self.heartbeat_fresh and self.stated not in _ENDED
        return usable_checkpoint(self.events, self.paths.run_dir, look=not saving)

    @property
    def last_checkpoint(self) -> Mapping[str, Any] | None:
        """The event that names the checkpoint to go on from."""
        return self.usable.newest


def is_ours(paths: RunPaths) -> bool:
    """Whether nobody else wrote what a run starts: root, or a colleague who may write here, must not run it unasked.

    Both are looked at, since in a directory that others may write to, the plan can be theirs.
    """
    try:
        return {paths.run_dir.stat().st_uid, paths.agent_plan.stat().st_uid} == {os.geteuid()}
    except OSError:  # removed since, or not for us to see
        return False


def load_record(paths: RunPaths, *, now: float | None = None) -> Record:
    """Read one run directory. Raises RegistryError when a file is there and cannot be read."""
    now = time.time() if now is None else now
    try:
        view = load_run(paths)
        events = tuple(read_events(paths))
        submission = newest_submission(events)
        return Record(
            paths=paths,
            sidecar=view.sidecar or {},
            events=events,
            progress=view.progress or {},
            verdict=_newest_verdict(paths),
            submission=submission,
            tombstone=view.cancelled,
            heartbeat_age_s=None if view.heartbeat is None else max(0.0, now - view.heartbeat),
            logged_attempts=_logged_attempts(paths),
            waiting_for=_waiting_for(paths, events, submission),
            problems=view.problems,
        )
    except OSError as error:
        raise RegistryError(f"cannot read {paths.run_dir}: {error}", hint="is the shared disk mounted here?") from error


def agent_plan(paths: RunPaths) -> Mapping[str, Any]:
    """What the agents of a run were told. Raises RegistryError where there is no plan, or none that can be read."""
    try:
        plan = read_json(paths.agent_plan)
    except FileNotFoundError:
        raise RegistryError(
            f"{paths.run_dir.name} has no plan: it was not started by `orch submit`",
            hint="such a run can be looked at, not controlled",
        ) from None
    except OSError as error:
        raise RegistryError(f"cannot read {paths.agent_plan}: {error}") from error
    if not isinstance(plan, dict):
        raise RegistryError(f"{paths.agent_plan} is damaged", hint="submit the spec again with --new")
    return plan


def _waiting_for(
    paths: RunPaths, events: Iterable[Mapping[str, Any]], submission: Submission | None
) -> tuple[str, ...]:
    """Whom the newest submission waits for, as its submitter and its agent noted it; nobody once it has started."""
    runs: list[str] = []
    for event in events if submission is not None and submission.job_id is not None else ():
        if event.get("action") == "waiting_for" and submission and event.get("job_id") == submission.job_id:
            runs = list(event.get("runs") or ())
        elif (
            event.get("event") == "attempt_started"
            and submission
            and (event.get("attempt") or 0) >= submission.attempt_base
        ):
            return ()
    sidecars = {run: load_run(RunPaths(paths.run_dir.parent / run)).sidecar for run in runs if _there(paths, run)}
    return tuple(run for run in runs if (sidecars.get(run) or {}).get("status") != JobState.COMPLETED)


def _there(paths: RunPaths, run: str) -> bool:
    return (paths.run_dir.parent / run).is_dir()


def _newest_verdict(paths: RunPaths) -> Mapping[str, Any]:
    found = sorted(paths.run_dir.glob("verdict-[0-9]*[0-9].json"))
    if not found:
        return {}
    try:
        value = read_json(found[-1])
    except FileNotFoundError:
        return {}
    return value if isinstance(value, dict) else {}


def _logged_attempts(paths: RunPaths) -> tuple[int, ...]:
    names = (entry.name for entry in (paths.run_dir / "logs").glob("attempt-*"))
    return tuple(int(match[1]) for name in names if (match := re.fullmatch(r"attempt-(\d+)", name)))

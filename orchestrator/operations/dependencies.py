"""`after` at submission: which runs are meant, and whether waiting for them makes sense (their own states decide)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.backends.base import Backend
from orchestrator.errors import RefusedError, RegistryError, RunNotFound, SchedulerUnavailable, SpecError
from orchestrator.operations.describe import ask_schedulers, stand
from orchestrator.operations.record import Record, agent_plan, load_record
from orchestrator.operations.roots import find_run
from orchestrator.operations.state import Standing
from orchestrator.paths import RootPaths, RunPaths
from orchestrator.states import JobState
from orchestrator.worker.upstream import ENDED


@dataclass(frozen=True)
class Awaited:
    """The runs of `after` by their full ids, and the jobs of those that go on."""

    run_ids: tuple[str, ...] = ()
    going_on: Mapping[str, str] = field(default_factory=dict)  # run id → job id

    @property
    def waiting_for(self) -> list[str]:
        """Ids of the runs that are not completed yet."""
        return list(self.going_on)

    @property
    def jobs(self) -> list[str]:
        """Their jobs."""
        return list(self.going_on.values())


def full_ids(entries: Iterable[str], root: Path, own: str) -> tuple[str, ...]:
    """Run ids for what `after` says: ids, beginnings, directories. Raises SpecError for one that is not there."""
    found = []
    for index, entry in enumerate(entries):
        try:
            paths = find_run(entry, root)
        except RunNotFound as error:
            raise SpecError(f"after[{index}]: {error.message}", hint=error.hint) from None
        if paths.run_dir.resolve().parent != RootPaths(root).runs.resolve():
            raise SpecError(f"after[{index}]: {entry} is not a run under the root {root}", hint="use one root for both")
        if paths.run_dir.name == own:
            raise SpecError(f"after[{index}]: {own} cannot wait for itself", hint="take it out of `after`")
        found.append(paths.run_dir.name)
    return tuple(dict.fromkeys(found))


def planned(run_ids: Sequence[str], root: Path) -> Awaited:
    """What the files say, without a question to the scheduler (`--dry-run`)."""
    records = [load_record(RootPaths(root).run(run_id)) for run_id in run_ids]
    open_ones = {
        record.run_id: record.handle.job_id
        for record in records
        if record.handle is not None and (record.stated is None or not record.stated.terminal)
    }
    return Awaited(tuple(run_ids), open_ones)


def settle(run_ids: Sequence[str], root: Path, own: str, backend: Backend) -> Awaited:
    """Ask where they stand. Raises RefusedError for one that will not complete by itself, SchedulerUnavailable."""
    records = [load_record(RootPaths(root).run(run_id)) for run_id in run_ids]
    for record in records:
        _must_fit(record, root, own, backend.name)
    records, asked, silent = ask_schedulers(records, lambda _: backend)
    if silent:
        raise SchedulerUnavailable(
            f"whether the runs in `after` go on is not known: {silent[0]}",
            hint="try again when the scheduler answers; nothing was submitted",
        )
    standings = [(record, stand(record, asked)) for record in records]
    return Awaited(tuple(run_ids), dict(_job_of(*pair) for pair in standings if not _completed(pair[1])))


def _completed(standing: Standing) -> bool:
    return standing.state is JobState.COMPLETED


def _job_of(record: Record, standing: Standing) -> tuple[str, str]:
    """The job to wait for. Raises RefusedError when the run needs a person first."""
    goes_on = standing.alive and not standing.state.terminal and not record.tombstone
    if not goes_on or record.handle is None:
        stopping = standing.alive and record.tombstone
        words = "is being cancelled" if stopping else ENDED.get(standing.state, "was not started by `orch submit`")
        raise RefusedError(
            f"after: {record.run_id} {words}, so this run would wait for ever",
            hint=f"orch resume {record.run_id}, then submit or resume this one; or take it out of `after`",
        )
    return record.run_id, record.handle.job_id


def _must_fit(record: Record, root: Path, own: str, backend: str) -> None:
    """Both on one scheduler, and no circle. Raises SpecError or RefusedError."""
    theirs = record.submission.backend if record.submission else backend
    if theirs != backend:
        raise SpecError(
            f"after: {record.run_id} runs with backend {theirs}, this one with {backend}",
            hint="a run can wait only for runs of its own backend",
        )
    if record.elsewhere is not None and record.stated is not JobState.COMPLETED:
        raise RefusedError(
            f"after: {record.run_id} runs on {record.elsewhere}, and a local run can be watched there only",
            hint=f"submit this one on {record.elsewhere}, or wait until the other is completed",
        )
    circle = _way_to(own, record.run_id, root, seen=())
    if circle:
        raise RefusedError(
            f"after: {' waits for '.join([own, *circle])}: none of them would ever start",
            hint="take one of them out of `after`",
        )


def _way_to(own: str, run_id: str, root: Path, seen: tuple[str, ...]) -> tuple[str, ...]:
    """The runs from `run_id` to `own` along what each waits for; empty when none leads there."""
    if run_id == own:
        return (*seen, own)
    if run_id in seen:
        return ()
    ways = (_way_to(own, up, root, (*seen, run_id)) for up in awaited_by(RootPaths(root).run(run_id)))
    return next((way for way in ways if way), ())


def awaited_by(paths: RunPaths) -> tuple[str, ...]:
    """The ids of the runs that a submitted run waits for; none where its plan cannot be read."""
    try:
        return tuple(agent_plan(paths).get("after") or ())
    except RegistryError:  # started by hand, or removed: whoever needs the plan says so
        return ()


def upstreams_first(runs: Sequence[RunPaths]) -> list[RunPaths]:
    """The same runs, each after those it waits for; otherwise in the given order."""
    known = {paths.run_dir: paths for paths in runs}
    ordered: dict[Path, RunPaths] = {}

    def place(run_dir: Path, above: tuple[Path, ...]) -> None:
        if run_dir not in known or run_dir in ordered or run_dir in above:
            return
        for upstream in awaited_by(known[run_dir]):
            place(run_dir.parent / upstream, (*above, run_dir))
        ordered[run_dir] = known[run_dir]

    for run_dir in known:
        place(run_dir, ())
    return list(ordered.values())

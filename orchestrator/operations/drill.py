"""A drill: from the signal to the first step of the next attempt, told from the run's own events, and certified."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.backends import open_backend
from orchestrator.errors import CheckpointError, RegistryError
from orchestrator.files import read_json, write_json
from orchestrator.operations.describe import OpenBackend, status_at
from orchestrator.operations.record import Record, load_record
from orchestrator.operations.results import Certificate, RunStatus, Signalled, Told
from orchestrator.paths import RunPaths
from orchestrator.states import ExitCode, JobState
from orchestrator.words import spoken

_LOOK_S = 0.2
_ASK_S = 5.0
_CLOCKS_S = 1.0
_SILENT_S = 30.0  # a program that does not use our library never says that it resumed

Reading = Callable[[int, int], None]
"""Called while a checkpoint is read again: bytes just read, bytes in all."""


@dataclass(frozen=True)
class DrillNews:
    """One thing that happened: saved | requeued | started | resumed | stepped | ended | time_up."""

    kind: str
    step: int | None = None
    seconds: float | None = None
    status: RunStatus | None = None


def watch_drill(
    drill: Signalled,
    *,
    timeout_s: float,
    until: Callable[[Record, Signalled], bool] | None = None,
    open_backend: OpenBackend = open_backend,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[DrillNews]:
    """Yield news until the run goes on in a new attempt (or `until` says so), ends, or the time is up. Blocks."""
    paths = RunPaths(Path(drill.run_dir))
    end, asked_at, told, started_at = clock() + timeout_s, clock(), set[str](), float("inf")
    while clock() < end:
        record = load_record(paths)
        for news in _news(record, drill):
            if news.kind not in told:
                told.add(news.kind)
                started_at = clock() if news.kind == "started" else started_at
                if news.kind != "stepped" or until is not None:
                    yield news
        goes_on = "resumed" in told or "stepped" in told or clock() - started_at > _SILENT_S
        if until(record, drill) if until is not None else goes_on:
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


_KINDS = {
    "verdict": "saved",  # not the commits: a periodic one may fall between the signal and the stop
    "requeued": "requeued",
    "attempt_started": "started",
    "resumed": "resumed",
    "finished": "finished",
    "cancelled": "finished",
}


def _news(record: Record, drill: Signalled) -> Iterator[DrillNews]:
    attempt = -1 if drill.attempt is None else drill.attempt
    for event in record.events:
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
    if (made := _first_step(record, drill)) is not None:
        # Without `resumed` before it, the next attempt has begun at the beginning: nothing was saved.
        yield DrillNews("stepped", int(made["step"]), float(made.get("time") or 0.0) - drill.time)


def _first_step(record: Record, drill: Signalled) -> Mapping[str, Any] | None:
    """The progress of a later attempt, once it has made a step."""
    attempt, step = record.progress.get("attempt"), record.progress.get("step")
    later = isinstance(attempt, int) and drill.attempt is not None and attempt > drill.attempt
    return record.progress if later and isinstance(step, int) else None


# --- the certificate --------------------------------------------------------------------------------------------------
def verify_drill(
    drill: Signalled,
    *,
    timeout_s: float,
    tell: Callable[[DrillNews], object] = lambda news: None,
    reading: Reading = lambda count, total: None,
    open_backend: OpenBackend = open_backend,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Certificate:
    """Watch until the next attempt makes a step, read its checkpoint again, and write what was shown. Blocks.

    Raises RegistryError when the certificate cannot be written.
    """
    paths = RunPaths(Path(drill.run_dir))
    if drill.attempt is None:  # signalled before its first agent was up: that attempt is the one that stops
        submission = load_record(paths).submission
        drill = replace(drill, attempt=0 if submission is None else submission.attempt_base)
    made: DrillNews | None = None
    last = DrillNews("time_up")
    for last in watch_drill(
        drill, timeout_s=timeout_s, until=_decided, open_backend=open_backend, clock=clock, sleep=sleep
    ):
        made = last if last.kind == "stepped" else made
        tell(last)
    evidence = gather(load_record(paths), drill)
    if made is not None:  # the file goes on with the run; what counts is when its first step was seen
        evidence = replace(evidence, made_step=made.step, made_at=drill.time + (made.seconds or 0.0))
    checked = _read_again(paths, evidence, reading, clock) if evidence.resumed is not None else Checked()
    certificate = certify(drill, evidence, checked, last)
    _write(paths, certificate)
    return certificate


def _decided(record: Record, drill: Signalled) -> bool:
    """The next attempt has made a step, or this one has ended and saved nothing: there is nothing more to wait for."""
    if _first_step(record, drill) is not None:
        return True
    evidence = gather(record, drill)
    return evidence.over and not evidence.saved


@dataclass(frozen=True)
class Evidence:
    """What the run directory knows about one drill. Events and files as they were written."""

    told: tuple[Told, ...]
    nodes: tuple[str, ...]
    verdict: Mapping[str, Any]
    commit: Mapping[str, Any]
    over: bool  # the attempt's end was written down
    exit_codes: tuple[int, ...]
    started: Mapping[str, Any] | None
    resumed: Mapping[str, Any] | None
    unused: bool = False  # an agent was told before it had started the program
    made_step: int | None = None
    made_at: float | None = None

    @property
    def saved(self) -> bool:
        return self.verdict.get("outcome") == "saved"


def gather(record: Record, drill: Signalled) -> Evidence:
    """The evidence there is by now; by attempt numbers, because no two clocks of a cluster agree."""
    attempt = -1 if drill.attempt is None else drill.attempt
    mine = [event for event in record.events if event.get("attempt") == attempt]
    later = [event for event in record.events if isinstance(event.get("attempt"), int) and event["attempt"] > attempt]
    row: Mapping[str, Any] = next((row for row in record.attempts if row.get("attempt") == attempt), {})
    verdict = _verdict(record.paths, attempt)
    made = _first_step(record, drill)
    return Evidence(
        told=_told(event for event in mine if event["event"] == "signalled"),
        nodes=tuple(row.get("nodes") or ()),
        verdict=verdict,
        commit=_newest(mine, "checkpoint_committed", step=verdict.get("step")) or {},
        over=row.get("ended") is not None,
        exit_codes=tuple(int(e["exit_code"]) for e in mine if e["event"] == "verdict" and "exit_code" in e),
        started=next((event for event in later if event["event"] == "attempt_started"), None),
        resumed=_newest(later, "resumed"),
        unused=any(event["event"] == "verdict" and event.get("unused") for event in mine),
        made_step=None if made is None else int(made["step"]),
        made_at=None if made is None else float(made.get("time") or 0.0),
    )


def _newest(events: Iterable[Mapping[str, Any]], kind: str, **fields: object) -> Mapping[str, Any] | None:
    found = [e for e in events if e["event"] == kind and all(e.get(key) == value for key, value in fields.items())]
    return found[-1] if found else None


def _told(events: Iterable[Mapping[str, Any]]) -> tuple[Told, ...]:
    """One per node: what it was told last, and since when it knew."""
    by_node: dict[str, Told] = {}
    for event in events:
        node, signals, cause = str(event.get("node")), tuple(event.get("signals") or ()), event.get("cause")
        at = float(event.get("at") or event["time"])
        first = by_node[node].at if node in by_node else at
        by_node[node] = Told(node, signals, cause, first, float(event.get("deadline") or at))
    return tuple(by_node[node] for node in sorted(by_node))


def _verdict(paths: RunPaths, attempt: int) -> Mapping[str, Any]:
    """Rank 0's own words; empty while (or because) it has said nothing."""
    try:
        value = read_json(paths.verdict(attempt))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RegistryError(f"cannot read {paths.verdict(attempt)}: {error.strerror}") from error
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Checked:
    """The checkpoint as it was read again: what is wrong with it, and how long reading took."""

    problem: str | None = "no checkpoint was read again"
    seconds: float | None = None
    size_bytes: int | None = None


def _read_again(paths: RunPaths, evidence: Evidence, reading: Reading, clock: Callable[[], float]) -> Checked:
    """Size and SHA-256 of the checkpoint the next attempt went on from, read here, through the store's own check."""
    from orchestrator.operations.checkpoints import open_run_store

    assert evidence.resumed is not None
    name = Path(str(evidence.resumed.get("checkpoint"))).name
    begun = clock()
    try:
        store = open_run_store(paths)
        manifest = next((known for known in store.manifests() if known.path.name == name), None)
        if manifest is None:
            return Checked(f"the checkpoint {name} cannot be found from here: is its directory on a shared disk?")
        problem = store.verify(manifest, reading=lambda count: reading(count, manifest.size_bytes))
    except CheckpointError as error:
        return Checked(f"the checkpoint {name} could not be read again: {error.message}")
    wrong = None if problem is None else f"the checkpoint is damaged: {problem}"
    return Checked(wrong, round(clock() - begun, 3), manifest.size_bytes)


def certify(drill: Signalled, evidence: Evidence, checked: Checked, last: DrillNews) -> Certificate:
    """The certificate (pure). `last`: the news that ended the watch."""
    begun = min((told.at for told in evidence.told), default=None)
    deadline = min((told.deadline for told in evidence.told), default=None)
    stopped, started = evidence.verdict.get("time"), _time(evidence.started)
    saved = evidence.verdict.get("step") if evidence.saved else None
    resumed = evidence.resumed.get("step") if evidence.resumed else None
    certificate = Certificate(
        run_id=drill.run_id,
        run_dir=Path(drill.run_dir),
        job_id=drill.job_id,
        signal=drill.signal,
        time=drill.time,
        attempt=-1 if drill.attempt is None else drill.attempt,
        reasons=(),
        told=evidence.told,
        grace_used_s=_between(begun, stopped),
        grace_s=_between(begun, deadline),
        save_s=evidence.commit.get("seconds"),
        size_bytes=evidence.commit.get("size_bytes", checked.size_bytes),
        step_saved=saved,
        next_attempt=None if evidence.started is None else int(evidence.started["attempt"]),
        requeue_wait_s=_between(stopped, started),
        startup_s=_between(started, evidence.made_at),
        step_resumed=resumed,
        step_made=evidence.made_step,
        steps_lost=None if saved is None or resumed is None else max(0, saved - resumed),
        checkpoint=None if evidence.resumed is None else evidence.resumed.get("checkpoint"),
        verified=evidence.resumed is not None and checked.problem is None,
        verify_s=checked.seconds,
    )
    return replace(certificate, reasons=tuple(_reasons(certificate, evidence, checked, last)))


def _time(event: Mapping[str, Any] | None) -> float | None:
    return None if event is None else float(event["time"])


def _between(begin: float | None, end: float | None) -> float | None:
    """Seconds; 0 where a signal reached the program just before the agent, None where two nodes' clocks disagree."""
    if begin is None or end is None or end - begin < -_CLOCKS_S:
        return None
    return max(0.0, round(end - begin, 3))


def _reasons(shown: Certificate, evidence: Evidence, checked: Checked, last: DrillNews) -> Iterator[str]:
    """Why the job is not safe, the first cause first; later links of the chain are not asked once one is broken."""
    unheard = sorted(set(evidence.nodes) - {told.node for told in shown.told})
    if last.status is not None and last.status.succeeded and not evidence.saved:
        yield (
            "the run completed instead: drill it with more steps ahead of it; a program that only stopped must leave "
            "with exit code 75, because 0 says that it is done"
        )
        return
    if not evidence.saved:
        yield _why_unsaved(shown, evidence)
    if unheard and evidence.over:
        yield f"no agent on {', '.join(unheard)} has noted the signal"
    if not evidence.saved:
        return
    if shown.grace_used_s is not None and shown.grace_s is not None and shown.grace_used_s > shown.grace_s:
        yield f"saving took {shown.grace_used_s:.1f} s, and there were only {shown.grace_s:.1f} s"
    if evidence.resumed is None or shown.step_made is None:
        yield _why_not_on(shown, evidence, last)
    if evidence.resumed is None:
        return
    if shown.steps_lost:
        yield f"{shown.steps_lost} steps were lost: saved at step {shown.step_saved}, resumed at {shown.step_resumed}"
    elif not shown.exact:
        yield f"it stopped at step {shown.step_saved} and went on at step {shown.step_resumed}"
    if checked.problem is not None:
        yield checked.problem


def _why_unsaved(shown: Certificate, evidence: Evidence) -> str:
    outcome, words = evidence.verdict.get("outcome"), str(evidence.verdict.get("message") or "")
    session = "orchestrator's Session does all of it (docs/training.md)"
    if outcome == "unsaved":
        return f"nothing was saved in the {shown.grace_s or 0.0:.0f} s there were: {words}"
    if outcome is not None:
        return f"it did not stop, it ended ({outcome}): {words or 'see `orch logs`'}"
    if not evidence.over:
        heard = "the program has neither stopped nor saved" if shown.told else "no agent has noted the signal"
        return f"the time was up: {heard}"
    if evidence.unused:
        return "the program had not been started: its image was still on the way. Try again once it makes steps"
    if evidence.exit_codes and set(evidence.exit_codes) <= {ExitCode.DONE, ExitCode.SAVED}:
        return f"the program left when it was told to, but orch cannot see whether it saved anything; {session}"
    return (
        f"the program did not react to SIG{shown.signal} and was ended with nothing saved, so the next attempt begins "
        f"at the beginning: handle the signal, save, and go on from what was saved; {session}"
    )


def _why_not_on(shown: Certificate, evidence: Evidence, last: DrillNews) -> str:
    """It has saved, and has not made a step since."""
    status = last.status
    where = "" if status is None else spoken(status.state.value)
    words = f" ({status.message})" if status is not None and status.message else ""
    if last.kind == "time_up":
        return f"the time was up before the next attempt made a step; the run is {where}{words}"
    if shown.step_made is not None:
        return "the next attempt began at the beginning, although a checkpoint had been saved"
    if status is not None and status.state is JobState.NEEDS_RESUME:
        return f"it saved, but nothing restarts it by itself{words}"
    began = "before it made a step" if evidence.started is not None else "before a next attempt began"
    return f"the run is {where}{words} {began}"


def _write(paths: RunPaths, certificate: Certificate) -> None:
    path = paths.drill(certificate.attempt)
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, certificate.as_json())
    except OSError as error:
        raise RegistryError(
            f"the drill {'passed' if certificate.passed else 'failed'}, but {path} cannot be written: {error.strerror}",
            hint="check free space, quota and permissions of the run directory",
        ) from error

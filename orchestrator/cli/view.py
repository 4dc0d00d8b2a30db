"""What `orch status` says to people: what happened, what it means for the work, what to do next."""

from __future__ import annotations

import time
from collections.abc import Iterable

from orchestrator.cli.out import STATE_STYLES, Line, Segment, count, duration, size
from orchestrator.operations.results import Attempt, RunRow, RunStatus
from orchestrator.operations.sparklines import Trend
from orchestrator.states import ExitReason, JobState


def status_lines(status: RunStatus, trends: Iterable[Trend], now: float | None = None) -> list[Line]:
    """The whole answer of `orch status`."""
    now = time.time() if now is None else now
    content: list[Line] = [_headline(status, now)]
    if status.message and status.state is not JobState.COMPLETED and status.message != status.state.value:
        content.append([(f"  {_sentence(status.message)}", "")])
    content += [_attempt(attempt, status, now) for attempt in status.attempts]
    if status.last_checkpoint is not None:
        content.append(_checkpoint(status, now))
    shown = list(trends)
    widest = max((len(trend.name) for trend in shown), default=0)
    content += [_trend(trend, widest) for trend in shown]
    content += [[("  ", ""), (text, "")] for text in _next_steps(status)]
    return content


def _headline(status: RunStatus, now: float) -> Line:
    parts: list[Segment] = [(status.state.value.replace("_", " "), STATE_STYLES.get(status.state, ""))]
    if status.attempt is not None:
        parts.append((f"attempt {status.attempt}", ""))
    ended = status.exit_reason
    if ended is not None and ended not in (ExitReason.COMPLETED, ExitReason.CANCELLED):
        parts.append((ended.value.replace("_", " "), ""))
    if status.job_id and status.alive:
        nodes = f" on {','.join(status.nodes)}" if status.nodes else ""
        parts.append((f"job {status.job_id}{nodes}", ""))
    if (step := _step(status)) is not None:
        parts.append((step, ""))
    if status.deadline is not None and 0 < status.deadline - now < 366 * 86400:
        parts.append((f"{duration(status.deadline - now)} left", ""))
    line: list[Segment] = [(status.run_id, "bold"), ("   ", "")]
    for index, part in enumerate(parts):
        line += [part] if index == 0 else [(" · ", "dim"), part]
    return line


def _step(status: RunStatus) -> str | None:
    progress = status.progress
    if progress.step is None:
        return None
    if not progress.max_steps:
        return f"step {count(progress.step)}"
    share = 100 * progress.step / progress.max_steps
    return f"step {count(progress.step)} / {count(progress.max_steps)} ({share:.0f} %)"


def _sentence(text: str) -> str:
    """`the node died` → `The node died`; what begins with a name (`module.Error: …`, `data: …`) stays as it is."""
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    return text[:1].upper() + text[1:] if first.isalpha() else text


def _attempt(attempt: Attempt, status: RunStatus, now: float) -> Line:
    spent = duration((attempt.ended or now) - attempt.started) if attempt.started is not None else ""
    over = attempt.ended is not None or not status.alive
    why = attempt.exit_reason.value.replace("_", " ") if attempt.exit_reason else ("no word" if over else "running")
    return [(f"  attempt {attempt.number}  {spent:<9}  {why:<13} {_work(attempt)}".rstrip(), "")]


def _work(attempt: Attempt) -> str:
    parts: list[str] = []
    if attempt.resumed_step:
        parts.append(f"resumed from step {count(attempt.resumed_step)} (verified)")
    if attempt.ended is not None and attempt.step_end is not None:
        if attempt.saved_in_s is not None:
            parts.append(f"saved step {count(attempt.step_end)} in {attempt.saved_in_s:.1f} s")
        else:
            parts.append(f"ended at step {count(attempt.step_end)}")
    if attempt.steps_lost is not None and attempt.exit_reason is not ExitReason.COMPLETED:
        lost = f"{count(attempt.steps_lost)} step{'' if attempt.steps_lost == 1 else 's'} lost"
        parts.append(lost)
    return ", ".join(parts)


def _checkpoint(status: RunStatus, now: float) -> Line:
    checkpoint = status.last_checkpoint
    assert checkpoint is not None
    parts = [f"step {count(checkpoint.step)}"]
    if checkpoint.time is not None:
        parts.append(f"{duration(now - checkpoint.time)} ago")
    if checkpoint.size_bytes is not None:
        parts.append(size(checkpoint.size_bytes))
    if checkpoint.path:
        parts.append(checkpoint.path)
    return [(f"  checkpoint  {', '.join(parts)}", "")]


def _trend(trend: Trend, width: int) -> Line:
    return [(f"  {trend.name:<{width}}  ", ""), (trend.bars, "cyan"), (f"  {trend.last:.4g}", "")]


def _next_steps(status: RunStatus) -> Iterable[str]:
    run = status.run_id
    if status.state in (JobState.FAILED, JobState.LOST, JobState.NEEDS_RESUME):
        yield _safety(status)
        more = " --set resources.mem=…" if status.exit_reason is ExitReason.OUT_OF_MEMORY else ""
        yield f"What it printed:  orch logs {run}        Go on:  orch resume {run}{more}"
    elif status.state is JobState.CANCELLED:
        yield f"{_safety(status)} Go on:  orch resume {run}"
    elif status.state is JobState.RUNNING:
        yield f"follow:  orch logs -f {run}        stop:  orch cancel {run}"


def _safety(status: RunStatus) -> str:
    checkpoint = status.last_checkpoint
    if checkpoint is None:
        return "No checkpoint was committed; a resume starts at the beginning."
    return f"Your work is safe up to step {count(checkpoint.step)}."


def row_of(row: RunRow, now: float) -> list[Segment]:
    """One line of `orch ps`."""
    step = "" if row.step is None else count(row.step)
    if row.step is not None and row.max_steps:
        step += f" / {count(row.max_steps)}"
    return [
        (row.run_id, "bold"),
        (row.state.value.replace("_", " "), STATE_STYLES.get(row.state, "")),
        ("" if row.attempt is None else str(row.attempt), ""),
        (row.job_id or "", ""),
        (step, ""),
        ("" if row.submitted is None else f"{duration(now - row.submitted)} ago", ""),
        ("" if row.state in (JobState.COMPLETED, JobState.CANCELLED) else row.message, "dim"),
    ]


PS_HEADING = ("RUN", "STATE", "ATTEMPT", "JOB", "STEP", "SUBMITTED", "")

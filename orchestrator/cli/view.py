"""What `orch status` says to people: what happened, what it means for the work, what to do next."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.cli.out import STATE_STYLES, Line, Segment, table
from orchestrator.operations.results import Attempt, GpuUse, RankUse, RunRow, RunStatus, Usage
from orchestrator.operations.sparklines import Trend
from orchestrator.states import ExitReason, JobState
from orchestrator.words import count, duration, next_steps, sentence, size, spoken, steps_lost


def status_lines(status: RunStatus, trends: Iterable[Trend], now: float | None = None) -> list[Line]:
    """The whole answer of `orch status`."""
    now = time.time() if now is None else now
    content: list[Line] = [_headline(status, now)]
    if status.message and status.state is not JobState.COMPLETED and status.message != status.state.value:
        content.append([(f"  {sentence(status.message)}", "")])
    content += [_attempt(attempt, status, now) for attempt in status.attempts]
    if status.last_checkpoint is not None:
        content.append(_checkpoint(status, now))
    if status.drill is not None:
        content.append(_drill(status.drill, now))
    if status.state is JobState.RUNNING and status.progress.straggler is not None:
        content.append(_straggler(*status.progress.straggler))
    shown = list(trends)
    widest = max((len(trend.name) for trend in shown), default=0)
    content += [_trend(trend, widest) for trend in shown]
    content += [[("  ", ""), (text, "")] for text in _next_steps(status)]
    return content


def _headline(status: RunStatus, now: float) -> Line:
    parts: list[Segment] = [(spoken(status.state.value), STATE_STYLES.get(status.state, ""))]
    if status.attempt is not None:
        parts.append((f"attempt {status.attempt}", ""))
    ended = status.exit_reason
    if ended is not None and ended not in (ExitReason.COMPLETED, ExitReason.CANCELLED):
        parts.append((spoken(ended.value), ""))
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


def _attempt(attempt: Attempt, status: RunStatus, now: float) -> Line:
    spent = duration((attempt.ended or now) - attempt.started) if attempt.started is not None else ""
    over = attempt.ended is not None or not status.alive
    why = spoken(attempt.exit_reason.value) if attempt.exit_reason else ("no word" if over else "running")
    return [(f"  attempt {attempt.number}  {spent:<9}  {why:<13} {_work(attempt)}".rstrip(), "")]


def _work(attempt: Attempt) -> str:
    parts: list[str] = []
    if attempt.start_from is not None:
        parts.append(f"started at step {count(attempt.resumed_step or 0)} from {attempt.start_from}")
    elif attempt.resumed_step:
        parts.append(f"resumed from step {count(attempt.resumed_step)} (verified)")
    if attempt.ended is not None and attempt.step_end is not None:
        if attempt.saved_in_s is not None:
            parts.append(f"saved step {count(attempt.step_end)} in {attempt.saved_in_s:.1f} s")
        else:
            parts.append(f"ended at step {count(attempt.step_end)}")
    if attempt.steps_lost is not None and attempt.exit_reason is not ExitReason.COMPLETED:
        parts.append(steps_lost(attempt.steps_lost))
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


def _drill(certificate: Mapping[str, Any], now: float) -> Line:
    """One line about the newest certificate, whatever version wrote it."""
    ago = f"{duration(now - float(certificate['time']))} ago"
    if certificate.get("verdict") == "PASS":
        used, given = certificate.get("grace_used_s") or 0.0, certificate.get("grace_s") or 0.0
        lost = steps_lost(certificate.get("steps_lost") or 0)
        return [
            ("  drill       ", ""),
            ("passed", "green"),
            (f" {ago}: {used:.1f} s of {given:.0f} s used, {lost}", ""),
        ]
    why = next(iter(certificate.get("reasons") or ()), "")
    return [("  drill       ", ""), ("failed", "bold red"), (f" {ago}: {why}", "")]


def _straggler(rank: int, seconds: float, others: float) -> Line:
    text = f"  slow        rank {rank} takes {seconds:.3f} s for its data and forward pass, the others {others:.3f} s"
    return [(text, "yellow")]


def _trend(trend: Trend, width: int) -> Line:
    return [(f"  {trend.name:<{width}}  ", ""), (trend.bars, "cyan"), (f"  {trend.last:.4g}", "")]


def _next_steps(status: RunStatus) -> Iterable[str]:
    run = status.run_id
    step = None if status.last_checkpoint is None else status.last_checkpoint.step
    yield from next_steps(run, status.state, status.exit_reason, step, status.lost_step)
    if status.state is JobState.RUNNING:
        yield f"follow:  orch logs -f {run}        stop:  orch cancel {run}"


def row_of(row: RunRow, now: float) -> list[Segment]:
    """One line of `orch ps`."""
    step = "" if row.step is None else count(row.step)
    if row.step is not None and row.max_steps:
        step += f" / {count(row.max_steps)}"
    return [
        (row.run_id, "bold"),
        (spoken(row.state.value), STATE_STYLES.get(row.state, "")),
        ("" if row.attempt is None else str(row.attempt), ""),
        (row.job_id or "", ""),
        (step, ""),
        ("" if row.submitted is None else f"{duration(now - row.submitted)} ago", ""),
        ("" if row.state in (JobState.COMPLETED, JobState.CANCELLED) else row.message, "dim"),
    ]


PS_HEADING = ("RUN", "STATE", "ATTEMPT", "JOB", "STEP", "SUBMITTED", "")


# --- orch top


def usage_lines(usage: Usage) -> list[Line]:
    """One look of `orch top`."""
    heading: list[Segment] = [(usage.run_id, "bold")]
    heading += [] if usage.attempt is None else [(f"   attempt {usage.attempt}", "")]
    heading += [] if usage.step is None else [(f" · step {count(usage.step)}", "")]
    content: list[Line] = [heading]
    content += table(TOP_HEADING, [_use(use, usage.limit_bytes) for use in usage.ranks])
    if usage.silent:
        content.append([(f"no word from {', '.join(usage.silent)}", "yellow")])
    elif not usage.ranks:
        content.append([("no rank is running yet", "dim")])
    return content


TOP_HEADING = ("RANK", "NODE", "PID", "PROCESSES", "CPU", "MEMORY", "OF LIMIT", "GPU")


def _use(use: RankUse, limit_bytes: int | None) -> list[Segment]:
    share = "" if not limit_bytes else f"{100 * use.rss_bytes / limit_bytes:.0f} %"
    return [
        (str(use.rank), "bold"),
        (use.node, ""),
        (str(use.pid), ""),
        (str(use.processes), ""),
        (f"{use.cpu_percent:.0f} %", ""),
        (size(use.rss_bytes), ""),
        (share, ""),
        ("; ".join(_gpu(gpu) for gpu in use.gpus), ""),
    ]


def _gpu(gpu: GpuUse) -> str:
    percent = "" if gpu.percent is None else f"{gpu.percent} %, "
    return f"{gpu.index}: {percent}{size(gpu.bytes)}"

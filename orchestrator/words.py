"""Figures and sentences for people, each in one place: what `orch status` says a mail and a webhook say too (pure)."""

from __future__ import annotations

from orchestrator.states import ExitReason, JobState


def count(number: int) -> str:
    """Digits in groups of three: `41 912`."""
    return f"{number:,}".replace(",", " ")


def size(number: int) -> str:
    """Bytes in decimal units, as disks are sold: `1.2 GB`."""
    value, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """`40 s`, `12 m 05 s`, `4 h 00 m`, `3 d 02 h`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} m"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def spoken(value: str) -> str:
    """A state or an exit reason as people say it: `needs_resume` → `needs resume`."""
    return value.replace("_", " ")


def steps_lost(number: int) -> str:
    """`1 step lost`, `1 024 steps lost`."""
    return f"{count(number)} step{'' if number == 1 else 's'} lost"


def sentence(text: str) -> str:
    """`the node died` → `The node died`; what begins with a name (`module.Error: …`, `data: …`) stays as it is."""
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    return text[:1].upper() + text[1:] if first.isalpha() else text


def safety(checkpoint_step: int | None, lost_step: int | None = None) -> str:
    """Whether the work is safe. `checkpoint_step`: of the checkpoint to go on from, None without one; `lost_step`: of a
    newer one that is gone or damaged."""
    if checkpoint_step is None and lost_step is not None:
        return (
            f"No checkpoint could be used; the last one was of step {count(lost_step)}. "
            "Restore a copy of one first (docs/checkpoints.md, `By hand`)."
        )
    if checkpoint_step is None:
        return "No checkpoint was committed; a resume starts at the beginning."
    but = "" if lost_step is None else f" The checkpoint of step {count(lost_step)} is gone or damaged."
    return f"Your work is safe up to step {count(checkpoint_step)}.{but}"


def next_steps(
    run_id: str,
    state: JobState,
    reason: ExitReason | None,
    checkpoint_step: int | None,
    lost_step: int | None = None,
) -> tuple[str, ...]:
    """Lines that say what became of the work and what to do; none for a run that needs nobody."""
    if state in (JobState.FAILED, JobState.LOST, JobState.NEEDS_RESUME):
        more = " --set resources.mem=…" if reason is ExitReason.OUT_OF_MEMORY else ""
        what = f"What it printed:  orch logs {run_id}        Go on:  orch resume {run_id}{more}"
        return safety(checkpoint_step, lost_step), what
    if state is JobState.CANCELLED:
        return (f"{safety(checkpoint_step, lost_step)} Go on:  orch resume {run_id}",)
    return ()


def story(
    run_id: str,
    state: JobState,
    reason: ExitReason | None,
    message: str,
    *,
    step: int | None,
    max_steps: int | None,
    checkpoint_step: int | None,
    lost_step: int | None = None,
) -> str:
    """A run's end in plain text, for people who are not looking at it: what happened, is it safe, what to do."""
    why = "" if reason is None or reason.value == state.value else f" ({spoken(reason.value)})"
    where = "" if step is None else f" at step {count(step)}" + (f" of {count(max_steps)}" if max_steps else "")
    lines = [f"{run_id}: {spoken(state.value)}{why}{where}."]
    if message and message != state.value and state is not JobState.COMPLETED:
        lines.append(sentence(message))
    return "\n".join([*lines, *next_steps(run_id, state, reason, checkpoint_step, lost_step)])

"""What is said about a run that has ended, in one place: by `orch status`, in a mail, to a webhook (pure)."""

from __future__ import annotations

from orchestrator.states import ExitReason, JobState


def count(number: int) -> str:
    """Digits in groups of three: `41 912`."""
    return f"{number:,}".replace(",", " ")


def sentence(text: str) -> str:
    """`the node died` → `The node died`; what begins with a name (`module.Error: …`, `data: …`) stays as it is."""
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    return text[:1].upper() + text[1:] if first.isalpha() else text


def safety(checkpoint_step: int | None) -> str:
    """Whether the work is safe. `checkpoint_step`: of the last committed checkpoint, None without one."""
    if checkpoint_step is None:
        return "No checkpoint was committed; a resume starts at the beginning."
    return f"Your work is safe up to step {count(checkpoint_step)}."


def next_steps(run_id: str, state: JobState, reason: ExitReason | None, checkpoint_step: int | None) -> tuple[str, ...]:
    """Lines that say what became of the work and what to do; none for a run that needs nobody."""
    if state in (JobState.FAILED, JobState.LOST, JobState.NEEDS_RESUME):
        more = " --set resources.mem=…" if reason is ExitReason.OUT_OF_MEMORY else ""
        what = f"What it printed:  orch logs {run_id}        Go on:  orch resume {run_id}{more}"
        return safety(checkpoint_step), what
    if state is JobState.CANCELLED:
        return (f"{safety(checkpoint_step)} Go on:  orch resume {run_id}",)
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
) -> str:
    """A run's end in plain text, for people who are not looking at it: what happened, is it safe, what to do."""
    words = state.value.replace("_", " ")
    why = "" if reason is None or reason.value == state.value else f" ({reason.value.replace('_', ' ')})"
    where = "" if step is None else f" at step {count(step)}" + (f" of {count(max_steps)}" if max_steps else "")
    lines = [f"{run_id}: {words}{why}{where}."]
    if message and message != state.value and state is not JobState.COMPLETED:
        lines.append(sentence(message))
    return "\n".join([*lines, *next_steps(run_id, state, reason, checkpoint_step)])

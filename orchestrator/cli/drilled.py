"""What `orch preempt` says to people: the story of a drill as it happens, and its certificate."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.cli.out import Line, Segment
from orchestrator.operations.drill import DrillNews, watch_drill
from orchestrator.operations.results import Certificate, Signalled, Told
from orchestrator.paths import RunPaths
from orchestrator.words import count, size, spoken, steps_lost


def tell_verified(news: DrillNews) -> None:
    """Print one piece of news of a drill that ends with a certificate."""
    if news.kind == "stepped":
        print(f" … step {count(news.step or 0)}", end="", flush=True)
    elif news.kind not in ("ended", "time_up"):  # the certificate says it better
        print(_tell(news)[0], end="", flush=True)


def narrate(drill: Signalled, limit_s: float) -> bool:
    """`… saved step 41 912 after 2.8 s … requeued … started. 0 steps lost.` Blocks; True when the run is safe."""
    safe = True
    for news in watch_drill(drill, timeout_s=limit_s):
        text, safe = _tell(news)
        print(text, end="", flush=True)
    print()
    return safe


def _tell(news: DrillNews) -> tuple[str, bool]:
    """The words for it, and whether the run is safe as far as they go."""
    step = "" if news.step is None else count(news.step)
    if news.kind == "saved":
        return f" … saved step {step} after {news.seconds or 0.0:.1f} s", True
    if news.kind in ("requeued", "started"):
        return f" … {news.kind}", True
    if news.kind == "resumed":
        return f", resumed from step {step}.", True
    status = news.status
    if news.kind == "time_up" and status is not None:
        return f" … the time is up, and the run is {status.state.value} (nothing is lost by waiting)", status.alive
    if status is None:
        return "", True
    if status.state.terminal and not status.succeeded:
        return f" … the run ended: {spoken(status.state.value)}. {status.message}", False
    if not status.attempts or status.attempts[-1].resumed_step is None:
        if status.progress.step is None:
            return f". It does not tell orch what it saved:  orch logs {status.run_id}", True
        return " … it began again at the beginning: nothing was saved. Is the signal handled?", False
    lost = next((row.steps_lost for row in reversed(status.attempts[:-1]) if row.steps_lost is not None), None)
    return ("" if lost is None else f" {steps_lost(lost)}."), True


def certificate_lines(shown: Certificate) -> list[Line]:
    """What `orch preempt --verify` says at the end."""
    verdict: Segment = ("drill passed", "bold green") if shown.passed else ("drill FAILED", "bold red")
    facts = [(name, text) for name, text in _facts(shown) if text is not None]
    content: list[Line] = [[(shown.run_id, "bold"), ("   ", ""), verdict]]
    content += [
        [(f"  {'because' if number == 0 else '':<13}{reason}", "")] for number, reason in enumerate(shown.reasons)
    ]
    content += [[(f"  {name:<13}{text}", "")] for name, text in facts]
    written = RunPaths(shown.run_dir).drill(shown.attempt)
    return [*content, [(f"  {'certificate':<13}{written}", "dim")]]


def _facts(shown: Certificate) -> Iterable[tuple[str, str | None]]:
    """Name and words of everything that was seen; None for what was not."""
    yield "told", "; ".join(_told(told) for told in shown.told) or "nobody"
    yield "time used", _used(shown)
    saved = None if shown.step_saved is None else f"step {count(shown.step_saved)}"
    if saved is not None and shown.save_s is not None:
        saved += f" in {shown.save_s:.1f} s"
    if saved is not None and shown.size_bytes is not None:
        saved += f", {size(shown.size_bytes)}"
    yield "saved", saved
    yield "requeued", None if shown.requeue_wait_s is None else f"started again after {shown.requeue_wait_s:.1f} s"
    resumed = None if shown.step_resumed is None else f"from step {count(shown.step_resumed)}"
    if resumed is not None and shown.steps_lost is not None:
        resumed += f", {steps_lost(shown.steps_lost)}" + (" (exact)" if shown.exact else "")
    yield "resumed", resumed
    started = None if shown.startup_s is None else f"{shown.startup_s:.1f} s to step {count(shown.step_made or 0)}"
    yield "started up", started
    yield "checkpoint", f"verified, {shown.checkpoint}" if shown.verified else None


def _told(told: Told) -> str:
    cause = "" if told.cause is None else f", {spoken(told.cause)}"
    return f"{told.node} ({'+'.join(told.signals)}{cause})"


def _used(shown: Certificate) -> str | None:
    if shown.grace_s is None:
        return None
    if shown.grace_used_s is None:
        return f"all of {shown.grace_s:.0f} s"
    return f"{shown.grace_used_s:.1f} s of {shown.grace_s:.0f} s"

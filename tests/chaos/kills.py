"""Attempts that are killed: at every instrumented point in turn, and every third one at a random time."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.nursery import Attempt, Nursery

Kill = dict[str, Any]
"""An order for an attempt; `after_s` instead of a point: when the test kills it."""


def at(point: str, *, after: str | None = None, nth: Sequence[int] = (1,)) -> Kill:
    """Killed just before that operation is done for the n-th time (one of `nth`), counted since `after`."""
    return {"at": point, "after": after, "nths": nth, "signal": "SIGKILL"}


def kill_plan(count: int, points: Sequence[Kill], *, longest_s: float) -> Iterator[Kill]:
    chance = random.Random(count)
    turns = itertools.cycle(points)
    for n in range(count):
        if n % 3 == 2:
            yield {"after_s": chance.uniform(0, longest_s), "stays": True}
        else:
            order = dict(next(turns))
            yield order | {"nth": chance.choice(order.pop("nths"))}


def run_until_killed(attempts: Nursery, directory: Path, attempt: int, kill: Kill, **order: Any) -> Attempt:
    """It is dead on return, and has not ended on its own before."""
    order = order | kill
    after_s = order.pop("after_s", None)
    child = attempts.start(directory, attempt, **order)
    if after_s is not None:
        time.sleep(after_s)  # the random moment itself, not a synchronisation
        os.kill(child.pid, signal.SIGKILL)
    child.wait_for("exited")
    assert child.status == -signal.SIGKILL, kill
    return child

"""Waiting in tests: a condition and a deadline, never a bare sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def poll(condition: Callable[[], T], what: str, *, timeout: float = 60.0) -> T:
    """The first truthy answer; AssertionError naming `what` when none comes in time."""
    until = time.monotonic() + timeout
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < until, f"timed out: {what}"
        time.sleep(0.02)

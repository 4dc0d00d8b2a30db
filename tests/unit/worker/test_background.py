"""The save beside the training, and who waits for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.worker.background import InFlight
from tests.polling import poll


@pytest.fixture
def interrupted() -> Iterator[threading.Event]:
    """Set when the first SIGINT has raised KeyboardInterrupt."""
    event = threading.Event()

    def once(number: int, frame: object) -> None:
        if not event.is_set():
            event.set()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, once)
    yield event
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_it_is_waited_for_does_not_make_it_ended(interrupted: threading.Event) -> None:
    """The next save would overwrite the copy that this one is still writing."""
    waited_for, may_end = threading.Event(), threading.Event()
    ended = []

    def interrupt() -> bool:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return interrupted.wait(0.05)  # one that comes just before the wait begins does not interrupt it

    def commit() -> Any:
        waited_for.wait(60)
        poll(interrupt, "the wait to be interrupted")
        may_end.wait(60)
        ended.append(True)

    flight = InFlight()
    flight.begin(commit, lambda: None)
    with pytest.raises(KeyboardInterrupt):
        waited_for.set()
        flight.finish()
    threading.Timer(0.2, may_end.set).start()
    flight.finish()
    assert ended == [True]
    assert not flight.flying

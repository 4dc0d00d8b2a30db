"""The save beside the training, and who waits for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.worker.background import InFlight


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in a program of its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_it_is_waited_for_does_not_make_it_ended(ctrl_c: None) -> None:
    """The next save would overwrite the copy that this one is still writing."""
    waited_for, may_end = threading.Event(), threading.Event()
    ended = []

    def commit() -> Any:
        waited_for.wait(20)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        may_end.wait(20)
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

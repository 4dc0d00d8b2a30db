"""Short commands of a runtime's client: what they say, and that none outlives its caller's patience."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.containers.process import run_client
from orchestrator.errors import ContainerError

SLOW = """#!/bin/sh
sleep 60 &
echo $$ $! > {pids}.new
mv {pids}.new {pids}
wait
touch {over}
"""


class Told(BaseException):
    """What a handler of the agent raises."""


@pytest.fixture
def told_at_once() -> Iterator[None]:
    def handler(signum: int, frame: object) -> None:
        raise Told

    before = signal.signal(signal.SIGTERM, handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def client(tmp_path: Path) -> Path:
    path = tmp_path / "client"
    path.write_text(SLOW.format(pids=tmp_path / "pids", over=tmp_path / "over"))
    path.chmod(0o755)
    return path


def pids_of(directory: Path) -> list[int]:
    until = time.monotonic() + 60
    while not (directory / "pids").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    return [int(pid) for pid in (directory / "pids").read_text().split()]


def assert_gone(pid: int) -> None:
    until = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").exists() and ") Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_client_goes_with_all_it_has_started_when_a_handler_raises(
    tmp_path: Path, client: Path, told_at_once: None
) -> None:
    main = threading.get_ident()

    def tell() -> None:
        pids_of(tmp_path)
        signal.pthread_kill(main, signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    with pytest.raises(Told):
        run_client([str(client), "pull"], environ=os.environ, timeout_s=60, hint="")
    teller.join(60)
    for pid in pids_of(tmp_path):
        assert_gone(pid)
    assert not (tmp_path / "over").exists()


def test_a_signal_that_was_held_back_while_it_started_leaves_no_client(
    tmp_path: Path, client: Path, told_at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    real = subprocess.Popen
    begun: list[int] = []

    class Signalled(real):  # type: ignore[type-arg, misc]
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            begun.append(self.pid)
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # held back until the mask is off

    monkeypatch.setattr(subprocess, "Popen", Signalled)
    with pytest.raises(Told):
        run_client([str(client), "pull"], environ=os.environ, timeout_s=60, hint="")
    (pid,) = begun
    assert_gone(pid)
    assert not (tmp_path / "over").exists(), "it was waited for, not ended"


def test_one_that_does_not_answer_is_given_up(tmp_path: Path, client: Path) -> None:
    with pytest.raises(ContainerError, match="does not answer on node"):
        run_client([str(client), "pull"], environ=os.environ, timeout_s=1, hint="")
    for pid in pids_of(tmp_path):
        assert_gone(pid)

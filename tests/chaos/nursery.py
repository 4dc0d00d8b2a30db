"""Starts attempts (committer.py) that a test kills and stops, and follows what becomes of them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SIZE = 100_000
SILENCE_S = 180.0  # more than the patience with a store that does not answer, twice
COMMITTER = Path(__file__).with_name("committer.py")


def load_committer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chaos_committer", COMMITTER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


committer = load_committer()


@dataclass
class Attempt:
    """An attempt in a process of its own."""

    next_line: Callable[[], str]
    pid: int = 0
    saved: list[int] = field(default_factory=list)  # steps whose commit returned
    status: int | None = None

    def read(self) -> str:
        """The next thing that happens to it."""
        word, _, value = self.next_line().partition(" ")
        if word == "pid":
            self.pid = int(value)
        elif word == "saved":
            self.saved.append(int(value))
        elif word == "exited":
            self.status = int(value)
        else:
            assert word == "stopped"
        return word

    def wait_for(self, *words: str) -> str:
        while (word := self.read()) not in words:
            pass
        return word


class Nursery:
    """Starts attempts, one after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._told: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))

    def start(self, directory: Path, attempt: int, **order: Any) -> Attempt:
        assert self._process.stdin is not None
        full = {"directory": str(directory), "attempt": attempt, "size": SIZE, "steps": 100} | order
        self._told = [json.dumps(full)]
        self._process.stdin.write(self._told[0] + "\n")
        self._process.stdin.flush()
        child = Attempt(self._next_line)
        child.wait_for("pid")
        return child

    def _next_line(self) -> str:
        """What is told next. A test that waits for something that never happens fails, and says what stands where."""
        try:
            line = self._lines.get(timeout=SILENCE_S)
        except queue.Empty:
            pytest.fail(f"nothing happened for {SILENCE_S:g} s after {self._told}\n{self._processes()}")
        self._told.append(line)
        return line

    def _processes(self) -> str:
        """The nursery and its children, thread by thread: state, and what they wait for in the kernel."""
        nursery = self._process.pid
        told = []
        for stat in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, parent, *_ = stat.read_text().rpartition(")")[2].split()
                if nursery in (int(parent), int(stat.parts[2])):
                    told.append(f"{stat.parent}: {state} in {(stat.parent / 'wchan').read_text()}")
        return "\n".join(told)


@contextmanager
def nursery() -> Iterator[Nursery]:
    """A nursery that ends with the block, and with it an attempt that still stands."""
    with subprocess.Popen(
        [sys.executable, str(COMMITTER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield Nursery(process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)

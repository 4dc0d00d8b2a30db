"""Starts attempts (committer.py) that a test kills and stops, and follows what becomes of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

SIZE = 100_000
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

    lines: Iterator[str]
    pid: int = 0
    saved: list[int] = field(default_factory=list)  # steps whose commit returned
    status: int | None = None

    def read(self) -> str:
        """The next thing that happens to it."""
        word, _, value = next(self.lines).partition(" ")
        if word == "pid":
            self.pid = int(value)
        elif word == "saved":
            self.saved.append(int(value))
        elif word == "exited":
            self.status = int(value)
        return word

    def wait_for(self, *words: str) -> str:
        while (word := self.read()) not in words:
            pass
        return word


class Nursery:
    """Starts attempts, one after the other."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        self._lines = (line.strip() for line in process.stdout)

    def start(self, directory: Path, attempt: int, **order: Any) -> Attempt:
        assert self._process.stdin is not None
        full = {"directory": str(directory), "attempt": attempt, "size": SIZE, "steps": 100} | order
        self._process.stdin.write(json.dumps(full) + "\n")
        self._process.stdin.flush()
        child = Attempt(self._lines)
        child.wait_for("pid")
        return child


@contextmanager
def nursery(limit_s: float) -> Iterator[Nursery]:
    """A nursery that ends with the block, and after `limit_s` in any case."""
    command = [sys.executable, str(COMMITTER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        # A test that waits for something that never happens ends with the nursery instead of hanging.
        limit = threading.Timer(limit_s, process.kill)
        limit.daemon = True
        limit.start()
        yield Nursery(process)
        limit.cancel()

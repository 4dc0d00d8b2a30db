"""The node-local directory of an attempt: leash, PID 1's orders and environment. Never on the shared disk."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.files import write_atomic, write_json

_LOCK = "owner.lock"


def node_name(environ: Mapping[str, str]) -> str:
    """What Slurm, and so a run's files, call this node; without Slurm its host name."""
    return environ.get("SLURMD_NODENAME") or os.uname().nodename


def node_root(environ: Mapping[str, str]) -> Path:
    """Where node-local directories live: $ORCH_NODE_DIR, else memory (secrets never touch a disk), else /tmp."""
    configured = environ.get("ORCH_NODE_DIR")
    if configured:
        return Path(configured) / f"orch-{os.getuid()}"
    memory = Path("/dev/shm")
    base = memory if os.access(memory, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    return base / f"orch-{os.getuid()}"


class NodeDirectory:
    """One attempt's private directory on one node, removed at the end; a killed agent's is swept by the next one."""

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / name
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = root.lstat()  # one look: between two, a link could be put in the place of a directory
        if about.st_uid != os.getuid() or not stat.S_ISDIR(about.st_mode):
            raise PermissionError(f"{root} belongs to somebody else")
        with _alone(root):
            sweep(root)
            self.path.mkdir(mode=0o700)
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.mkfifo(self.leash, 0o600)
        # Both ends: a FIFO with a writer never reads as EOF, and opening it does not wait for PID 1.
        self._leash = os.open(self.leash, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)

    @property
    def leash(self) -> Path:
        return self.path / "leash"

    @property
    def up(self) -> Path:
        return self.path / "up"

    @property
    def deadline(self) -> Path:
        return self.path / "deadline.json"

    @property
    def memory_report(self) -> Path:
        """Written by PID 1 when the kernel has killed for lack of memory."""
        return self.path / "memory.json"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def launcher(self) -> Path:
        return self.path / "launch.py"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """PID 1's orders; they hold the secrets, hence the mode."""
        write_atomic(self.config, json.dumps(config).encode(), mode=0o600)

    def write_deadline(self, deadline: float, cause: str | None) -> None:
        """Tell the session how long it has; rewritten when a better answer or a second signal comes."""
        write_json(self.deadline, {"deadline": deadline, "cause": cause, "told": time.time()})

    def order(self, order: bytes) -> None:
        """`D`: write down every rank's stack. `U`: stop at the next step boundary. `K`: end now. The FIFO keeps them
        until PID 1 is up, so none is lost."""
        os.write(self._leash, order)

    def close(self) -> None:
        """Let go of the leash (ends PID 1, should it still run) and remove everything."""
        os.close(self._leash)
        with _alone(self.path.parent):
            shutil.rmtree(self.path)
        os.close(self._lock)


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One agent at a time makes and removes directories here: a half-made one looks like that of a killed agent."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sweep(root: Path) -> list[str]:
    """Remove directories whose agent is gone: they may hold secrets. The lock says who is alive."""
    removed = []
    for directory in root.iterdir():
        with _try_lock(directory / _LOCK) as free:
            if free:
                shutil.rmtree(directory, ignore_errors=True)
                removed.append(directory.name)
    return removed


def attempt_lives(root: Path, run_id: str, attempt: int) -> bool:
    """Whether an agent of that attempt works below this root."""
    for directory in root.glob(f"{glob.escape(run_id)}.{attempt}.*"):
        with _try_lock(directory / _LOCK) as free:
            if not free:
                return True
    return False


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Yields whether nobody holds the lock; no lock at all is what a killed agent's removal leaves."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    except NotADirectoryError:  # not ours
        yield False
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(lock)

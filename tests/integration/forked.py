"""Runs training code in forked children: each is a process of its own (signals, os._exit, SIGKILL), without paying the
seconds of `import torch` again. The environment says what the agent of `orch` would say."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.cluster.service import free_port

TIMEOUT_S = 120.0


def managed_environment(run_dir: Path, *, attempt: int) -> dict[str, str]:
    """ORCH_* as an agent sets them; the deadline file does not exist until somebody writes it."""
    return {
        "ORCH_RUN_ID": "run-1",
        "ORCH_RUN_DIR": str(run_dir),
        "ORCH_ATTEMPT": str(attempt),
        "ORCH_CHECKPOINT_URI": str(run_dir / "checkpoints"),
        "ORCH_DEADLINE_FILE": str(run_dir / f"deadline-{attempt}.json"),
        "OMP_NUM_THREADS": "1",
    }


def torchrun_environment(rank: int, world_size: int, port: int, *, ranks_per_node: int | None = None) -> dict[str, str]:
    """The variables torchrun sets; the nodes, if there are several, are all this machine."""
    if world_size == 1:
        return {}
    per_node = ranks_per_node or world_size
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % per_node),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(per_node),
        "GROUP_RANK": str(rank // per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _become(body: Callable[[], object], environment: dict[str, str], output: Path) -> NoReturn:
    code = 1
    try:
        os.setsid()
        warnings.simplefilter("default")  # a program of its own, not part of pytest
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.environ.update(environment)
        body()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 (the child ends here whatever it raised)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_ranks(
    body: Callable[[], object],
    run_dir: Path,
    *,
    world_size: int,
    attempt: int,
    ranks_per_node: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> list[int]:
    """Run `body` as every rank of one attempt and return the exit codes by rank (negative: the signal that killed it).

    Each rank leads a session of its own, as under torchrun, and the others are ended when one was killed. Raises
    TimeoutError, after ending all, when they hang.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    port = free_port() if world_size > 1 else 0
    pids = []
    for rank in range(world_size):
        environment = {
            **managed_environment(run_dir, attempt=attempt),
            **torchrun_environment(rank, world_size, port, ranks_per_node=ranks_per_node),
            **(variables or {}),
        }
        pid = os.fork()
        if pid == 0:
            _become(body, environment, run_dir / f"output-{attempt}-{rank}.txt")
        pids.append(pid)
    return _wait(pids, run_dir, attempt)


def _wait(pids: Sequence[int], run_dir: Path, attempt: int) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + TIMEOUT_S
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        killed = any(code < 0 for code in codes.values())
        late = time.monotonic() > deadline
        if killed or late:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if late:
            raise TimeoutError(f"attempt {attempt} did not end:\n{outputs(run_dir, attempt)}")
        time.sleep(0.01)  # between two polls, not instead of one
    return [codes[pid] for pid in pids]


def outputs(run_dir: Path, attempt: int) -> str:
    """What the ranks of an attempt printed."""
    return "\n".join(path.read_text() for path in sorted(run_dir.glob(f"output-{attempt}-*.txt")))


@dataclass(frozen=True)
class Interruption:
    """A signal that a rank sends itself, from a thread, some time after the attempt's progress has reached a step.

    From within, so that a busy machine slows the signal down as much as the training. With `group`, it goes to the
    rank's DataLoader workers too.
    """

    run_dir: Path
    attempt: int
    step: int
    number: int
    rank: int = 0
    group: bool = False
    delay_s: float = 0.0

    def watch(self) -> None:
        """Start the thread, if this process is the rank that is meant."""
        if os.environ.get("RANK", "0") == str(self.rank):
            threading.Thread(target=self._wait_and_send, daemon=True).start()

    def reached(self) -> bool:
        """Whether the attempt has come so far."""
        try:
            progress = json.loads((self.run_dir / "progress.json").read_text())
        except FileNotFoundError:
            return False
        return bool(progress["attempt"] == self.attempt and progress["step"] >= self.step)

    def _wait_and_send(self) -> None:
        pause = threading.Event()
        while not self.reached():
            pause.wait(0.005)
        pause.wait(self.delay_s)
        (os.killpg if self.group else os.kill)(os.getpid(), self.number)

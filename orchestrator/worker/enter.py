"""A command beside a rank of a running job, on its node (`orch shell`): in the rank's container, where it has one.

    python -m orchestrator.worker.enter RUN_DIR RANK CONTAINER [COMMAND…]

RANK and CONTAINER may be `-`. The command finds the rank's environment by itself (`ranks.py`), inside the container: it
holds secrets, and must be on no command line and in no question to the engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.containers.docker import connect
from orchestrator.containers.podman import exec_command
from orchestrator.errors import ContainerError, OrchError
from orchestrator.worker import ranks
from orchestrator.worker.agent import load_orders
from orchestrator.worker.node import node_name
from orchestrator.worker.observe import agent_of

_INTERRUPTED = 130
_ENDED_S = 5.0


def neighbour_argv(orders: Mapping[str, Any], node: str, rank: str, leash: str, command: list[str]) -> list[str]:
    """Arguments of `ranks.py`."""
    return [orders["run_dir"], node, rank, orders["code_dir"], leash, *command]


@contextlib.contextmanager
def leash_in(directory: Path) -> Iterator[Path]:
    """A FIFO beside the attempt's own leash, which the container sees, too; whoever reads it learns of our end."""
    path = directory / f"shell-{os.getpid()}"
    os.mkfifo(path, 0o600)
    end = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield path
    finally:
        os.close(end)
        path.unlink(missing_ok=True)  # the attempt may have ended before us


@contextlib.contextmanager
def _raw_terminal(fd: int) -> Iterator[bool]:
    """Whether `fd` is a terminal; if so, every key goes to the terminal inside the container."""
    if not os.isatty(fd):
        yield False
        return
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)  # the default would drop what was typed ahead
    try:
        yield True
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


class Engine:
    """One command in a container, with our standard streams."""

    def __init__(self, api: Any, container: str) -> None:
        self.api, self.container = api, container

    def run(self, argv: list[str], *, terminal: bool) -> int:
        """Exit code of the command. Raises ContainerError."""
        import requests

        try:
            created = self.api.exec_create(
                self.container,
                argv,
                stdin=True,
                tty=terminal,
                user=f"{os.getuid()}:{os.getgid()}",
                environment={"TERM": os.environ.get("TERM", "dumb")},
            )["Id"]
            connection = self.api.exec_start(created, socket=True, tty=terminal)
            self._talk(created, connection, terminal)
            return self._exit_code(created)
        except requests.RequestException as error:  # docker's APIError is one
            raise ContainerError(
                f"container {self.container[:12]} has ended or cannot be entered: {error}",
                hint="`orch status` shows whether the job still runs.",
            ) from error

    def _exit_code(self, created: str) -> int:
        """The engine learns of the end a moment after the streams have ended."""
        until = time.monotonic() + _ENDED_S
        while (found := self.api.exec_inspect(created))["Running"] and time.monotonic() < until:
            time.sleep(0.05)
        return int(found["ExitCode"] or 0)

    def _talk(self, created: str, connection: Any, terminal: bool) -> None:
        from docker.utils.socket import frames_iter

        plain = getattr(connection, "_sock", connection)
        plain.settimeout(None)  # the client's own deadline would end a shell in which nobody types
        if terminal:
            self._fit(created)
            signal.signal(signal.SIGWINCH, lambda *_: self._fit(created))
        threading.Thread(target=_send_input, args=(plain,), daemon=True).start()
        frames: Any = frames_iter
        for stream, data in frames(plain, terminal):
            fd = 2 if stream == 2 else 1
            while data:
                data = data[os.write(fd, data) :]

    def _fit(self, created: str) -> None:
        """Give the terminal inside the size of ours."""
        size = fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8)
        rows, columns = int.from_bytes(size[0:2], sys.byteorder), int.from_bytes(size[2:4], sys.byteorder)
        if rows and columns:
            self.api.exec_resize(created, height=rows, width=columns)


def _send_input(connection: Any) -> None:
    import socket

    with contextlib.suppress(OSError):  # the command has ended; its output tells the reader
        while data := os.read(0, 65536):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def enter_container(run_dir: Path, orders: Mapping[str, Any], rank: str, container: str, command: list[str]) -> int:
    """Run beside the rank in its container, through the engine the agent uses. Raises OrchError."""
    node = node_name(os.environ)
    agent = agent_of(run_dir, node)
    number = None if rank == "-" else int(rank)
    own = ranks.own_process(orders["run_dir"], node, number)
    if agent is None or own is None:
        print(f"orch: rank {rank} of {orders['run_id']} is not running on {node}", file=sys.stderr)
        return ranks.NOT_RUNNING
    environ = {**os.environ, **ranks.environ_of(agent)}
    directory = Path(ranks.environ_of(own)["ORCH_DEADLINE_FILE"]).parent
    with leash_in(directory) as leash, _raw_terminal(0) as terminal:
        neighbour = neighbour_argv(orders, node, rank, str(leash), command)
        argv = ["python3", ranks.program_in(orders["library_dir"]), *neighbour]
        if orders["container"]["runtime"] == "podman":
            return subprocess.run(exec_command(container, argv, terminal=terminal), env=environ, check=False).returncode
        return Engine(connect(environ).api, container).run(argv, terminal=terminal)


def main(argv: list[str]) -> int:
    """See the module's docstring."""
    run_dir, rank, container, *command = argv
    for signum in (signal.SIGUSR1, signal.SIGUSR2):  # a drill's, sent to all of the job
        signal.signal(signum, signal.SIG_IGN)
    try:
        orders = load_orders(Path(run_dir))
        if container == "-":
            return ranks.main(neighbour_argv(orders, node_name(os.environ), rank, "-", command))
        return enter_container(Path(run_dir), orders, rank, container, command)
    except KeyboardInterrupt:  # the leash is let go of: what runs in the container ends
        return _INTERRUPTED
    except OrchError as error:
        print(f"orch: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

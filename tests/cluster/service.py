"""Daemons in the foreground: start with a deadline, wait until they answer, end by pid. Nothing here knows Slurm."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PORTS = (30_000, 32_700)
_claims: list[socket.socket] = []
_PR_SET_CHILD_SUBREAPER = 36


class ClusterError(RuntimeError):
    """The cluster could not be started or asked; the message carries the end of the log that explains it."""


def wait_for(what: str, probe: Callable[[], T], *, timeout: float, interval: float = 0.1) -> T:
    """The first truthy value of `probe`; blocks. Raises ClusterError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() >= end:
            raise ClusterError(f"waited {timeout:g} s for {what}; last answer: {value!r}")
        time.sleep(interval)


def free_port() -> int:
    """A loopback port nobody listens on, this process's until it ends: no other cluster of the machine is given it.

    Below the kernel's ephemeral range: a port from bind(0) can be handed to somebody's outgoing connection before the
    daemon that it was reserved for binds it. Above the ports on which the jobs' torchruns meet.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(*PORTS)
        claim = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe:
            try:
                claim.bind(f"\0orch-test-port-{port}")  # an abstract name: gone with the process
                probe.bind(("127.0.0.1", port))
            except OSError:
                claim.close()
                continue
        _claims.append(claim)
        return port
    raise ClusterError(f"no free loopback port between {PORTS[0]} and {PORTS[1]}")


def accepts(port: int, address: str = "127.0.0.1") -> bool:
    """True when something on loopback accepts a TCP connection on `port`."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) == 0


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, or a remark that there is none."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"(no log: {error})"


def call(
    argv: list[str],
    *,
    env: Mapping[str, str],
    timeout: float,
    stdin: str | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a short command to its end. Raises ClusterError when it fails or exceeds `timeout` seconds."""
    try:
        done = subprocess.run(
            argv, env=dict(env), input=stdin, capture_output=True, text=True, timeout=timeout, cwd=cwd, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{argv[0]} gave no answer within {timeout:g} s: {' '.join(argv)}") from error
    except OSError as error:
        raise ClusterError(f"cannot run {argv[0]}: {error}") from error
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def succeeds(argv: list[str], env: Mapping[str, str]) -> bool:
    """True when a short command ends with 0 within 10 s."""
    try:
        return subprocess.run(argv, env=dict(env), capture_output=True, timeout=10, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@dataclass
class Service:
    """One daemon that stays in the foreground as a child of this process."""

    name: str
    argv: list[str]
    env: Mapping[str, str]
    log: Path
    ready: Callable[[], object]
    timeout: float = 120
    user: str | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self.process.pid if self.process is not None and self.process.poll() is None else None

    def start(self) -> None:
        """Spawn it; does not wait until it answers."""
        if self.pid is not None:
            return
        # pdeathsig: the daemon ends even when this process is killed outright. setpriv sets it *after* the change of
        # user, which would clear it.
        prefix = ["setpriv", "--pdeathsig", "TERM"]
        if self.user:
            prefix += ["--reuid", self.user, "--regid", self.user, "--init-groups"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, "--", *self.argv],
                env=dict(self.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,  # a Ctrl-C or a killed process group is the supervisor's to answer, in order
            )

    def wait_ready(self) -> None:
        """Block until it answers. Raises ClusterError with the end of its log when it dies or is too slow."""

        def probe() -> object:
            if self.pid is None:
                code = self.process.returncode if self.process else None
                raise ClusterError(f"{self.name} ended with {code} while starting")
            return self.ready()

        try:
            wait_for(f"{self.name} to answer", probe, timeout=self.timeout)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{tail(self.log)}") from None

    def stop(self, sig: int = signal.SIGTERM, *, timeout: float = 10) -> None:
        """End it with `sig`, and with SIGKILL after `timeout` seconds; blocks until it is gone."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(sig)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent ends, so that `end_descendants` finds them all.

    slurmstepd and containerd-shim detach themselves on purpose; without this they outlive the cluster.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise ClusterError(f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(ctypes.get_errno())}")


def children_by_parent() -> dict[int, list[int]]:
    """Process tree of the machine: parent pid → child pids."""
    tree: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # ended while we looked
        tree.setdefault(parent, []).append(int(entry.name))
    return tree


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, children before grandchildren."""
    tree, found, queue = children_by_parent(), [], [pid]
    while queue:
        below = tree.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def reap(known: Iterable[int]) -> None:
    """Collect adopted processes that have ended; `known` are children whose status somebody else collects."""
    skip = set(known)
    for pid in children_by_parent().get(os.getpid(), []):
        if pid not in skip:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def end_descendants(*, timeout: float = 60, keep: Iterable[int] = ()) -> None:
    """SIGKILL everything below this process except `keep`, until nothing is left; blocks up to `timeout` seconds."""
    kept = set(keep)

    def none_left() -> bool:
        reap(kept)
        left = [pid for pid in descendants(os.getpid()) if pid not in kept]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    wait_for("the cluster's processes to end", none_left, timeout=timeout, interval=0.05)


def unmount_below(directory: Path) -> None:
    """Undo every mount below `directory`, deepest first (an engine that was killed leaves its overlays mounted)."""
    prefix = f"{directory}/"
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    for point in sorted((p for p in points if p.startswith(prefix)), key=len, reverse=True):
        call(["umount", "--lazy", point], env=os.environ, timeout=60)


def remove_tree(directory: Path) -> None:
    """Delete `directory`; refuses to walk into a file system that is still mounted inside it."""
    unmount_below(directory)
    shutil.rmtree(directory)

"""Which processes on a node belong to which rank, read from /proc; and a command beside a rank (`orch shell`).

Stdlib only and Python >= 3.9, because it also runs inside images that contain nothing of ours:

    python3 ranks.py RUN_DIR NODE RANK CWD LEASH [COMMAND…]

runs COMMAND (or a shell) with the environment of that rank in CWD, and ends with its exit code. RANK `-` is the program
of a job without torchrun. LEASH is a FIFO that the person's end of the line holds open (`-`: none): an engine lets a
program that was started beside a container run on when nobody is connected any more, and nothing may be left behind.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

ATTACHED = "ORCH_ATTACHED"
"""In the environment of what a person started beside a rank: it has the rank's own variables and is not the rank."""

NOT_RUNNING = 3  # the exit code of BackendError, which images do not have
_CANNOT_START, _NOT_FOUND = 126, 127
_END_S = 2.0
_PR_SET_CHILD_SUBREAPER = 36


def program_in(library: str) -> str:
    """This file below the directory of our code that travels with a run."""
    return f"{library}/orchestrator/worker/ranks.py"


class Process(NamedTuple):
    """One process of a run. `rank` is None where torchrun gave none (itself, or a job without it)."""

    pid: int
    parent: int
    rank: int | None


def environ_of(pid: int) -> dict[str, str]:
    """Environment of a process at its start; empty when it has ended or is somebody else's."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as stream:
            entries = stream.read().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    pairs = (os.fsdecode(entry).partition("=") for entry in entries if b"=" in entry)
    return {name: value for name, _, value in pairs}


def _parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            return int(stream.read().rpartition(b")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def processes_of(run_dir: str, node: str) -> list[Process]:
    """Live processes of the run's program on this node, without attached ones.

    By directory: the same run may exist under another root; and by node: several may share a machine.
    """
    found = []
    for entry in os.listdir("/proc"):
        environ = environ_of(int(entry)) if entry.isdigit() else {}
        if environ.get("ORCH_RUN_DIR") == run_dir and environ.get("ORCH_NODE") == node and ATTACHED not in environ:
            rank = environ.get("RANK", "")
            found.append(Process(int(entry), _parent_of(int(entry)), int(rank) if rank.isdigit() else None))
    return found


def by_rank(processes: list[Process]) -> dict[int | None, list[Process]]:
    """Each rank's own process first, then what it has started. Without any rank: the program itself, as None."""
    ranks: dict[int | None, list[Process]] = {}
    for process in sorted(processes):
        ranks.setdefault(process.rank, []).append(process)
    if len(ranks) > 1:
        ranks.pop(None, None)  # torchrun
    for members in ranks.values():
        pids = {process.pid for process in members}
        members.sort(key=lambda process: (process.parent in pids, process.pid))
    return ranks


def own_process(run_dir: str, node: str, rank: int | None) -> int | None:
    """pid of the rank's own process on this node; None when it is not running here."""
    members = by_rank(processes_of(run_dir, node)).get(rank)
    return members[0].pid if members else None


# --- a command beside a rank -----------------------------------------------------------------------------------------
class Neighbour:
    """A command with a rank's environment, ended when it ends, when we are told to, or when the leash is let go of."""

    def __init__(self, environ: dict[str, str], cwd: str, leash: int | None) -> None:
        own = {name: os.environ[name] for name in ("TERM", "COLORTERM") if name in os.environ}
        self.environ = {**environ, **own, ATTACHED: "1"}
        self.cwd = cwd
        self.leash = leash
        self.told = False
        self.wakeup, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for signum in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self._on_end)
        # Handlers, which the command does not inherit; but a drill's signals, sent to all of a job, must spare it, too.
        for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD):
            signal.signal(signum, lambda *_: None)
        for signum in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(signum, signal.SIG_IGN)
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")

    def _on_end(self, signum: int, frame: object) -> None:
        self.told = True

    def run(self, argv: list[str]) -> int:
        """Exit code of the command as a shell would say it."""
        try:
            child = subprocess.Popen(argv, cwd=self.cwd, env=self.environ)
        except OSError as error:
            print(f"orch: {argv[0]}: {error.strerror}", file=sys.stderr, flush=True)
            return _NOT_FOUND if isinstance(error, FileNotFoundError) else _CANNOT_START
        try:
            while child.poll() is None and not self.told and self._leash_holds():
                pass
        finally:
            self._end_all(child)
        code = child.wait()
        return code if code >= 0 else 128 - code

    def _leash_holds(self) -> bool:
        watched = [self.wakeup] if self.leash is None else [self.wakeup, self.leash]
        ready, _, _ = select.select(watched, [], [], 1.0)
        if self.wakeup in ready:
            os.read(self.wakeup, 4096)
        return self.leash not in ready or os.read(self.leash, 1) != b""

    def _end_all(self, child: subprocess.Popen[bytes]) -> None:
        """End what the command has started: politely, then not. Bounded.

        By descent, which a process cannot lose: its environment reads as empty while it changes into another program.
        """
        until = time.monotonic() + _END_S
        signum = signal.SIGHUP
        while not _reap(child) and time.monotonic() < until + _END_S:
            for pid in _descendants(os.getpid()):
                try:
                    os.kill(pid, signum)
                except ProcessLookupError:  # it has just ended
                    continue
            time.sleep(0.05)
            signum = signal.SIGHUP if time.monotonic() < until else signal.SIGKILL


def _reap(child: subprocess.Popen[bytes]) -> bool:
    """True when no child is left. We are a sub-reaper: orphans become ours, so no child means no descendant."""
    try:
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == child.pid:
                child.wait()
            else:
                os.waitpid(ended.si_pid, 0)
    except ChildProcessError:
        return True
    return False


def _descendants(root: int) -> set[int]:
    parents = {int(entry): _parent_of(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()}
    found: set[int] = set()
    generation = {root}
    while generation:
        generation = {pid for pid, parent in parents.items() if parent in generation}
        found |= generation
    return found


def main(argv: list[str]) -> int:
    """See the module's docstring."""
    run_dir, node, rank, cwd, leash, *command = argv
    pid = own_process(run_dir, node, None if rank == "-" else int(rank))
    environ = environ_of(pid) if pid is not None else {}
    if not environ:
        print(f"orch: rank {rank} of {run_dir} is not running on {node}", file=sys.stderr, flush=True)
        return NOT_RUNNING
    held = None
    if leash != "-":
        held = os.open(leash, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.unlink(leash)  # the other end may be killed, and then nobody else would
    shell = shutil.which("bash", path=environ.get("PATH")) or "sh"
    return Neighbour(environ, cwd, held).run(command or [shell])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

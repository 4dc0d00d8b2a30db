"""PID 1 of the container: starts the program (under torchrun), hands signals to the processes that can use them,
and dies with the agent that holds its leash.

Stdlib only and Python >= 3.9, because this one file is bind-mounted into images that contain nothing of ours:

    python3 launch.py CONFIG.json        PID 1; CONFIG is the agent's (node-local, 0600, holds the environment)
    python3 launch.py --torchrun ARGS    torchrun, told to leave SIGTERM and SIGUSR1 alone
    python3 launch.py --worker ARGS      one rank: opens its own log file, then becomes the program

What each guard is for (FACTS 3 and 4):
  - torchrun turns every non-zero exit into 1 and kills the peers of the first one, so ranks report through verdict
    files and exit 0; the verdict becomes our exit code here.
  - A signal that arrives before a rank has its handler is lost; it is latched and delivered again until each process
    that catches it has had it.
  - EOF on the leash (agent killed, node cleaned up) ends everything at once: a program nobody supervises would be a
    second writer as soon as the run is requeued.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any, NoReturn

SAVED = 75
NEVER_RESTART = 93
KILLED = 137
_TICK_S = 0.1
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_PTRACER = 0x59616D61  # "Yama"
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


# --- processes -------------------------------------------------------------------------------------------------------
def _status_fields(pid: int) -> dict[str, str]:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as stream:
            return dict(line.rstrip("\n").split(":\t", 1) for line in stream if ":\t" in line)
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return {}


def _processes() -> dict[int, dict[str, str]]:
    """Status of every live (not zombie) process this one can see, by pid."""
    table = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = _status_fields(int(entry))
            if fields and not fields.get("State", "Z").startswith(("Z", "X")):
                table[int(entry)] = fields
    return table


def descendants(root: int) -> dict[int, dict[str, str]]:
    """Live processes below `root` (itself excluded), by pid. As a sub-reaper we keep orphans below us."""
    table = _processes()
    children: dict[int, list[int]] = {}
    for pid, fields in table.items():
        children.setdefault(int(fields.get("PPid", "0")), []).append(pid)
    found: dict[int, dict[str, str]] = {}
    pending = list(children.get(root, ()))
    while pending:
        pid = pending.pop()
        if pid not in found:
            found[pid] = table[pid]
            pending.extend(children.get(pid, ()))
    return found


def catches(fields: dict[str, str], signum: int) -> bool:
    """True if the process has its own handler for the signal (proc(5), SigCgt)."""
    return bool(int(fields.get("SigCgt", "0"), 16) >> (signum - 1) & 1)


def _kill(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended: nothing left to tell
        os.kill(pid, signum)


def become_subreaper() -> None:
    """Keep orphaned grandchildren below us where we are not PID 1, so that they can still be found and ended."""
    if os.getpid() != 1 and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def end_descendants() -> None:
    """SIGKILL and reap all descendants, again until none is left (one may fork while we look); bounded."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        for pid in descendants(os.getpid()):
            _kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # orphans become ours, so no child means no descendant
            return
        time.sleep(0.01)
    print(f"orch: could not end processes {sorted(descendants(os.getpid()))}", file=sys.stderr, flush=True)


# --- memory ----------------------------------------------------------------------------------------------------------
_MEMORY_FILES = (  # events, limit and peak of a memory cgroup: version 2, version 1
    ("memory.events", "memory.max", "memory.peak"),
    ("memory.oom_control", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
)


def memory_cgroup(contained: bool, root: str = "/sys/fs/cgroup", listing: str = "/proc/self/cgroup") -> str | None:
    """Directory of the cgroup that limits our memory; None without one. In a container the mount itself may be ours."""
    try:
        with open(listing, encoding="utf-8", errors="surrogateescape") as stream:
            entries = [line.rstrip("\n").split(":", 2) for line in stream]
    except OSError:  # a kernel, or a sandbox, without cgroups
        return None
    for _, controllers, path in entries:
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = f"{root}/memory" if controllers else root
        candidates = [mount + path] if path != "/" else []
        candidates += [mount] if contained else []  # elsewhere that is the whole machine, and other people's kills
        for directory in candidates:
            if any(os.path.exists(f"{directory}/{events}") for events, _, _ in _MEMORY_FILES):
                return directory
    return None


def memory_report(directory: str) -> dict[str, int | None]:
    """{"kills", "limit_bytes", "peak_bytes"}: how often the kernel killed here for lack of memory (cgroups(7))."""
    for events, limit, peak in _MEMORY_FILES:
        words = _first_words(f"{directory}/{events}")
        if words is not None:
            return {
                "kills": int(words.get("oom_kill", "0")),
                "limit_bytes": _number_in(f"{directory}/{limit}"),
                "peak_bytes": _number_in(f"{directory}/{peak}"),
            }
    return {"kills": 0, "limit_bytes": None, "peak_bytes": None}


def _first_words(path: str) -> dict[str, str] | None:
    try:
        with open(path, encoding="ascii") as stream:
            return dict(line.split()[:2] for line in stream if len(line.split()) >= 2)
    except OSError:  # this version of cgroups, or this kernel, has no such file
        return None


def _number_in(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as stream:
            text = stream.read().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # `max`: no limit


# --- the supervisor --------------------------------------------------------------------------------------------------
class Launch:
    """Supervises one node's share of an attempt, from start to exit code."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.signum = getattr(signal, "SIG" + config["signal"])
        self.stop_requested = False
        self.told: set[int] = set()
        self.memory = memory_cgroup(config["contained"])
        self.memory_kills = memory_report(self.memory)["kills"] if self.memory is not None else 0
        self.leash = os.open(config["leash"], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self.wakeup, self._wakeup_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wakeup_w, warn_on_full_buffer=False)
        for signum in {signal.SIGTERM, signal.SIGUSR1, self.signum}:
            signal.signal(signum, self._on_stop_signal)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whatever the program that started us held back

    def _on_stop_signal(self, signum: int, frame: object) -> None:
        self.stop_requested = True

    def start(self) -> subprocess.Popen[bytes]:
        """Start the program with the environment of the config; ranks write their own logs, the rest goes to ours."""
        config = self.config
        environ = {**config["defaults"], **os.environ, **config["env"]}
        # Behind whatever the image or the user put there: ours serves images that have nothing of ours.
        paths = [environ.get("PYTHONPATH"), config["library"]]
        environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        ignored: tuple[int, ...] = ()
        if config["torchrun"] is None:
            argv = config["program"]
        else:
            argv = [config["python"], os.path.abspath(__file__), "--torchrun", *self._torchrun_args()]
            # Inherited by torchrun and by ranks until they install their own handlers: a signal in between is
            # latched here instead of killing them.
            ignored = (signal.SIGTERM, signal.SIGUSR1, self.signum)
        return subprocess.Popen(
            argv, cwd=config["cwd"], env=environ, stdin=subprocess.DEVNULL, preexec_fn=lambda: _ignore(ignored)
        )

    def _torchrun_args(self) -> list[str]:
        torchrun, config = self.config["torchrun"], self.config
        worker = [config["python"], os.path.abspath(__file__), "--worker", config["log_dir"], *config["program"]]
        return [*torchrun, "--no-python", "--", *worker]

    def run(self) -> int:
        """Block until the program, the leash or the deadline ends; return the exit code of the node."""
        try:
            return self._run()
        finally:
            self._report_memory()

    def _run(self) -> int:
        try:
            child = self.start()
        except OSError as error:
            print(f"orch: cannot start the program: {error}", file=sys.stderr, flush=True)
            return 127 if isinstance(error, FileNotFoundError) else 126
        self._touch(self.config["up"])
        while True:
            self._wait_a_tick()
            if not self._leash_holds(child.pid):
                end_descendants()
                return KILLED
            code = self._reap(child)
            if code is not None:
                end_descendants()
                return self.exit_code(code)
            if self.stop_requested:
                self._deliver(child.pid)
            if self._only_teardown_is_left(child.pid):
                # torchrun's interpreter needs seconds to end after its last rank (FACTS 4); nothing of ours is in it.
                end_descendants()
                return self.exit_code(0)
            if self._past_deadline():
                print("orch: the deadline has passed, ending what is left", file=sys.stderr, flush=True)
                end_descendants()
                return self.exit_code(0) if self._verdict() else KILLED

    def _wait_a_tick(self) -> None:
        ready, _, _ = select.select([self.wakeup, self.leash], [], [], _TICK_S)
        if self.wakeup in ready:
            os.read(self.wakeup, 4096)

    def _leash_holds(self, child_pid: int) -> bool:
        """Read the agent's orders: `D` = write down where the ranks are, `U` = stop at the next step boundary,
        `K` = end now. EOF = the agent is gone."""
        try:
            orders = os.read(self.leash, 4096)
        except BlockingIOError:
            return True
        if b"D" in orders:
            self._dump_stacks(child_pid)
        self.stop_requested = self.stop_requested or b"U" in orders
        return orders != b"" and b"K" not in orders

    def _reap(self, child: subprocess.Popen[bytes]) -> int | None:
        """Collect zombies (as PID 1 nobody else does); the child's code once it has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return child.returncode if child.returncode is not None else 0
            if pid == 0:
                return None
            if pid == child.pid:
                code = os.waitstatus_to_exitcode(status)
                child.returncode = code
                return code if code >= 0 else 128 - code

    def _deliver(self, child_pid: int) -> None:
        """Signal each process below us that catches the signal, once; never torchrun, which would end its ranks."""
        spared = {child_pid} if self.config["torchrun"] is not None else set()
        for pid, fields in descendants(os.getpid()).items():
            if pid in spared or pid in self.told:
                continue
            for signum in (self.signum, signal.SIGTERM):
                if catches(fields, signum):
                    self.told.add(pid)
                    _kill(pid, signum)
                    break

    def _dump_stacks(self, child_pid: int) -> None:
        """Start py-spy on every rank and do not wait: PID 1 watches its leash; `_reap` collects the py-spies."""
        for pid, rank in self._ranks(child_pid):
            path = os.path.join(self.config["log_dir"], f"stack-{rank}.txt")
            try:
                log = os.open(path, _APPEND, 0o644)
            except OSError as error:  # a full disk is no reason to kill a program that may still save
                print(f"orch: {path}: {error.strerror}", file=sys.stderr, flush=True)
                continue
            argv = [self.config["py_spy"], "dump", "--subprocesses", "--pid", str(pid)]
            try:
                os.posix_spawn(
                    argv[0], argv, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, log, fd) for fd in (1, 2)]
                )
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.write(log, f"orch: {argv[0]}: {error.strerror}\n".encode())
            finally:
                os.close(log)

    def _ranks(self, child_pid: int) -> list[tuple[int, str]]:
        """(pid, name) of the training processes: torchrun's own children, or the program itself."""
        if self.config["torchrun"] is None:
            return [(child_pid, f"node-{self.config['node']}")]
        children = [pid for pid, fields in descendants(child_pid).items() if fields.get("PPid") == str(child_pid)]
        found = [(pid, _variable_of(pid, "RANK")) for pid in children]
        return [(pid, f"rank-{rank}") for pid, rank in found if rank is not None]

    def _report_memory(self) -> None:
        """Tell the agent when the kernel has killed something here for lack of memory."""
        report = memory_report(self.memory) if self.memory is not None else None
        if report is not None and (report["kills"] or 0) > (self.memory_kills or 0):
            partial = self.config["memory_report"] + ".new"
            try:
                with open(partial, "w", encoding="ascii") as stream:
                    json.dump(report, stream)
                os.replace(partial, self.config["memory_report"])
            except OSError as error:  # it must not take the place of the exit code, which may say that all is saved
                print(f"orch: {partial}: {error.strerror}", file=sys.stderr, flush=True)

    def _verdict(self) -> dict[str, Any] | None:
        return _read_json(self.config["verdict"])

    def _only_teardown_is_left(self, child_pid: int) -> bool:
        if self.config["torchrun"] is None or not os.path.exists(self.config["verdict"]):
            return False
        verdict = self._verdict()
        return (
            verdict is not None and verdict["outcome"] in ("saved", "unsaved", "fenced") and not descendants(child_pid)
        )

    def _past_deadline(self) -> bool:
        deadline = _read_json(self.config["deadline_file"]) if self.stop_requested else None
        return deadline is not None and time.time() > deadline["deadline"] + self.config["deadline_slack_s"]

    def exit_code(self, code: int) -> int:
        """The contract of PROTOCOLS 3: the verdict of rank 0 decides where the program left without an error."""
        verdict = self._verdict()
        outcome = verdict["outcome"] if verdict is not None else None
        if outcome == "fenced":
            return NEVER_RESTART
        if outcome in ("saved", "unsaved") and code in (0, SAVED):
            return SAVED
        if outcome == "failed" and code == 0:
            return 1
        if outcome is None and code == 0 and (self.told or self._scheduler_told()):
            # A program without our library that handled the signal and left with 0 has stopped, not finished.
            return SAVED
        return code

    def _scheduler_told(self) -> bool:
        """Outside a container Slurm's signal hits the program before we do, and one that does not catch it is dead."""
        return self.stop_requested and not self.config["contained"] and self.config["torchrun"] is None

    @staticmethod
    def _touch(path: str) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _ignore(signums: Any) -> None:
    for signum in signums:
        signal.signal(signum, signal.SIG_IGN)


def _variable_of(pid: int, name: str) -> str | None:
    """A variable of another process's environment at its start; None when it has none, or has just ended."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as stream:
            entries = stream.read().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    prefix = name.encode() + b"="
    return next((entry[len(prefix) :].decode() for entry in entries if entry.startswith(prefix)), None)


def _read_json(path: str) -> dict[str, Any] | None:
    """The file's object; None while it is not there. Every writer replaces atomically, so a broken one is an error."""
    try:
        with open(path, encoding="utf-8") as stream:
            content: dict[str, Any] = json.load(stream)
            return content
    except FileNotFoundError:
        return None


# --- the other two faces of this file --------------------------------------------------------------------------------
def _torchrun(argv: list[str]) -> None:
    """torchrun's main, except that it must not react to SIGTERM or SIGUSR1: it would kill ranks while they save."""
    from torch.distributed import run  # the only import beyond stdlib, in a process of its own

    # Older releases lack the option and always handle SIGTERM; under an engine Slurm's SIGTERM does not reach them.
    if "--signals-to-handle" in run.get_args_parser()._option_string_actions:
        argv = ["--signals-to-handle", "SIGINT", *argv]
    run.main(argv)


def _worker(log_dir: str, argv: list[str]) -> NoReturn:
    """Send this rank's output to its own log file, then become the program."""
    log = os.open(
        os.path.join(log_dir, f"rank-{os.environ['RANK']}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # Where Yama guards ptrace, py-spy (PID 1's child, not our parent) could not look at a rank that hangs. It fails
    # where there is no Yama, and then nothing is guarded.
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
    os.execvp(argv[0], argv)


def main(argv: list[str]) -> int:
    """Entry point; see the module's docstring for the three faces."""
    if argv[0] == "--torchrun":
        _torchrun(argv[1:])
        return 0
    if argv[0] == "--worker":
        _worker(argv[1], argv[2:])
    config = _read_json(argv[0])
    if config is None:
        print(f"orch: {argv[0]} is missing", file=sys.stderr)
        return 126
    log = os.open(config["node_log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    become_subreaper()
    try:
        return Launch(config).run()
    finally:
        end_descendants()  # also when the supervisor itself fails


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

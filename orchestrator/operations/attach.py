"""`shell` and `top`: beside a running job, on its nodes, without taking anything from it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from orchestrator.backends import open_backend
from orchestrator.backends.base import Backend, Command, JobHandle
from orchestrator.errors import BackendError
from orchestrator.operations.control import running_here
from orchestrator.operations.describe import OpenBackend
from orchestrator.operations.record import Record, agent_plan, load_record
from orchestrator.operations.results import GpuUse, RankUse, Usage
from orchestrator.operations.roots import find_run
from orchestrator.worker import ranks
from orchestrator.worker.observe import LEASE_S

_ANSWER_S = 30.0  # for the first word of every node
_BEAT_S = LEASE_S / 4  # a busy machine may delay one, and must not end the step
_LEAVE_S = 10.0


@dataclass(frozen=True)
class _Job:
    """A running job and what its agents were told."""

    record: Record
    backend: Backend
    handle: JobHandle
    nodes: tuple[str, ...]
    plan: Mapping[str, Any]

    def beside(self, module: str, *arguments: str, nodes: Sequence[str], terminal: bool = False) -> Command:
        argv = [str(self.plan["python"]), "-m", f"orchestrator.worker.{module}", str(self.plan["run_dir"]), *arguments]
        return self.backend.beside(self.handle, argv, nodes=nodes, environ=os.environ, terminal=terminal)

    def number(self, rank: int | None, node: str) -> int:
        """A job without torchrun has one program on each node: its rank is the node's number."""
        if rank is not None:
            return rank
        return self.nodes.index(node) if node in self.nodes else 0


def _job(run: str, root: str | Path | None, open_backend: OpenBackend, verb: str) -> _Job:
    """Raises BackendError when the run is not running."""
    record = load_record(find_run(run, root))
    handle = running_here(record, open_backend, verb)
    nodes = record.attempts[-1].get("nodes") if record.attempts else None
    if not nodes:
        raise BackendError(
            f"the agents of {record.run_id} are not up yet", hint="`orch status` shows when its attempt has started"
        )
    names = (nodes,) if isinstance(nodes, str) else tuple(nodes)
    return _Job(record, open_backend(handle.backend), handle, names, agent_plan(record.paths))


# --- shell ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shell:
    """Where a shell will open, and the command that opens it."""

    run_id: str
    rank: int
    node: str
    container: str | None
    command: Command


def shell(
    run: str,
    *,
    rank: int = 0,
    command: Sequence[str] = (),
    terminal: bool = False,
    root: str | Path | None = None,
    open_backend: OpenBackend = open_backend,
) -> Shell:
    """Find the node of a rank, and what runs a command (or a shell) there, in its container if it has one.

    Raises BackendError when the run or that rank is not running.
    """
    job = _job(run, root, open_backend, "shell")
    ranked = job.plan["torchrun"] is not None
    node = _node_of(job, rank) if ranked else _numbered(job, rank)
    container = _container_on(job.record, node)
    if container is not None:
        _needs_program(job)
    arguments = [str(rank) if ranked else "-", container or "-", *command]
    beside = job.beside("enter", *arguments, nodes=[node], terminal=terminal)
    return Shell(job.record.run_id, rank, node, container, beside)


def _node_of(job: _Job, rank: int) -> str:
    """With several nodes torchrun deals the ranks out as the nodes come: ask them."""
    if len(job.nodes) == 1:
        return job.nodes[0]
    with contextlib.closing(_looks(job, interval_s=1.0)) as looks:
        usage = next(looks, None)
    for use in usage.ranks if usage is not None else ():
        if use.rank == rank:
            return use.node
    raise BackendError(f"{job.record.run_id} has no rank {rank} now", hint=f"`orch top {job.record.run_id}` lists them")


def _numbered(job: _Job, rank: int) -> str:
    if rank >= len(job.nodes):
        raise BackendError(
            f"{job.record.run_id} has no rank {rank}: it is a command, once on each of {len(job.nodes)} nodes",
            hint=f"--rank 0 to --rank {len(job.nodes) - 1}",
        )
    return job.nodes[rank]


def _container_on(record: Record, node: str) -> str | None:
    """Id of the newest attempt's container on a node; None where it runs without one."""
    for event in reversed(record.events):
        if event.get("event") == "container_started" and event.get("node") == node:
            identifier = event.get("container")
            return str(identifier) if identifier else None
    return None


def _needs_program(job: _Job) -> None:
    if not Path(ranks.program_in(str(job.plan["library_dir"]))).exists():
        raise BackendError(
            f"{job.record.run_id} was submitted by an orch that could not open shells in containers",
            hint="it can from its next submission on; until then: docker exec on the node",
        )


def open_shell(shell: Shell) -> int:
    """Run the command with our own standard streams; its exit code. Blocks as long as the person stays."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the shell, not for us
    try:
        return subprocess.run(
            shell.command.argv,
            env=dict(shell.command.environ),
            check=False,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ).returncode
    except FileNotFoundError:
        raise _no_program(shell.command) from None
    finally:
        signal.signal(signal.SIGINT, before)


def _no_program(command: Command) -> BackendError:
    return BackendError(f"{command.argv[0]}: command not found", hint="run this on a login node of the cluster")


# --- top --------------------------------------------------------------------------------------------------------------
def top(
    run: str,
    *,
    interval_s: float = 2.0,
    root: str | Path | None = None,
    open_backend: OpenBackend = open_backend,
) -> Generator[Usage]:
    """One look after the other at what the ranks use, until the attempt ends. Closing the iterator ends everything.

    The first look waits for all nodes (at most 30 s). Raises BackendError when the run is not running, or none answers.
    """
    yield from _looks(_job(run, root, open_backend, "top"), interval_s=interval_s)


def _looks(job: _Job, *, interval_s: float) -> Generator[Usage]:
    command = job.beside("observe", f"--interval={interval_s:g}", nodes=job.nodes)
    table = _Table(job)
    with _stream(command) as stream:
        for line in stream:
            if (line is not None and table.take(line)) or table.overdue():
                yield table.usage()
        if not table.answered:
            raise BackendError(
                f"no node of {job.record.run_id} answered: {stream.words() or 'the step ended without a word'}",
                hint="the job may be ending or starting: `orch status`",
            )


@dataclass
class _Table:
    """The newest lines of every rank and node."""

    job: _Job
    coming: dict[str, list[RankUse]] = field(default_factory=dict)
    ranks: dict[str, list[RankUse]] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    due: set[str] = field(default_factory=set)
    until: float = field(default_factory=lambda: time.monotonic() + _ANSWER_S)

    def __post_init__(self) -> None:
        self.due = set(self.job.nodes)

    def take(self, line: Mapping[str, Any]) -> bool:
        """Add a line; True when every node that answers has told a new sample."""
        node = str(line.get("node"))
        if line.get("kind") == "rank":
            self.coming.setdefault(node, []).append(_rank_use(self.job, line))
            return False
        if line.get("kind") != "end":
            return False
        self.ranks[node] = self.coming.pop(node, [])
        self.answered.add(node)
        self.due.discard(node)
        return not self.due

    def overdue(self) -> bool:
        """True when somebody has waited long enough for the nodes that are silent."""
        return bool(self.answered) and time.monotonic() > self.until

    def usage(self) -> Usage:
        """All there is, and who is silent; the next look waits for those that do answer."""
        silent = tuple(node for node in self.job.nodes if node in self.due)
        self.due = set(self.answered - self.due) or set(self.job.nodes)
        self.until = time.monotonic() + _ANSWER_S
        record = load_record(self.job.record.paths)
        ranks = sorted((use for uses in self.ranks.values() for use in uses), key=lambda use: use.rank)
        step = record.progress.get("step") if record.progress.get("attempt") == record.last_attempt else None
        limit = self.job.plan.get("mem_bytes")
        return Usage(record.run_id, record.last_attempt, step, time.time(), limit, tuple(ranks), silent)


def _rank_use(job: _Job, line: Mapping[str, Any]) -> RankUse:
    return RankUse(
        rank=job.number(line["rank"], line["node"]),
        node=line["node"],
        pid=line["pid"],
        processes=line["processes"],
        cpu_percent=line["cpu_percent"],
        rss_bytes=line["rss_bytes"],
        gpus=tuple(GpuUse(**gpu) for gpu in line["gpus"]),
    )


class _Stream:
    """JSON lines of a step; None now and then, when there was none. Keeps the step's lease while it is read."""

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._process, self._errors = process, errors
        self._rest = b""
        self._beaten_at = 0.0

    def __iter__(self) -> Iterator[Mapping[str, Any] | None]:
        assert self._process.stdout is not None
        end = self._process.stdout.fileno()
        while True:
            self._beat()
            ready, _, _ = select.select([end], [], [], 1.0)
            if not ready:
                yield None
                continue
            data = os.read(end, 65536)
            if not data:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            yield from filter(None, map(_parsed, lines))

    def _beat(self) -> None:
        if time.monotonic() - self._beaten_at > _BEAT_S:
            self._beaten_at = time.monotonic()
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended: the other pipe says so
                os.write(self._process.stdin.fileno(), b"\n")

    def words(self) -> str:
        """What the step had to complain about."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return "; ".join(dict.fromkeys(line.split("error:")[-1].strip() for line in lines if line.strip()))


def _parsed(line: bytes) -> Mapping[str, Any] | None:
    """A site's prologue may talk on the same stream."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@contextlib.contextmanager
def _stream(command: Command) -> Iterator[_Stream]:
    """A step that streams; at the end it loses its lease, then its patience, and nothing of it is left."""
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command.argv,
                env=dict(command.environ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C is for us; the step ends when we let go of it
            )
        except FileNotFoundError:
            raise _no_program(command) from None
        try:
            yield _Stream(process, errors)
        finally:
            _let_go(process)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    """End of input ends the observers; SIGTERM makes srun end the step."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    for send in (process.terminate, process.kill):
        try:
            process.wait(_LEAVE_S)
            break
        except subprocess.TimeoutExpired:
            send()
    process.wait()
    process.stdout.close()

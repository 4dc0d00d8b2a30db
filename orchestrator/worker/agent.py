"""The host side of an attempt: what the batch script and the local backend start. `node_agent` does the work.

python -m orchestrator.worker.agent ready RUN_DIR              the batch script, before srun, of a run with `after`
python -m orchestrator.worker.agent node RUN_DIR               one Slurm task per node
python -m orchestrator.worker.agent finish RUN_DIR --status N  the batch script, after srun has ended
python -m orchestrator.worker.agent local RUN_DIR              the local backend: both, until no attempt follows
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.containers.payload import Payload, PayloadRequest, Runtime, open_runtime
from orchestrator.errors import OrchError, RegistryError
from orchestrator.files import read_json, write_json
from orchestrator.identity import AGENT_PLAN_VERSION, attempt_number
from orchestrator.paths import RunPaths
from orchestrator.registry import EventLog, load_sidecar, read_events
from orchestrator.states import ExitCode, ExitReason
from orchestrator.worker import launch
from orchestrator.worker.decision import Decision, exit_code
from orchestrator.worker.finish import AttemptBook
from orchestrator.worker.node_agent import STOP_SIGNALS, NodeAgent, Place, hold_stop_signals, run_node
from orchestrator.worker.notify import Notifier
from orchestrator.worker.scheduler import (
    LocalScheduler,
    Requeued,
    Scheduler,
    SlurmScheduler,
    local_job_id,
    process_identity,
)
from orchestrator.worker.upstream import Upstream, blocked_by, look, note_waiting, times_waited, wait_here

_PR_SET_PDEATHSIG = 1
_PAUSE_TICK_S = 0.2


def load_orders(run_dir: Path) -> dict[str, Any]:
    """plan/agent.json of a run; RegistryError where another version of orch, with other orders, has written it."""
    orders: dict[str, Any] = read_json(RunPaths(run_dir).agent_plan)
    if orders["version"] != AGENT_PLAN_VERSION:
        raise RegistryError(
            f"{run_dir} was submitted by an orch whose orders are version {orders['version']}; this one's are version "
            f"{AGENT_PLAN_VERSION}: orch cancel {orders['run_id']}, then orch resume {orders['run_id']}"
        )
    return orders


def die_with_parent() -> None:
    """SIGKILL this agent when slurmstepd dies: else agent and container outlive scancel's reach (FACTS 4)."""
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit("orch: the parent of this agent has died")


def slurm_place(orders: Mapping[str, Any], scheduler: SlurmScheduler, environ: Mapping[str, str]) -> Place:
    """Read attempt and node from Slurm's environment (srun(1), OUTPUT ENVIRONMENT VARIABLES)."""
    nodes = int(environ["SLURM_STEP_NUM_NODES"])
    name = environ["SLURMD_NODENAME"]
    host = "127.0.0.1"
    local = None
    if nodes > 1:
        host, local = scheduler.node_addresses(scheduler.node_names(environ["SLURM_STEP_NODELIST"])[0], name)
    base = int(environ.get("ORCH_ATTEMPT_BASE", orders["attempt_base"]))
    return Place(
        attempt=attempt_number(base, scheduler.restart_count),
        node=int(environ["SLURM_NODEID"]),
        node_name=name,
        nodes=nodes,
        rendezvous_host=host,
        local_address=local,
    )


def node_main(run_dir: Path, environ: Mapping[str, str]) -> int:
    """The Slurm task of one node."""
    die_with_parent()
    orders = load_orders(run_dir)
    scheduler = SlurmScheduler(environ)
    place = slurm_place(orders, scheduler, environ)
    alive = _show_life(environ) if place.node == 0 else None
    if place.node == 0:
        nodes = scheduler.node_names(environ["SLURM_STEP_NODELIST"])
        AttemptBook(RunPaths(run_dir), orders).open(place.attempt, scheduler.job_id, nodes)
    code = _run_as(orders, place, scheduler, environ)
    if alive is not None and code in (ExitCode.DONE, ExitCode.SAVED):
        # A command may take longer on another node, to end or to save; after a failure nobody is waited for long.
        os.write(alive, b"done\n")
    return code


def _show_life(environ: Mapping[str, str]) -> int | None:
    """Hold the batch script's pipe open until this process ends, however it ends; None where there is none."""
    pipe = environ.get("ORCH_ALIVE")
    if pipe is None or not Path(pipe).is_fifo():  # a template of the user's own may have none
        return None
    try:
        return os.open(pipe, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:  # then nobody watches: no reason not to run
        print(f"orch: {pipe}: {error.strerror}", file=sys.stderr, flush=True)
        return None


def _run_as(orders: Mapping[str, Any], place: Place, scheduler: Scheduler, environ: Mapping[str, str]) -> int:
    """Open the runtime and run; an engine that does not answer is a recorded failure like any other."""
    agent = NodeAgent(orders, place, scheduler, _Deferred(orders["container"]["runtime"]), environ)
    agent.install_signal_handlers()
    if environ.get("ORCH_TOLD") == "1":  # the batch script got a notice before there was an agent to tell
        agent.take_notice(signal.SIGTERM)
    launch.become_subreaper()
    try:
        return run_node(agent)
    finally:
        launch.end_descendants()  # without a container, what a killed PID 1 has left


class _Deferred:
    """A runtime opened at first use, so that a missing engine is recorded in the run like any other failure."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._runtime: Runtime | None = None

    def _open(self) -> Runtime:
        self._runtime = self._runtime or open_runtime(self.name)
        return self._runtime

    def remove_leftovers(self, run_dir: str, node: str, before_attempt: int) -> Any:
        return self._open().remove_leftovers(run_dir, node, before_attempt)

    def prepare(self, request: PayloadRequest) -> None:
        self._open().prepare(request)

    def start(self, request: PayloadRequest) -> Payload:
        return self._open().start(request)


def local_main(run_dir: Path, environ: Mapping[str, str]) -> int:
    """The local backend: attempt after attempt until none follows."""
    paths = RunPaths(run_dir)
    orders = load_orders(run_dir)
    identity = process_identity(os.getpid())
    write_json(paths.local_agent, identity)
    scheduler = LocalScheduler(local_job_id(identity), paths.tombstone)
    notifier = Notifier(orders, environ)
    if (words := wait_here(orders["after"], paths, scheduler, STOP_SIGNALS)) is not None:
        return _refuse(orders, scheduler, notifier, words)
    name = os.uname().nodename
    base, restarts = int(orders["attempt_base"]), 0
    while True:
        hold_stop_signals()  # whoever sees the attempt opened may signal it, before its agent has handlers of its own
        place = Place(attempt_number(base, restarts), 0, name, 1, "127.0.0.1", None)
        book = AttemptBook(paths, orders)
        book.open(place.attempt, scheduler.job_id, [name])
        _run_as(orders, place, scheduler, environ)
        decision = book.close(place.attempt, scheduler)
        if not decision.requeue:
            _tell(notifier, decision, scheduler, place.attempt)
            return exit_code(decision)
        _pause(decision.delay_s, paths)
        restarts += 1


def _pause(seconds: float, paths: RunPaths) -> None:
    """Before the next attempt of a crash loop; a cancellation ends it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not paths.tombstone.exists():
        time.sleep(_PAUSE_TICK_S)


def finish_main(run_dir: Path, status: int, environ: Mapping[str, str]) -> int:
    """The end of the batch script: judge, record, and requeue. The scheduler's signals must not cut it short."""
    orders = load_orders(run_dir)
    scheduler = SlurmScheduler(environ)
    base = int(environ.get("ORCH_ATTEMPT_BASE", orders["attempt_base"]))
    book = AttemptBook(RunPaths(run_dir), orders)
    notifier = Notifier(orders, environ)  # before the end is written, and with it the secrets are gone
    attempt = attempt_number(base, scheduler.restart_count)
    decision = book.close(attempt, scheduler, srun_status=status)
    _tell(notifier, decision, scheduler, attempt)
    return exit_code(decision)


def _tell(notifier: Notifier, decision: Decision, scheduler: Scheduler, attempt: int | None) -> None:
    """Last of all: nothing that goes wrong here changes what was written, or the exit code."""
    if not decision.requeue and decision.reason is not ExitReason.FENCED:  # then the run is another attempt's
        notifier.tell(decision.state, decision.reason, decision.message, job_id=scheduler.job_id, attempt=attempt)


def _refuse(orders: Mapping[str, Any], scheduler: Scheduler, notifier: Notifier, words: str) -> int:
    """End a run that cannot start: what it waits for will not complete, or somebody stopped it."""
    paths = RunPaths(Path(orders["run_dir"]))
    cancelled = paths.tombstone.exists()
    reason = ExitReason.CANCELLED if cancelled else ExitReason.DEPENDENCY_FAILED
    message = reason.message if cancelled else words
    decision = AttemptBook(paths, orders).refuse(scheduler.job_id, reason, message)
    _tell(notifier, decision, scheduler, None)
    return exit_code(decision)


def ready_main(run_dir: Path, environ: Mapping[str, str], scheduler: SlurmScheduler | None = None) -> int:
    """Print the number that attempts are counted from when this run may start; else put it back, or end it."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # its own requeue, among others, sends one
    orders = load_orders(run_dir)
    paths, scheduler = RunPaths(run_dir), scheduler or SlurmScheduler(environ)
    base = int(environ.get("ORCH_ATTEMPT_BASE", orders["attempt_base"]))
    begun = any(int(entry["attempt"]) >= base for entry in (load_sidecar(paths) or {"attempts": ()})["attempts"])
    found = [] if begun else look(orders["after"], run_dir.parent, scheduler)
    jobs = [upstream.job_id for upstream in found if upstream.job_id is not None]
    if (words := blocked_by(found)) is None and jobs:
        answer = _back_to_wait(paths, found, scheduler, jobs)
        if answer.ok:
            return ExitCode.SAVED
        words = f"{found[0].run_id} goes on, and this job could not be put back into the queue: {answer.message}"
    if words is not None:
        return _refuse(orders, scheduler, Notifier(orders, environ), words)
    print(base - times_waited(read_events(paths), scheduler.job_id))
    return ExitCode.DONE


def _back_to_wait(
    paths: RunPaths, found: Sequence[Upstream], scheduler: SlurmScheduler, jobs: Sequence[str]
) -> Requeued:
    """Noted first: the restart that follows is no attempt, and the requeue may end this process."""
    events = EventLog(paths, "agent-n0")
    note_waiting(events, [upstream.run_id for upstream in found if not upstream.completed], scheduler.job_id)
    events.append("action", action="back_to_wait", job_id=scheduler.job_id)
    return scheduler.wait_for(jobs)


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="orch-agent")
    parser.add_argument("role", choices=["ready", "node", "finish", "local"])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--token", help="names a local submission in the list of processes; not read here")
    arguments = parser.parse_args(argv)
    try:
        if arguments.role == "ready":
            return ready_main(arguments.run_dir, os.environ)
        if arguments.role != "finish":
            hold_stop_signals()
        if arguments.role == "node":
            return node_main(arguments.run_dir, os.environ)
        if arguments.role == "local":
            return local_main(arguments.run_dir, os.environ)
        return finish_main(arguments.run_dir, arguments.status, os.environ)
    except (OrchError, OSError) as error:
        print(f"orch: {error}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 1)


if __name__ == "__main__":
    sys.exit(main())

"""One node's share of one attempt: PID 1 started, told what it must know, watched to its end, and the end recorded."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from orchestrator.containers.failures import OTHER_PROCESSOR, other_processor
from orchestrator.containers.payload import ENGINES, Mount, Payload, PayloadRequest, Runtime
from orchestrator.errors import OrchError, RefusedError, RegistryError
from orchestrator.files import read_json, write_json
from orchestrator.identity import rendezvous_port
from orchestrator.paths import RunPaths, is_object_store
from orchestrator.registry import EventLog
from orchestrator.states import ExitCode, ExitReason
from orchestrator.words import size
from orchestrator.worker import launch
from orchestrator.worker.decision import UNUSED
from orchestrator.worker.node import NodeDirectory, node_root
from orchestrator.worker.scheduler import Notice, Scheduler
from orchestrator.worker.watchdog import StallWatch

_TICK_S = 0.1
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127  # what a shell says, and what PID 1 says of a program it cannot start
_PEER_LOOK_S = 2.0
_PEER_GRACE_S = 10.0  # for the ranks here to say themselves why they failed
_DEADLINE_SLACK_S = 3.0  # PID 1 ends what is left so long after the deadline …
# A node may begin long after another one, which has the image already. That one is dead its peers know by themselves.
_PATIENCE = "join_timeout=1800,read_timeout=1800"
_KILL_SLACK_S = 8.0  # … and the agent ends PID 1
_FIRST_DEADLINE_S = 20.0  # until the scheduler has told the true one; the shortest grace in common use
_TERMINAL = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?)")  # CSI and OSC sequences (ECMA-48)
_LIMITS = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC, "memlock": resource.RLIMIT_MEMLOCK}
STOP_SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def hold_stop_signals() -> None:
    """Let the kernel keep what comes before the agent has its handlers; without them it would simply die of it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


@dataclass(frozen=True)
class Place:
    """Which part of which attempt this agent is."""

    attempt: int
    node: int
    node_name: str
    nodes: int
    rendezvous_host: str
    local_address: str | None


class _ToldToStop(BaseException):
    """A notice while the image is on its way. No error, which somebody on the way up could take for one of his own."""


class NodeAgent:
    """Runs one node's share of one attempt: starts PID 1, passes notices on, records the end."""

    def __init__(
        self,
        orders: Mapping[str, Any],
        place: Place,
        scheduler: Scheduler,
        runtime: Runtime,
        environ: Mapping[str, str],
    ) -> None:
        self.orders = orders
        self.place = place
        self.scheduler = scheduler
        self.runtime = runtime
        self.environ = environ
        self.paths = RunPaths(Path(orders["run_dir"]))
        self.events = EventLog(self.paths, f"agent-n{place.node}")
        self.notice: Notice | None = None
        self._signals: list[tuple[int, float]] = []  # and when each came, unix seconds
        self._preparing = False
        self.unused = False  # told to stop before there was a program
        self._peer_failed_at: float | None = None
        self._next_peer_look = 0.0
        limit_s = orders["watchdog"]["no_progress_s"]
        self._stall = None if limit_s is None else StallWatch(self.paths, place.attempt, limit_s)
        self.other_processor = False  # the image is for one that this node does not have
        self.memory: str | None = None  # what is known of a process killed for lack of memory, in words

    # --- signals
    def install_signal_handlers(self) -> None:
        """Only note what came; the loop does the work."""
        for signum in {signal.SIGTERM, signal.SIGUSR1, getattr(signal, "SIG" + self.orders["signal"])}:
            signal.signal(signum, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.take_notice(signum)
        if self._preparing:
            self._preparing = False
            raise _ToldToStop

    def take_notice(self, signum: int) -> None:
        """Note that we are to stop, and since when; PID 1 is told as soon as it is there.

        Nothing with a lock: a second signal may come while the first one's handler holds it.
        """
        self._signals.append((signum, time.time()))

    # --- life
    def run(self) -> int:
        """Block until PID 1 has ended; return its exit code. Raises OrchError when it could not be started."""
        if self.paths.tombstone.exists():  # cancelled between two attempts, when nobody was there to be told
            raise RefusedError("the run was cancelled before this attempt began")
        attempt = self.place.attempt
        self.paths.logs(attempt).mkdir(parents=True, exist_ok=True)
        leftovers = self.runtime.remove_leftovers(self.orders["run_dir"], self.place.node_name, attempt)
        if leftovers:
            self.events.append("action", attempt=attempt, action="removed_leftovers", containers=list(leftovers))
        directory = NodeDirectory(
            node_root(self.environ), f"{self.orders['run_id']}.{attempt}.n{self.place.node}.{os.getpid()}"
        )
        try:
            return self._run_in(directory)
        finally:
            directory.close()

    def _run_in(self, directory: NodeDirectory) -> int:
        shutil.copyfile(launch.__file__, directory.launcher)
        directory.write_config(self._launch_config(directory))
        request = self._request(directory)
        if not self._prepared(request):
            self._pass_on(directory)  # before what may take longer than the grace
            self._remove_unused()
            self.unused = True
            return ExitCode.SAVED
        payload = self.runtime.start(request)
        self.events.append(
            "container_started", attempt=self.place.attempt, node=self.place.node_name, **payload.describe()
        )
        try:
            return self._watch(payload, directory)
        finally:
            self._put_away(payload, directory)

    def _prepared(self, request: PayloadRequest) -> bool:
        """Have the image here; False when a notice came first: an hour's import would outlast every grace."""
        try:
            try:
                self._preparing = True
                if self._signals:
                    return False
                self.runtime.prepare(request)
            finally:
                self._preparing = False
        except _ToldToStop:
            return False
        except (OrchError, OSError):
            # One that meets a notice may be of its making; a true one is met again by the next attempt.
            if not self._signals:
                raise
            return False
        return True

    def _remove_unused(self) -> None:
        """What was prepared for nothing; the run's next attempt here would remove it as well."""
        try:
            self.runtime.remove_leftovers(self.orders["run_dir"], self.place.node_name, self.place.attempt + 1)
        except (OrchError, OSError) as error:
            self.events.append("action", attempt=self.place.attempt, action="not_removed", message=str(error))

    def _put_away(self, payload: Payload, directory: NodeDirectory) -> None:
        """What is left to do afterwards. An engine that fails only now does not change how the program ended."""
        try:
            try:
                if not directory.up.exists():
                    self._record_early_death(payload)
                self.memory = self._memory_evidence(payload, directory)
            finally:
                payload.close()
        except (OrchError, OSError) as error:
            self.events.append("action", attempt=self.place.attempt, action="not_removed", message=str(error))

    def _watch(self, payload: Payload, directory: NodeDirectory) -> int:
        while True:
            code = payload.poll()
            if code is not None:
                return code
            time.sleep(_TICK_S)
            if self._signals:
                self._pass_on(directory)
            if self._stall is not None and self.notice is None and self._stall.stalled():
                self._stop_hung(directory, self._stall.step)
            if self._peers_have_failed():
                directory.order(b"K")
            if self.notice is not None and time.time() > self.notice.deadline + _KILL_SLACK_S:
                payload.kill()

    def _pass_on(self, directory: NodeDirectory) -> None:
        """Tell PID 1 at once, with a careful deadline; then ask the scheduler why, and correct the deadline."""
        came = [self._signals.pop(0) for _ in range(len(self._signals))]  # another may come meanwhile, and stays
        names = [signal.Signals(signum).name for signum, _ in came]
        told = came[0][1]
        if self.notice is None:
            self.notice = Notice(None, time.time() + min(_FIRST_DEADLINE_S, float(self.orders["lead_time_s"])))
            directory.write_deadline(self.notice.deadline, None)
        directory.order(b"U")
        known, answer = self.notice.cause, self.scheduler.why(float(self.orders["lead_time_s"]), told)
        # A second signal may only shorten what is left, and never turns a cause we know into one we don't.
        deadline = answer.deadline if known is None else min(self.notice.deadline, answer.deadline)
        self.notice = Notice(answer.cause or known, deadline)
        cause = self.notice.cause.value if self.notice.cause is not None else None
        directory.write_deadline(deadline, cause)
        self.events.append(
            "signalled",
            attempt=self.place.attempt,
            node=self.place.node_name,
            signals=names,
            cause=cause,
            deadline=deadline,
            at=told,
            scheduler=answer.words,
            grace_end=answer.grace_end,
        )

    def _stop_hung(self, directory: NodeDirectory, step: int | None) -> None:
        """Have every rank's stack written down, then stop as at any notice: one that was only slow still saves."""
        told = time.time()
        self.notice = Notice(ExitReason.HUNG, told + float(self.orders["lead_time_s"]))
        directory.write_deadline(self.notice.deadline, ExitReason.HUNG.value)
        directory.order(b"D")
        directory.order(b"U")
        self.events.append(
            "signalled",
            attempt=self.place.attempt,
            node=self.place.node_name,
            signals=[],
            cause=ExitReason.HUNG.value,
            deadline=self.notice.deadline,
            at=told,
            step=step,
        )

    def _peers_have_failed(self) -> bool:
        """True once another node has recorded a failure and our ranks had time to end by themselves.

        Without it a rank that waits for a dead peer in a collective would hold the allocation until a time-out.
        """
        now = time.monotonic()
        if self.place.nodes == 1 or now < self._next_peer_look:
            return False
        self._next_peer_look = now + _PEER_LOOK_S
        mine = self.paths.node_verdict(self.place.attempt, self.place.node)
        others = [path for path in self.paths.node_verdicts(self.place.attempt) if path != mine]
        if self.orders["torchrun"] is None:  # commands begin one by one: one that runs has something to save
            others = [path for path in others if _has_failed(path)]
        if others and self._peer_failed_at is None:
            self._peer_failed_at = now
        return self._peer_failed_at is not None and now - self._peer_failed_at > _PEER_GRACE_S

    def _memory_evidence(self, payload: Payload, directory: NodeDirectory) -> str | None:
        """PID 1's report, or the engine's word where PID 1 itself was killed."""
        try:
            report = read_json(directory.memory_report)
        except FileNotFoundError:
            return "the kernel killed it for lack of memory" if payload.out_of_memory() else None
        limit, peak = report["limit_bytes"], report["peak_bytes"]
        at = f" at {size(peak)} of {size(limit)}" if limit is not None and peak is not None else ""
        return f"the kernel killed a process{at} (resources.mem)"

    def _record_early_death(self, payload: Payload) -> None:
        words = payload.early_output()
        self.other_processor = OTHER_PROCESSOR in words.lower()
        if words:
            with self.paths.node_log(self.place.attempt, self.place.node).open("a") as log:
                log.write(words)

    # --- what PID 1 is told
    @property
    def _contained(self) -> bool:
        return bool(self.orders["container"]["runtime"] != "none")

    @property
    def _python(self) -> str:
        """The interpreter of PID 1 and the program: the image's own, or the node's."""
        return "python3" if self._contained else str(self.orders["python"])

    def _launch_config(self, directory: NodeDirectory) -> dict[str, Any]:
        orders, attempt = self.orders, self.place.attempt
        program = list(orders["program"]["argv"])
        if orders["program"]["kind"] != "command":
            program = [self._python, *program]
        return {
            "program": program,
            "python": self._python,
            "torchrun": self._torchrun_args(directory),
            "cwd": orders["code_dir"],
            "library": orders["library_dir"],
            "defaults": self._cache_places(),
            "env": self._program_environment(directory),
            "signal": orders["signal"],
            "leash": str(directory.leash),
            "up": str(directory.up),
            "deadline_file": str(directory.deadline),
            "deadline_slack_s": _DEADLINE_SLACK_S,
            "memory_report": str(directory.memory_report),
            "contained": orders["container"]["runtime"] in ENGINES,
            "py_spy": str(py_spy()),
            "node": self.place.node,
            "verdict": str(self.paths.verdict(attempt)),
            "log_dir": str(self.paths.logs(attempt)),
            "node_log": str(self.paths.node_log(attempt, self.place.node)),
        }

    @property
    def _caches(self) -> Path:
        return self.paths.root.caches

    def _cache_places(self) -> dict[str, str]:
        """Where downloads go if neither image, set-up nor spec say so: a home directory is small, memory is dear."""
        base = self.orders["env"].get("XDG_CACHE_HOME") or str(self._caches)
        return {"XDG_CACHE_HOME": base, "HF_HOME": f"{base}/huggingface", "TORCH_HOME": f"{base}/torch"}

    def _program_environment(self, directory: NodeDirectory) -> dict[str, str]:
        orders = self.orders
        nproc = orders["torchrun"]["nproc_per_node"] if orders["torchrun"] is not None else 1
        environment = {
            # Results depend on it, so it is set and not left to the node (PROTOCOLS 2); `env:` may override it.
            "OMP_NUM_THREADS": str(max(1, (orders["cpus_per_task"] or 1) // nproc)),
            "PYTHONUNBUFFERED": "1",  # a log that ends in a killed process's buffer hides why it was killed
            "PYTHONDONTWRITEBYTECODE": "1",  # the snapshot is shared and read-only
            **orders["env"],
            **self._secrets(),
            "ORCH_RUN_ID": orders["run_id"],
            "ORCH_RUN_DIR": orders["run_dir"],
            "ORCH_ATTEMPT": str(self.place.attempt),
            "ORCH_CHECKPOINT_URI": orders["checkpoint"]["uri"],
            "ORCH_NODE": self.place.node_name,
            "ORCH_DEADLINE_FILE": str(directory.deadline),
        }
        return {key: str(value) for key, value in environment.items()}

    def _secrets(self) -> dict[str, str]:
        if not self.orders["secrets"]:
            return {}
        try:
            values = read_json(self.paths.secrets)
        except FileNotFoundError:
            raise RegistryError(
                "the secrets of this run have been removed: its submission failed, or it was to end",
                hint="`orch submit` or `orch resume` hands them over again.",
            ) from None
        return {name: values[name] for name in self.orders["secrets"]}

    def _torchrun_args(self, directory: NodeDirectory) -> list[str] | None:
        torchrun = self.orders["torchrun"]
        if torchrun is None:
            return None
        place, run_id = self.place, self.orders["run_id"]
        arguments = [
            f"--nnodes={place.nodes}",
            f"--nproc-per-node={torchrun['nproc_per_node']}",
            f"--max-restarts={torchrun['max_restarts']}",
            f"--log-dir={directory.path}",  # else every start leaves an empty directory in /tmp
        ]
        if place.nodes == 1:
            # Port 0: the kernel picks a free one, two jobs on a node cannot collide.
            return [
                *arguments,
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=127.0.0.1:0",
                f"--rdzv-id={run_id}.{place.attempt}",
            ]
        port = rendezvous_port(run_id, place.attempt, self.scheduler.job_id)
        arguments += [
            f"--rdzv-backend={torchrun['rdzv_backend']}",
            f"--rdzv-endpoint={place.rendezvous_host}:{port}",
            f"--rdzv-id={run_id}.{place.attempt}",
            f"--rdzv-conf=is_host={'1' if place.node == 0 else '0'},{_PATIENCE}",
        ]
        if place.local_address is not None:
            arguments.append(f"--local-addr={place.local_address}")
        return arguments

    def _checkpoint_places(self) -> Iterator[str]:
        """Directories for checkpoints that are not in the run directory anyway."""
        checkpoint = self.orders["checkpoint"]
        if is_object_store(checkpoint["uri"]):
            if checkpoint.get("scratch") is not None:
                yield checkpoint["scratch"]
            return
        directory = Path(checkpoint["uri"])
        if not directory.is_relative_to(self.orders["run_dir"]):
            directory.mkdir(parents=True, exist_ok=True)
            yield str(directory)

    def _request(self, directory: NodeDirectory) -> PayloadRequest:
        orders = self.orders
        container = orders["container"]
        mounts = [
            Mount(str(directory.path), str(directory.path)),
            Mount(orders["run_dir"], orders["run_dir"]),
            Mount(orders["code_dir"], orders["code_dir"], read_only=True),
            Mount(orders["library_dir"], orders["library_dir"], read_only=True),
        ]
        if self._contained:
            self._caches.mkdir(exist_ok=True)
            mounts.append(Mount(str(self._caches), str(self._caches)))
            mounts += [Mount(place, place) for place in self._checkpoint_places()]
        if self._contained and self._stall is not None and py_spy().exists():
            mounts.append(Mount(str(py_spy()), str(py_spy()), read_only=True))
        mounts += [Mount(**mount) for mount in container["mounts"]]
        return PayloadRequest(
            argv=(self._python, str(directory.launcher), str(directory.config)),
            cwd=orders["code_dir"],
            run_id=orders["run_id"],
            run_dir=orders["run_dir"],
            attempt=self.place.attempt,
            node=self.place.node_name,
            image=container["image"],
            mounts=tuple(dict.fromkeys(mounts)),  # a workspace may be our own code: one snapshot, one mount
            mem_bytes=orders["mem_bytes"],
            cpus=orders["cpus_per_task"],
            cpuset=step_cpus(),
            host_network=self.place.nodes > 1,
            verify_image=self.place.node == 0,
            images=self.paths.root.images,
            devices=infiniband() if self.place.nodes > 1 else (),
            gpus=step_gpus(orders["gpus_per_node"], self.environ),
            scratch=directory.path,
            log=self.paths.node_log(self.place.attempt, self.place.node),
            limits=step_limits(),
        )


def _has_failed(verdict: Path) -> bool:
    """Of a node; one that cannot be read now is looked at again."""
    try:
        return bool(read_json(verdict).get("outcome") != UNUSED)
    except (OSError, RegistryError):
        return False


def step_gpus(wanted: int, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs of this step as Slurm names them (srun(1)); on the local backend the first `wanted` of the machine."""
    given = environ.get("CUDA_VISIBLE_DEVICES") or environ.get("SLURM_STEP_GPUS")
    if wanted == 0:
        return ()
    return tuple(given.split(",")) if given else tuple(str(index) for index in range(wanted))


def step_cpus() -> str:
    """The CPUs that Slurm bound this step to (task/affinity, task/cgroup); "" where that is all there are."""
    mine = sorted(os.sched_getaffinity(0))
    return "" if len(mine) == os.cpu_count() else ",".join(str(cpu) for cpu in mine)


def infiniband() -> tuple[str, ...]:
    """What nodes talk through where they have it; with the host's network the devices are all that is missing."""
    return tuple(sorted(str(path) for path in Path("/dev/infiniband").glob("*")))


def step_limits() -> dict[str, int]:
    """What Slurm allows this step, so that a container is allowed no less (locked memory: InfiniBand) and no more."""
    hard = {name: resource.getrlimit(number)[1] for name, number in _LIMITS.items()}
    # An engine may cap its own limit at the number of pids there are, and cannot give more than it has.
    hard["nproc"] = min(hard["nproc"], _most_pids()) if hard["nproc"] >= 0 else _most_pids()
    return hard


def _most_pids() -> int:
    return int(Path("/proc/sys/kernel/pid_max").read_text())


def py_spy() -> Path:
    """py-spy of the interpreter that runs this agent; a static program, so that it runs in any image."""
    return Path(sys.executable).with_name("py-spy")


# --- one attempt on one node, with its records ------------------------------------------------------------------------
def run_node(agent: NodeAgent) -> int:
    """Run and leave a record, whatever happens: PID 1's exit code, or 1 with a verdict that says why it never ran."""
    place, paths = agent.place, agent.paths
    message = ""
    outcome = "failed"
    reason: str | None = None
    try:
        code = agent.run()
        message = f"node {place.node_name}: the program ended with exit code {code}{last_words(paths, place)}"
        if agent.unused:
            outcome, message = UNUSED, f"node {place.node_name}: told to stop before the program had been started"
        elif code in (_NOT_EXECUTABLE, _NOT_FOUND):
            reason = ExitReason.LAUNCH_FAILURE.value
        elif agent.other_processor:
            reason = ExitReason.LAUNCH_FAILURE.value
            message = f"node {place.node_name}: {other_processor(agent.orders['container']['image'])}"
        elif agent.memory is not None:
            reason = ExitReason.OUT_OF_MEMORY.value
            message = f"node {place.node_name}: {agent.memory}"
    except Exception as error:  # noqa: BLE001 - a fault of ours must be found in the run's story, too
        code, message = 1, _told(error)
        refused = isinstance(error, RefusedError)
        reason = (ExitReason.CANCELLED if refused else ExitReason.CONTAINER_FAILURE).value
        paths.logs(place.attempt).mkdir(parents=True, exist_ok=True)
        with paths.node_log(place.attempt, place.node).open("a") as log:
            log.write(f"orch: {message}\n")
    if agent.unused or code not in (ExitCode.DONE, ExitCode.SAVED):  # the peers need not wait for it
        verdict = {
            "outcome": outcome,
            "reason": reason,
            "node": place.node_name,
            "exit_code": code,
            "message": message,
        }
        write_json(paths.node_verdict(place.attempt, place.node), {**verdict, "time": time.time()})
    known = {"unused": True} if agent.unused else {}
    agent.events.append("verdict", attempt=place.attempt, node=place.node, exit_code=code, message=message, **known)
    return code


def _told(error: Exception) -> str:
    """What to record of an attempt that could not begin."""
    if isinstance(error, OrchError | OSError):
        hint = getattr(error, "hint", None)
        return f"{error} {hint}" if hint else str(error)
    traceback.print_exception(error)  # into the batch job's log
    return f"an error in orch itself: {type(error).__name__}: {error}"


def _plain(line: str) -> str:
    """Without what a terminal would obey: colours, cursor movements, titles."""
    return "".join(char for char in _TERMINAL.sub("", line) if char.isprintable())


def last_words(paths: RunPaths, place: Place) -> str:
    """The last line a program of this node printed: where it died without a verdict that is the best there is."""
    logs = [path for path in paths.logs(place.attempt).glob("rank-*.log") if path.stat().st_size > 0]
    if place.nodes > 1 or not logs:  # ranks of other nodes write there too
        logs = [paths.node_log(place.attempt, place.node)]
    newest = max((path for path in logs if path.exists()), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return ""
    with newest.open("rb") as log:
        log.seek(max(0, newest.stat().st_size - 4096))
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return f"; {newest.name} ends with: {_plain(lines[-1])[:300]}" if lines else ""

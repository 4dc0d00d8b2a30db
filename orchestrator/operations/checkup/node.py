"""`--node`: one short job looks at a compute node; its answers become findings."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.backends.process import Runner
from orchestrator.backends.slurm import outside_of_jobs, scheduler_words
from orchestrator.errors import BackendError
from orchestrator.operations.checkup.disk import disk_findings
from orchestrator.operations.checkup.engine import node_engine_findings
from orchestrator.operations.checkup.findings import Family, Finding, Level
from orchestrator.operations.checkup.machine import PYTHON_FIX
from orchestrator.operations.checkup.target import Target
from orchestrator.plan.render import EXPORTED
from orchestrator.words import size
from orchestrator.worker.probe.disk import SCRATCH_PREFIX, DiskFacts
from orchestrator.worker.probe.engine import EngineFacts
from orchestrator.worker.probe.node import ANSWER, NONCE, NodeFacts

_JOB_MINUTES = 2
_JOB_S = 60.0 * _JOB_MINUTES + 30
_QUESTION_S = 15.0
_LOOK_S = 2.0
_LITTLE_SHM_BYTES = 64 * 1024**2
_SETTLE_S = 10.0  # an NFS client may show a file of another node only after its attribute cache has aged


@dataclass(frozen=True)
class NodeAnswer:
    """`error` and `fix`: why there are no facts. `met`: the answer of the node was seen here."""

    node: NodeFacts | None = None
    disks: tuple[DiskFacts, ...] = ()
    engine: EngineFacts | None = None
    met: bool = False
    error: str = ""
    fix: str = ""

    @property
    def host(self) -> str | None:
        """The node that was seen to share the directory."""
        return None if self.node is None or not self.met else self.node.host


def ask_node(target: Target, root: DiskFacts | None, *, start_s: float, run: Runner) -> NodeAnswer:
    """Run the job to its end, waiting `start_s` seconds for its start. Leaves no job and no file behind.

    `root`: what the root's file system did here. One that gave no answer is not touched.
    """
    if root is None:
        return NodeAnswer(error=f"no job was started: the file system of {target.root} gives no answer here")
    nonce = os.urandom(6).hex()
    meeting = Path(root.tried) / f"{SCRATCH_PREFIX}{nonce}"
    try:
        meeting.mkdir(mode=0o700)
        (meeting / NONCE).write_text(nonce)
    except OSError as error:
        return NodeAnswer(error=f"no job was started: {meeting.parent} cannot be written ({error.strerror})")
    try:
        disks = [str(place) for place in (target.root, target.checkpoints) if place is not None]
        engine = target.runtime if target.contained else None
        wanted = {"meeting": str(meeting), "nonce": nonce, "engine": engine, "image": target.image}
        request = json.dumps({"disks": disks, "node": wanted})
        answer = _read(_Job(target, f"orch-doctor-{nonce}", request, run).wait(start_s), target)
        return answer if answer.node is None else replace(answer, met=_met(meeting, nonce))
    except OSError as error:
        return NodeAnswer(error=f"no job was started: srun: {error.strerror}", fix="is srun in PATH?")
    finally:
        shutil.rmtree(meeting, ignore_errors=True)


def _met(meeting: Path, nonce: str) -> bool:
    until = time.monotonic() + _SETTLE_S
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            os.listdir(meeting)  # noqa: PTH208 - makes an NFS client look again
            return (meeting / ANSWER).read_text() == nonce
        time.sleep(0.2)
    return False


@dataclass(frozen=True)
class _Ended:
    returncode: int
    stdout: str
    stderr: str
    pending: str | None = None  # why it did not start in time


class _Job:
    """One srun: its output comes back without the shared disk, which is what is being examined."""

    def __init__(self, target: Target, name: str, request: str, run: Runner) -> None:
        self._name = name
        self._run = run
        argv = node_command(target, name, request)
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=outside_of_jobs(os.environ),
            start_new_session=True,
        )

    def wait(self, start_s: float) -> _Ended:
        """Until it has ended; cancelled when it does not start, or does not end, in time."""
        began, started = time.monotonic(), None
        try:
            while True:
                try:
                    stdout, stderr = self._process.communicate(timeout=_LOOK_S)
                    return _Ended(self._process.returncode, stdout, stderr)
                except subprocess.TimeoutExpired:
                    now = time.monotonic()
                if started is None and self._state()[0] not in ("", "PENDING"):
                    started = now
                if started is None and now - began > start_s:
                    return _Ended(1, "", "", pending=self._state()[1] or "no reason given")
                if started is not None and now - started > _JOB_S:
                    return _Ended(1, "", f"the job did not end within {_JOB_S:.0f} s of its start")
        finally:
            self._clear()

    def _state(self) -> tuple[str, str]:
        """(state, reason) as squeue has it; empty where it cannot say."""
        try:
            answer = self._run(["squeue", "--me", "-h", f"--name={self._name}", "-o", "%T|%r"], timeout_s=_QUESTION_S)
        except BackendError:
            return "", ""
        state, _, reason = answer.stdout.strip().partition("|")
        return state, reason

    def _clear(self) -> None:
        """No job and no srun stays, whatever happened; Ctrl-C included."""
        if self._process.poll() is None:
            with contextlib.suppress(BackendError):  # a scheduler that has gone silent: srun's end ends its job, too
                self._run(["scancel", "--me", f"--name={self._name}"], timeout_s=_QUESTION_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()


def node_command(target: Target, name: str, request: str) -> list[str]:
    """The srun, placed like the run and with the environment that a run gets."""
    placing = [f"--{key}={value}" for key, value in target.placing.items()]
    gpus = ["--gpus-per-node=1"] if target.gpus_per_node else []
    return [
        "srun", f"--job-name={name}", "--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--mem=300M",
        f"--time={_JOB_MINUTES}", "--chdir=/", f"--export={','.join(EXPORTED)}", "--input=none", *placing, *gpus,
        target.python, "-m", "orchestrator.worker.probe", request,
    ]  # fmt: skip


def _read(ended: _Ended, target: Target) -> NodeAnswer:
    if ended.pending is not None:
        message = f"the job did not start in time ({ended.pending}) and was cancelled"
        return NodeAnswer(error=message, fix="wait longer (--timeout 10m), or choose another partition")
    line = next((line for line in reversed(ended.stdout.splitlines()) if line.startswith('{"disks"')), None)
    if line is not None:
        return _facts(line)
    words = _last_words(ended) or f"srun ended with exit code {ended.returncode}"
    if "ImportError" in words or "No module named" in words:
        return NodeAnswer(error=f"{target.python} does not run orch on the node: {words}", fix=PYTHON_FIX)
    if "No such file or directory" in words and target.python in words:
        fix = "slurm.python (site profile: python) must be there on every node, under the same path"
        return NodeAnswer(error=f"{target.python} is not on the node", fix=fix)
    return NodeAnswer(error=f"the job on a node failed: {words[-400:]}", fix="these are Slurm's own words")


def _facts(line: str) -> NodeAnswer:
    try:
        raw = json.loads(line)
        node = NodeFacts(**{**raw["node"], "gpus_named": tuple(raw["node"]["gpus_named"])})
        engine = EngineFacts(**raw["engine"]) if "engine" in raw else None
        return NodeAnswer(node, tuple(DiskFacts(**disk) for disk in raw["disks"]), engine)
    except (ValueError, KeyError, TypeError):
        return NodeAnswer(error="the orch on the node answers otherwise than this one", fix="install the same version")


def _last_words(ended: _Ended) -> str:
    """What the program said last; Slurm's words where it never ran."""
    own = [line for line in ended.stderr.splitlines() if line.strip() and not line.startswith(("srun:", "slurm"))]
    return own[-1].strip() if own else scheduler_words(ended.stderr)


# --- findings -------------------------------------------------------------------------------------------------------
def node_findings(target: Target, answer: NodeAnswer) -> Iterator[Finding]:
    """Everything a compute node has said, or why it said nothing."""
    facts = answer.node
    if facts is None:
        yield Finding("node", Level.BAD, answer.error, answer.fix or None)
        return
    where = f"{facts.host}: "
    yield Finding("node", Level.OK, f"{where}{facts.python} is Python {facts.version}, and orch runs there")
    yield _meeting(target, facts, answer.met, where)
    for topic, disk in zip(("root", "checkpoints"), answer.disks, strict=False):
        yield from disk_findings(topic, disk, where=where)
    yield _scontrol(facts, where)
    yield _node_directory(facts, where)
    if target.gpus_per_node:
        yield _gpus(facts, where)
    if answer.engine is not None:
        yield from node_engine_findings(target, answer.engine, where)


def _meeting(target: Target, facts: NodeFacts, met: bool, where: str) -> Finding:
    if met and not facts.meeting_error:
        message = f"{where}sees {target.root} as the same directory: a file written here was read there and answered"
        return Finding("node", Level.OK, message, None, Family.DISK)
    why = facts.meeting_error or "its answer did not come to be seen here"
    message = f"{where}{target.root} is not the same directory there ({why})"
    fix = "put the root on the shared disk, under the same path everywhere"
    return Finding("node", Level.BAD, message, fix, Family.DISK)


def _scontrol(facts: NodeFacts, where: str) -> Finding:
    if not facts.scontrol_error:
        return Finding(
            "node", Level.OK, f"{where}scontrol answers there: the run can ask why it is stopped, and requeue itself"
        )
    message = (
        f"{where}scontrol cannot be asked there ({facts.scontrol_error}): a run does not learn why it is stopped, and "
        "is not requeued"
    )
    return Finding(
        "node", Level.BAD, message, "the administrator: Slurm's commands on the nodes, in PATH; or slurm.setup"
    )


def _node_directory(facts: NodeFacts, where: str) -> Finding:
    shm = f"/dev/shm holds {size(facts.shm_bytes)}"
    if facts.node_dir_error:
        message = f"{where}{facts.node_dir} cannot be used: {facts.node_dir_error} ({shm})"
        return Finding("node", Level.BAD, message, "set ORCH_NODE_DIR on the nodes to a local directory", Family.DISK)
    if facts.shm_bytes < _LITTLE_SHM_BYTES:
        message = f"{where}{shm}: data loaders with workers may stop with a bus error"
        return Finding("node", Level.WARN, message, "the administrator: a larger /dev/shm", Family.DISK)
    return Finding("node", Level.OK, f"{where}{shm}; node directory {facts.node_dir} works", None, Family.DISK)


def _gpus(facts: NodeFacts, where: str) -> Finding:
    fix = "the administrator: driver on the node, gres.conf (File=/dev/nvidia0 … or AutoDetect=nvml)"
    given = f"{where}Slurm gives {facts.gpus_counted} GPU{'' if facts.gpus_counted == 1 else 's'}"
    if not facts.gpus_named:
        message = f"{given} without saying which (no CUDA_VISIBLE_DEVICES): jobs on the node may take each other's"
        return Finding("gpus", Level.WARN, message, fix)
    given += f" ({', '.join(facts.gpus_named)})"
    if facts.gpus_seen is None:
        return Finding("gpus", Level.WARN, f"{given}, but the node has no nvidia-smi to see it with", fix)
    if facts.gpus_seen < facts.gpus_counted:
        return Finding("gpus", Level.BAD, f"{given}, and nvidia-smi shows {facts.gpus_seen}", fix)
    return Finding("gpus", Level.OK, f"{given}, nvidia-smi shows {facts.gpus_seen}")

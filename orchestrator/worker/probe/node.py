"""A compute node as a job of this user sees it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.worker.node import node_name, node_root
from orchestrator.worker.scheduler import run_command

NONCE, ANSWER = "nonce", "answer"
_QUESTION_S = 15.0


@dataclass(frozen=True)
class NodeFacts:
    """Errors are "" where all is well. `gpus_seen`: None without nvidia-smi."""

    host: str
    python: str
    version: str
    meeting_error: str  # of reading the file that was written where orch runs
    node_dir: str
    node_dir_error: str
    shm_bytes: int
    scontrol_error: str
    gpus_counted: int  # by Slurm
    gpus_named: tuple[str, ...]  # which ones, in the words of CUDA_VISIBLE_DEVICES
    gpus_seen: int | None


def probe_node(meeting: Path, nonce: str, environ: Mapping[str, str], *, node_dir_error: str) -> NodeFacts:
    """Look at everything an attempt needs here. `meeting` is a directory that `orch` made where it was called."""
    return NodeFacts(
        host=node_name(environ),
        python=sys.executable,
        version=".".join(map(str, sys.version_info[:3])),
        meeting_error=meet(meeting, nonce),
        node_dir=str(node_root(environ)),
        node_dir_error=node_dir_error,
        shm_bytes=_size_bytes("/dev/shm"),
        scontrol_error=_scontrol_error(environ),
        gpus_counted=int(environ.get("SLURM_GPUS_ON_NODE") or 0),
        gpus_named=_gpus_named(environ),
        gpus_seen=_gpus_seen(),
    )


def meet(meeting: Path, nonce: str) -> str:
    """Read what was written there, and answer; "" if it is the same directory."""
    try:
        found = (meeting / NONCE).read_text()
        (meeting / ANSWER).write_text(nonce)
    except OSError as error:
        return f"{error.strerror or error}"
    return "" if found == nonce else "it holds something else"


def _size_bytes(path: str) -> int:
    try:
        space = os.statvfs(path)
    except OSError:
        return 0
    return space.f_blocks * space.f_frsize


def _scontrol_error(environ: Mapping[str, str]) -> str:
    code, output = run_command(["scontrol", "show", "job", "-o", environ.get("SLURM_JOB_ID", "")], _QUESTION_S)
    if code != 0:
        return " ".join(output.split()) or f"exit code {code}"
    return "" if "JobState=RUNNING" in output else "it does not show this job as running"


def _gpus_named(environ: Mapping[str, str]) -> tuple[str, ...]:
    given = environ.get("CUDA_VISIBLE_DEVICES") or environ.get("SLURM_STEP_GPUS") or ""
    return tuple(given.split(",")) if given else ()


def _gpus_seen() -> int | None:
    if shutil.which("nvidia-smi") is None:
        return None
    code, output = run_command(["nvidia-smi", "-L"], _QUESTION_S)
    return sum(line.startswith("GPU ") for line in output.splitlines()) if code == 0 else 0

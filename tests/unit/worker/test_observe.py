"""What a rank uses, and how the observer ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.worker.observe import Gpu, parse_gpus, rank_line
from orchestrator.worker.ranks import Process, own_process
from tests.polling import poll

GPUS = """\
0, GPU-6b0c3a52-5d4f-8bd6-1b0a-9c7a0a8f3d11, 97
1, GPU-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0, [N/A]
"""
APPS = """\
4242, GPU-6b0c3a52-5d4f-8bd6-1b0a-9c7a0a8f3d11, 30518
4243, GPU-0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0, [N/A]
99, GPU-6b0c3a52-5d4f-8bd6-1b0a-9c7a0a8f3d11, 512
"""


def test_gpus_are_known_by_index_and_by_who_computes_on_them() -> None:
    assert parse_gpus(GPUS, APPS) == [
        Gpu(0, 97, {4242: 30518 * 2**20, 99: 512 * 2**20}),
        Gpu(1, None, {4243: None}),
    ]


@pytest.mark.parametrize("words", ["", "No devices were found\n", "NVIDIA-SMI has failed because it couldn't …\n"])
def test_other_words_of_nvidia_smi_are_no_gpus(words: str) -> None:
    assert parse_gpus(words, words) == []


def test_a_rank_has_the_gpus_of_its_processes_and_their_cpu() -> None:
    members = [Process(4242, 1, 0), Process(4243, 4242, 0)]
    line = rank_line("n1", 0, members, {4242: 50.0, 4243: 75.26}, parse_gpus(GPUS, APPS))
    assert (line["pid"], line["processes"], line["cpu_percent"]) == (4242, 2, 125.3)
    assert line["gpus"] == [
        {"index": 0, "percent": 97, "bytes": 30518 * 2**20},
        {"index": 1, "percent": None, "bytes": 0},
    ]
    eight = [Gpu(index, 100, {4242: 80 * 2**30}) for index in range(8)]
    longest = json.dumps(rank_line("n" * 60, 12345, members, {}, eight), separators=(",", ":"))
    assert len(longest) < 1000, "srun may tear what is longer than 1024 bytes"


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run with an agent and one rank."""
    directory = tmp_path / f"job-{uuid.uuid4().hex[:10]}"
    directory.mkdir()
    node = os.uname().nodename
    environ = {**os.environ, "ORCH_RUN_DIR": str(directory), "ORCH_NODE": node, "RANK": "0"}
    environ.pop("SLURMD_NODENAME", None)
    package = tmp_path / "agent" / "orchestrator" / "worker"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "agent.py").write_text("import time; time.sleep(120)")
    agent = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.worker.agent", "local", str(directory)], cwd=tmp_path / "agent"
    )
    with agent, subprocess.Popen([sys.executable, "-c", "while True: pass"], env=environ) as rank:
        poll(lambda: own_process(str(directory), node, 0) is not None, "the rank")
        yield directory
        rank.kill()
        agent.kill()


def observer(run_dir: Path) -> subprocess.Popen[str]:
    environ = {name: value for name, value in os.environ.items() if name != "SLURMD_NODENAME"}
    argv = [sys.executable, "-X", "importtime", "-m", "orchestrator.worker.observe", str(run_dir), "--interval=0.5"]
    return subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    )


def test_it_tells_what_ranks_use_and_ends_with_its_standard_input(run_dir: Path) -> None:
    with observer(run_dir) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        rank, end = (json.loads(process.stdout.readline()) for _ in range(2))
        assert (rank["kind"], rank["rank"], rank["processes"]) == ("rank", 0, 1)
        assert rank["cpu_percent"] > 5
        assert rank["rss_bytes"] > 1_000_000
        assert (end["kind"], end["ranks"]) == ("end", 1)
        process.stdin.close()
        assert process.wait(60) == 0
        imported = process.stderr.read()
    for slow in ("torch", "docker", "pydantic", "yaml", "submitit", "asyncio"):
        assert f" {slow}\n" not in imported


def test_a_drills_signal_is_not_meant_for_it_and_its_agents_end_is(run_dir: Path) -> None:
    with observer(run_dir) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(10)
        process.stdout.readline()
        assert process.poll() is None
        (agent,) = (
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if f"worker.agent\0local\0{run_dir}\0".encode() in _read(path)
        )
        os.kill(agent, 9)
        assert process.wait(60) == 0
        process.stdin.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""

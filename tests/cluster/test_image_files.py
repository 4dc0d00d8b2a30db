"""Runs whose container is a file: the life of a run below real Slurm, with a stub in the place of apptainer.

The stub starts the program without any container, so nothing here shows that an image works; what is shown is that the
command is one that the real program's pages allow, and that notices, saves, ends and leftovers are right around it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import processes
from tests.cluster.handle import Cluster
from tests.cluster.orch import Orch
from tests.cluster.programs import script_spec

STUBS = Path(__file__).parent / "stubs"


@pytest.fixture
def image(orch: Orch) -> Path:
    path = orch.directory / "train.sqsh"
    path.write_bytes(b"squashed")
    return path


def pinned(path: Path) -> str:
    return f"{path}@sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def spec(orch: Orch, image: Path, **changes: Any) -> dict[str, Any]:
    setup = [
        f"export ORCH_NODE_DIR={orch.directory}/node",
        f"export ORCH_STUB_LOG={orch.directory}/calls.jsonl",
        f'export ORCH_STUB_PATH="{Path(sys.executable).parent}:$PATH"',
        f'export PATH="{STUBS}:$PATH"',
    ]
    slurm = {"partition": "low", "setup": setup}
    return script_spec(orch, container={"runtime": "apptainer", "image": pinned(image)}, slurm=slurm, **changes)


def calls(orch: Orch) -> list[list[str]]:
    return [json.loads(line) for line in (orch.directory / "calls.jsonl").read_text().splitlines()]


def test_preempted_resumed_and_finished(orch: Orch, cluster: Cluster, image: Path) -> None:
    run = orch.submit(spec(orch, image))["run_id"]
    orch.wait_for_step(run, 5)
    cluster.preempt(nodes=3, seconds=1)
    orch.wait_for_step(run, 1, attempt=1)
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed")
    first, second = orch.attempts(run)
    assert (first["exit_reason"], second["exit_reason"]) == ("preempted", "completed")
    assert second["step_start"] == first["step_end"], "no step is lost or repeated"
    assert [event["runtime"] for event in orch.events(run, "container_started")] == ["apptainer"] * 2
    assert len(calls(orch)) == 2
    for call in calls(orch):
        assert any(str(image) in word and "@" not in word for word in call)
    assert processes.of_run(run) == []


def test_without_its_agent_it_ends_by_its_leash(orch: Orch, cluster: Cluster, image: Path) -> None:
    run = orch.submit(spec(orch, image))["run_id"]
    orch.wait_for_step(run, 45)
    (agent,) = processes.agents(orch.run_dir(run))
    os.kill(agent, signal.SIGKILL)
    orch.wait_for_step(run, 1, attempt=1, timeout=120)
    assert orch.attempts(run)[0]["exit_reason"] == "node_failure"
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed")
    assert processes.of_run(run) == []


def test_another_file_under_the_same_name_is_not_run(orch: Orch, cluster: Cluster, image: Path) -> None:
    given = spec(orch, image)
    image.write_bytes(b"another")
    run = orch.submit(given)["run_id"]
    status = orch.wait_for_state(run, "failed", timeout=120)
    assert status["exit_reason"] == "container_failure"
    assert "is not the one that was pinned" in json.dumps(orch.events(run, "verdict"))
    assert not (orch.directory / "calls.jsonl").exists()

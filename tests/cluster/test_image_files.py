"""Runs whose container is a file: the life of a run below real Slurm, with stubs in the place of apptainer and enroot.

A stub starts the program without any container, so nothing here shows that an image works; what is shown is that the
commands are ones that the real program's pages allow, and that notices, saves, ends and leftovers are right around it.
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
HASH = "0123456789abcdef" * 4


@pytest.fixture
def image(orch: Orch) -> Path:
    path = orch.directory / "train.sqsh"
    path.write_bytes(b"squashed")
    return path


def pinned(path: Path) -> str:
    return f"{path}@sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.fixture(params=["apptainer", "pyxis"])
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def spec(orch: Orch, runtime: str, image: str, **changes: Any) -> dict[str, Any]:
    setup = [
        f"export ENROOT_DATA_PATH={orch.directory}/unpacked",
        f"export ORCH_STUB_LOG={orch.directory}/calls.jsonl",
        f'export ORCH_STUB_PATH="{Path(sys.executable).parent}:$PATH"',
        f'export PATH="{STUBS}:$PATH"',
    ]
    if runtime == "apptainer":  # it mounts nothing below /dev
        setup.append(f"export ORCH_NODE_DIR={orch.directory}/node")
    slurm = {"partition": "low", "setup": setup}
    return script_spec(orch, container={"runtime": runtime, "image": image}, slurm=slurm, **changes)


def calls(orch: Orch, command: str) -> list[list[str]]:
    log = orch.directory / "calls.jsonl"
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [call for call in found if call[0] == command]


def unpacked(orch: Orch) -> list[Path]:
    """What enroot has in its store; apptainer has none."""
    return list((orch.directory / "unpacked").glob("*"))


@pytest.mark.parametrize("kind", ["file", "registry"])
def test_preempted_resumed_and_finished(orch: Orch, cluster: Cluster, image: Path, runtime: str, kind: str) -> None:
    """Of a registry's image the cluster imports one file, for both attempts."""
    pin = pinned(image) if kind == "file" else f"ghcr.io/lab/train@sha256:{HASH}"
    run = orch.submit(spec(orch, runtime, pin))["run_id"]
    orch.wait_for_step(run, 5)
    cluster.preempt(nodes=3, seconds=1)
    orch.wait_for_step(run, 1, attempt=1)
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed")
    first, second = orch.attempts(run)
    assert (first["exit_reason"], second["exit_reason"]) == ("preempted", "completed")
    assert second["step_start"] == first["step_end"], "no step is lost or repeated"
    assert [event["runtime"] for event in orch.events(run, "container_started")] == [runtime] * 2
    starts = calls(orch, "exec" if runtime == "apptainer" else "create")
    suffix = ".sif" if runtime == "apptainer" else ".sqsh"
    file = image if kind == "file" else orch.root / "images" / f"{HASH}{suffix}"
    assert len(starts) == 2
    assert all(str(file) in call for call in starts)
    assert len(calls(orch, "pull" if runtime == "apptainer" else "import")) == (kind == "registry")
    assert processes.of_run(run) == []
    assert unpacked(orch) == []


def test_without_its_agent_it_ends_by_its_leash(orch: Orch, cluster: Cluster, image: Path, runtime: str) -> None:
    run = orch.submit(spec(orch, runtime, pinned(image)))["run_id"]
    orch.wait_for_step(run, 45)
    (agent,) = processes.agents(orch.run_dir(run))
    os.kill(agent, signal.SIGKILL)
    orch.wait_for_step(run, 1, attempt=1, timeout=120)
    assert orch.attempts(run)[0]["exit_reason"] == "node_failure"
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed")
    assert processes.of_run(run) == []
    assert unpacked(orch) == [], "the second attempt removes what the first one left, and its own"


def test_another_file_under_the_same_name_is_not_run(orch: Orch, cluster: Cluster, image: Path, runtime: str) -> None:
    given = spec(orch, runtime, pinned(image))
    image.write_bytes(b"another")
    run = orch.submit(given)["run_id"]
    status = orch.wait_for_state(run, "failed", timeout=120)
    assert status["exit_reason"] == "container_failure"
    assert "is not the one that was pinned" in json.dumps(orch.events(run, "verdict"))
    assert calls(orch, "exec") == calls(orch, "create") == []


def test_a_notice_during_an_import_is_heard_at_once(orch: Orch, cluster: Cluster, runtime: str) -> None:
    """On a partition whose preempted jobs Slurm does not requeue: an agent that did not listen would lose the run."""
    given = spec(orch, runtime, f"ghcr.io/lab/slow@sha256:{HASH}")
    given["slurm"]["partition"] = "cancel"
    run = orch.submit(given)["run_id"]
    cluster.wait("the import to begin", (orch.directory / "calls.jsonl.slow").exists, timeout=60)
    cluster.preempt(nodes=3, seconds=1)
    orch.wait_for_step(run, 1, attempt=1, timeout=120)
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed")
    first, second = orch.attempts(run)
    assert (first["exit_reason"], first["message"]) == (
        "preempted",
        "preempted before the program had been started",
    )
    assert first["ended"] - orch.events(run, "signalled")[0]["at"] < 20, "the grace"
    assert second["exit_reason"] == "completed"
    assert processes.of_run(run) == []
    assert [path.name for path in (orch.root / "images").glob(".orch-import-*")] == []


def test_what_no_registry_gives_ends_the_run_with_its_words(orch: Orch, cluster: Cluster, runtime: str) -> None:
    pin = f"ghcr.io/lab/absent@sha256:{HASH}"
    run = orch.submit(spec(orch, runtime, pin))["run_id"]
    assert orch.wait_for_state(run, "failed", timeout=120)["exit_reason"] == "container_failure"
    told = json.dumps(orch.events(run, "verdict"))
    assert f"cannot pull {pin} on node" in told
    assert "manifest unknown" in told
    assert list((orch.root / "images").glob(f"{HASH}.*")) == []

"""The examples of the documentation, as they stand: interrupted once, they end as if nothing had happened."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from orchestrator.integrations.lightning.atomic_io import verify
from orchestrator.paths import RunPaths
from tests.integration.forked import TIMEOUT_S, Interruption, outputs, run_ranks
from tests.integration.toy import verdict

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def execute(example: Path) -> None:
    torch.set_num_threads(1)
    runpy.run_path(str(example), run_name="__main__")


def execute_and_stop(example: Path, run_dir: Path, number: int = signal.SIGUSR1) -> None:
    Interruption(run_dir, attempt=0, step=1, number=number).watch()
    execute(example)


@pytest.mark.parametrize("name", ["plain_torch.py", "plain_lightning.py"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "async"])
def test_example(tmp_path: Path, name: str, world_size: int, asynchronous: bool) -> None:
    example, untouched, stopped = EXAMPLES / name, tmp_path / "untouched", tmp_path / "stopped"
    if asynchronous:
        plan = RunPaths(stopped).agent_plan
        plan.parent.mkdir(parents=True)
        plan.write_text(json.dumps({"checkpoint": {"every_steps": 1, "async": True}}))
    run = partial(execute, example)
    assert set(run_ranks(run, untouched, world_size=world_size, attempt=0)) == {0}, outputs(untouched, 0)
    interrupted = partial(execute_and_stop, example, stopped)
    codes = run_ranks(interrupted, stopped, world_size=world_size, attempt=0)
    assert set(codes) == {0}, outputs(stopped, 0)
    assert verdict(stopped, 0)["outcome"] == "saved", outputs(stopped, 0)
    assert set(run_ranks(run, stopped, world_size=world_size, attempt=1)) == {0}, outputs(stopped, 1)
    finals = [torch.load(run_dir / "final.pt", weights_only=True) for run_dir in (untouched, stopped)]
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])


def alone(program: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """A python process that nothing of orch has started: none of its variables, a working directory of its own."""
    directory.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ORCH_", "SLURM_"))}
    environment = {**kept, "PYTHONPATH": str(EXAMPLES.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"from tests.integration.test_examples import *; {program}"]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_without_the_rest_of_orch(tmp_path: Path, number: int) -> None:
    """Plain Lightning with the plugin, twice; then the callback goes on from its files, is stopped, and goes on."""
    untouched, stopped = tmp_path / "untouched", tmp_path / "stopped"
    plain = "execute(EXAMPLES / 'safe_checkpoints.py')"
    for _ in range(2):
        done = alone(plain, untouched)
        assert done.returncode == 0, done.stderr
    assert "Restored all states" in done.stderr
    assert verify(untouched / "checkpoints" / "last.ckpt")
    shutil.copytree(untouched, stopped)
    ours = "execute(EXAMPLES / 'start_from.py')"
    done = alone(ours, untouched)
    assert done.returncode == 0, done.stderr
    assert "checkpoints/last.ckpt" in done.stderr
    assert "Not carried over" in done.stderr
    done = alone(f"execute_and_stop(EXAMPLES / 'start_from.py', Path('run'), {int(number)})", stopped)
    assert done.returncode == 75, done.stderr
    assert verdict(stopped / "run", 0)["outcome"] == "saved"
    done = alone(ours, stopped)
    assert done.returncode == 0, done.stderr
    assert "Not carried over" not in done.stderr
    finals = [torch.load(run_dir / "run" / "final.pt", weights_only=True) for run_dir in (untouched, stopped)]
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])
    rows = [(run_dir / "run" / "metrics.csv").read_text() for run_dir in (untouched, stopped)]
    assert rows[0] == rows[1]
    assert rows[0].splitlines()[1].startswith("17,")  # the step after the two epochs of plain Lightning

"""The examples of the documentation, as they stand: interrupted once, they end as if nothing had happened."""

from __future__ import annotations

import runpy
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.integration.forked import Interruption, outputs, run_ranks
from tests.integration.toy import verdict

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def execute(example: Path) -> None:
    torch.set_num_threads(1)
    runpy.run_path(str(example), run_name="__main__")


def execute_and_stop(example: Path, run_dir: Path) -> None:
    Interruption(run_dir, attempt=0, step=1, number=signal.SIGUSR1).watch()
    execute(example)


@pytest.mark.parametrize("name", ["plain_torch.py", "plain_lightning.py"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_example(tmp_path: Path, name: str, world_size: int) -> None:
    example, untouched, stopped = EXAMPLES / name, tmp_path / "untouched", tmp_path / "stopped"
    run = partial(execute, example)
    assert set(run_ranks(run, untouched, world_size=world_size, attempt=0)) == {0}, outputs(untouched, 0)
    interrupted = partial(execute_and_stop, example, stopped)
    codes = run_ranks(interrupted, stopped, world_size=world_size, attempt=0)
    assert set(codes) == {0}, outputs(stopped, 0)
    assert verdict(stopped, 0)["outcome"] == "saved", outputs(stopped, 0)
    assert set(run_ranks(run, stopped, world_size=world_size, attempt=1)) == {0}, outputs(stopped, 1)
    finals = [torch.load(run_dir / "final.pt", weights_only=True) for run_dir in (untouched, stopped)]
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])

"""The examples of the documentation, as they stand: interrupted once, they end as if nothing had happened."""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.integration.forked import outputs, run_ranks
from tests.integration.toy import verdict

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def execute(example: Path) -> None:
    torch.set_num_threads(1)
    runpy.run_path(str(example), run_name="__main__")


class WhenItRuns:
    """Signals the first rank as soon as it has reported a step."""

    def __init__(self, run_dir: Path) -> None:
        self._progress, self._sent = run_dir / "progress.json", False

    def __call__(self, pids: Sequence[int]) -> None:
        if not self._sent and self._progress.exists():
            self._sent = True
            os.kill(pids[0], signal.SIGUSR1)


# The Lightning example's trainer has one device; test_exact_loops.py runs several.
@pytest.mark.parametrize(
    ("name", "world_size"), [("plain_torch.py", 1), ("plain_torch.py", 2), ("plain_lightning.py", 1)]
)
def test_example(tmp_path: Path, name: str, world_size: int) -> None:
    example, untouched, stopped = EXAMPLES / name, tmp_path / "untouched", tmp_path / "stopped"
    run = partial(execute, example)
    assert set(run_ranks(run, untouched, world_size=world_size, attempt=0)) == {0}, outputs(untouched, 0)
    codes = run_ranks(run, stopped, world_size=world_size, attempt=0, watch=WhenItRuns(stopped))
    assert set(codes) == {0}, outputs(stopped, 0)
    assert verdict(stopped, 0)["outcome"] == "saved", outputs(stopped, 0)
    assert set(run_ranks(run, stopped, world_size=world_size, attempt=1)) == {0}, outputs(stopped, 1)
    finals = [torch.load(run_dir / "final.pt", weights_only=True) for run_dir in (untouched, stopped)]
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])

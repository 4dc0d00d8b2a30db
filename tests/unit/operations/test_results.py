"""Small judgements in what the operations return."""

from __future__ import annotations

import pytest

from orchestrator.operations.results import Progress


@pytest.mark.parametrize(
    ("seconds", "straggler"),
    [
        ((), None),
        ((0.5,), None),
        ((0.10, 0.11, 0.12, 0.13), None),
        ((0.10, 0.30, 0.10, 0.11), (1, 0.30, 0.10)),
        ((0.001, 0.004), None),  # nobody waits for milliseconds
    ],
)
def test_a_straggler_stands_out(seconds: tuple[float, ...], straggler: tuple[int, float, float] | None) -> None:
    assert Progress(rank_seconds=seconds).straggler == straggler

"""Bit for bit: what two runs of one spec must have in common at the end, whatever happened to them on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def assert_same_run(untouched: Path, other: Path) -> None:
    """Exported weights, last checkpoint (weights, optimizer, schedule, loop counters), every row of metrics.csv."""
    assert_same_tree(_export(untouched), _export(other), "exported weights")
    assert_same_tree(_state(untouched), _state(other), "last checkpoint")
    assert (untouched / "metrics.csv").read_text() == (other / "metrics.csv").read_text()


def _export(run_dir: Path) -> Any:
    return torch.load(run_dir / "exported_models" / "exported_last.pt", weights_only=True)


def _state(run_dir: Path) -> dict[str, Any]:
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")}


def assert_same_tree(one: Any, other: Any, what: str) -> None:
    """Equal keys, equal values, tensors equal in type and in every bit."""
    left, right = dict(_leaves(one)), dict(_leaves(other))
    assert left.keys() == right.keys(), f"{what}: {sorted(left.keys() ^ right.keys())}"
    assert left, f"{what}: empty"
    different = [path for path in left if not _same(left[path], right[path])]
    assert not different, f"{what}: {len(different)} of {len(left)} differ, first {different[0]}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        same_type = isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return same_type and one.contiguous().view(-1).view(torch.uint8).equal(
            other.contiguous().view(-1).view(torch.uint8)
        )
    return bool(one == other)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{path}/{index}")
    else:
        yield path, tree

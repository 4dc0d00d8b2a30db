"""Which file a run begins with that has none of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.errors import CheckpointError
from orchestrator.integrations.lightning.starting_point import check_content, find_checkpoint, starting_point
from orchestrator.worker.session import Session


def touch(directory: Path, *names: str) -> None:
    """Each a second newer than the one before."""
    for age, name in enumerate(names):
        (directory / name).touch()
        os.utime(directory / name, (1000 + age, 1000 + age))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["hpc_ckpt_10.ckpt", "hpc_ckpt_9.ckpt", "hpc_ckpt_2.ckpt", "last.ckpt"], "hpc_ckpt_10.ckpt"),
        (["hpc_ckpt_3.ckpt", "hpc_ckpt_03.ckpt"], "hpc_ckpt_03.ckpt"),
        (["hpc_ckpt_03.ckpt", "hpc_ckpt_3.ckpt"], "hpc_ckpt_3.ckpt"),
        (["hpc_ckpt_1.ckpt", "hpc_ckpt_1.ckpt.json", "hpc_ckpt_2.ckpt.json", "hpc_ckpt_9.tmp"], "hpc_ckpt_1.ckpt"),
        (["last-v1.ckpt", "last.ckpt", "epoch=3-step=9.ckpt"], "last.ckpt"),
        (["last.ckpt", "last-v1.ckpt", "last.ckpt.json"], "last-v1.ckpt"),
    ],
)
def test_the_choice_in_a_directory(tmp_path: Path, names: list[str], chosen: str) -> None:
    touch(tmp_path, *names)
    assert find_checkpoint(tmp_path) == tmp_path / chosen


@pytest.mark.parametrize(
    ("start_from", "message", "hint"),
    [
        ("", "neither hpc_ckpt_N.ckpt nor last.ckpt", r"name one of its files: epoch=3-step=9\.ckpt"),
        ("gone.ckpt", "there is no such file", "absolute path"),
        ("epoch=3-step=9.ckpt/last.ckpt", "there is no such file", "absolute path"),
        ("s3://bucket/last.ckpt", "only files", "download"),
    ],
)
def test_what_cannot_be_started_from(tmp_path: Path, start_from: str, message: str, hint: str) -> None:
    touch(tmp_path, "epoch=3-step=9.ckpt")
    with pytest.raises(CheckpointError, match=message) as refused:
        find_checkpoint(start_from if "://" in start_from else tmp_path / start_from)
    assert refused.match("start_from")
    assert hint.replace("\\", "") in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "was not written by a Lightning Trainer"),
        ({"model": {}}, "was not written by a Lightning Trainer"),
        ({"pytorch-lightning_version": "2.6.0", "state_dict": {}}, "weights only: there is no optimizer_states"),
    ],
)
def test_files_a_training_cannot_go_on_from(content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_content("/some/file.ckpt", content)


def test_a_checkpoint_of_its_own_wins(tmp_path: Path) -> None:
    def session() -> Session:
        return Session.start(environ={"ORCH_RUN_ID": "r", "ORCH_RUN_DIR": str(tmp_path / "run")})

    other = tmp_path / "last.ckpt"
    torch.save({}, other)
    first = session()
    begun = starting_point(first, other)
    assert (begun.path, begun.foreign) == (str(other), True)
    manifest = first.commit(lambda file: torch.save({}, file), step=1, epoch=0)
    other.unlink()
    again = starting_point(session(), other)
    assert (again.path, again.foreign) == (str(manifest.path), False)

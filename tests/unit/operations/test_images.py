"""Names that are written into the lock file beside the code."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from orchestrator.errors import SpecError
from orchestrator.operations.images import list_images, name_image
from orchestrator.spec.images import LOCK_FILE

FIRST, SECOND = (f"ghcr.io/lab/train@sha256:{digit * 64}" for digit in "ab")


def test_a_name_is_written_changed_and_listed(tmp_path: Path) -> None:
    assert list_images(tmp_path) == []
    made = name_image(FIRST, "train", tmp_path)
    assert (made.before, made.image.image, made.path) == (None, FIRST, str(tmp_path / LOCK_FILE))
    below = tmp_path / "experiments"
    below.mkdir()
    assert name_image(SECOND, "train", below).before == FIRST
    name_image(FIRST, "base", below)
    assert [(image.name, image.image.image) for image in list_images(below)] == [("base", FIRST), ("train", SECOND)]
    assert [path.name for path in (tmp_path / LOCK_FILE).parent.iterdir()] == [LOCK_FILE.name]
    assert json.loads((tmp_path / LOCK_FILE).read_text())["version"] == 1


@pytest.mark.parametrize("name", ["Train", "a/b", "a:b", "", "-a", "a b", "a\n"])
def test_what_is_no_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match="is not a name"):
        name_image(FIRST, name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_writers_do_not_lose_each_other_s_names(tmp_path: Path) -> None:
    name_image(FIRST, "train", tmp_path)
    other = os.open((tmp_path / LOCK_FILE).parent, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(SpecError, match="another `orch image lock`"):
        name_image(FIRST, "other", tmp_path)
    os.close(other)
    name_image(FIRST, "other", tmp_path)
    assert [image.name for image in list_images(tmp_path)] == ["other", "train"]


def test_a_damaged_lock_file_is_not_written_over(tmp_path: Path) -> None:
    name_image(FIRST, "train", tmp_path)
    (tmp_path / LOCK_FILE).write_text("<<<<<<< HEAD")
    with pytest.raises(SpecError, match="is not a lock file"):
        name_image(FIRST, "other", tmp_path)
    assert (tmp_path / LOCK_FILE).read_text() == "<<<<<<< HEAD"


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "containers").touch()
    with pytest.raises(SpecError, match="cannot write"):
        name_image(FIRST, "train", tmp_path)

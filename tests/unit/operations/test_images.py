"""Names that are written into the lock file beside the code."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path

import pytest

from orchestrator.errors import ContainerError, SpecError
from orchestrator.operations.images import list_images, lock_image, name_image
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


def test_an_image_file_is_pinned_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "train.sif"
    path.write_bytes(b"squashed")
    pin = f"{path}@sha256:{hashlib.sha256(b'squashed').hexdigest()}"
    assert lock_image(str(path)).image == pin
    assert lock_image(pin).image == pin
    assert name_image(str(path), "train", tmp_path).image.image == pin
    path.write_bytes(b"another")
    for lock in (lambda: lock_image(pin), lambda: name_image(pin, "train", tmp_path)):
        with pytest.raises(ContainerError, match="its content is sha256:"):
            lock()
    with pytest.raises(ContainerError, match="No such file"):
        lock_image(f"{path}.gone.sif")


def test_a_named_file_is_the_same_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.sif").write_bytes(b"squashed")
    monkeypatch.chdir(tmp_path)
    named = name_image("train.sif", "train")
    assert named.image.image.startswith(f"{tmp_path}/train.sif@sha256:")

"""Which images a runtime takes, and names: what the nearest lock file says they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec import parse_spec
from orchestrator.spec.images import LOCK_FILE, ImageLock, find_lock, read_lock

RUNTIMES = ("docker", "podman", "apptainer", "pyxis", "none")
HASH = "0123456789abcdef" * 4
NOT_A_PIN = "orch image lock"
NO_FILES = "runs no image files"
NO_IMAGE = "uses no image"
# What runtimes say of a reference, None where they take it: engines, apptainer, pyxis. `none` has no image at all.
FORMS: dict[str, tuple[str | None, str | None, str | None]] = {
    f"ghcr.io/lab/train@sha256:{HASH}": (None,) * 3,
    f"train@sha256:{HASH}": (None,) * 3,
    f"localhost:5000/a/b:v1.2@sha256:{HASH}": (None,) * 3,
    f"[::1]:5000/train@sha256:{HASH}": (None,) * 3,
    f"sha256:{HASH}": (None, "is an id", "is an id"),
    f"/images/train.sif@sha256:{HASH}": (NO_FILES, None, "pyxis does not run /images/train.sif"),
    f"/images/train.sqsh@sha256:{HASH}": (NO_FILES, None, None),
    f"/images/a b:c,d.squashfs@sha256:{HASH}": (NO_FILES, None, None),
    "ghcr.io/lab/train:v1": (NOT_A_PIN,) * 3,
    "ghcr.io/lab/train": (NOT_A_PIN,) * 3,
    "train": (NOT_A_PIN,) * 3,
    "/images/train.sif": ("orch image lock /images/train.sif",) * 3,
    f"train@sha256:{HASH.upper()}": ("lower case",) * 3,
    f"sha256:{HASH.upper()}": ("lower case",) * 3,
    f"train@sha256:{HASH[:-1]}": ("here are 63 characters",) * 3,
    f"train@sha256:{HASH}0": ("here are 65 characters",) * 3,
    f"train@sha512:{HASH}": ("not a digest",) * 3,
    f"train@{HASH}": ("not a digest",) * 3,
    "train@": ("not a digest",) * 3,
    f"@sha256:{HASH}": ("not a repository name",) * 3,
    f"Lab/Train@sha256:{HASH}": ("not a repository name",) * 3,
    f"train @sha256:{HASH}": ("not a repository name",) * 3,
    f"train@sha256:{HASH}\n": ("here are 65 characters",) * 3,
    f"/images/train.sif@sha256:{HASH[:-1]}": ("here are 63 characters",) * 3,
    f"/images/train.sif@md5:{HASH}": ("not a digest",) * 3,
    "--privileged": ("not an image reference",) * 3,
    "train:v1; rm -rf /": ("not an image reference",) * 3,
    "docker://train": ("not an image reference",) * 3,
}
PIN = "ghcr.io/lab/train@sha256:" + "a" * 64


def write_lock(directory: Path, **pins: str) -> Path:
    path = directory / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ImageLock(path, {name: {"image": pin, "from": "x"} for name, pin in pins.items()}).render())
    return path


def spec(image: str, base_dir: Path, runtime: str = "docker") -> Any:
    container = {"runtime": runtime, "image": image}
    document = {"name": "x", "job": {"command": ["true"]}, "container": container}
    return parse_spec(document, base_dir=base_dir, environ={})


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("image", FORMS)
def test_what_a_runtime_says_of_a_reference(tmp_path: Path, image: str, runtime: str) -> None:
    engine, apptainer, pyxis = FORMS[image]
    words = {"apptainer": apptainer, "pyxis": pyxis, "none": engine or NO_IMAGE}.get(runtime, engine)
    if runtime == "none" and engine == NO_FILES:
        words = NO_IMAGE
    if words is None:
        assert spec(image, tmp_path, runtime).container.image == image.replace(":v1.2@", "@"), "the digest decides"
        return
    with pytest.raises(SpecError) as caught:
        spec(image, tmp_path, runtime)
    (problem,) = caught.value.problems
    assert problem["field"] == "container.image"
    assert words in str(problem["message"])


@pytest.mark.parametrize("path", ["/data/a b", "/data/a:b", "/data/a\\b", "/data/a\nb"])
@pytest.mark.parametrize("key", ["source", "target"])
def test_a_path_that_enroot_cannot_mount_is_refused_beforehand(tmp_path: Path, key: str, path: str) -> None:
    container = {"image": PIN, "mounts": [{"source": "/data/x", "target": "/data/x", key: path}]}
    document = {"name": "x", "job": {"command": ["true"]}, "container": {**container, "runtime": "pyxis"}}
    with pytest.raises(SpecError, match="pyxis cannot mount") as caught:
        parse_spec(document, base_dir=tmp_path, environ={})
    assert [problem["field"] for problem in caught.value.problems] == [f"container.mounts.0.{key}"]
    document["container"] = {**container, "runtime": "podman"}
    assert parse_spec(document, base_dir=tmp_path, environ={}).container.mounts


def test_the_path_of_a_file_starts_at_the_spec(tmp_path: Path) -> None:
    found = spec(f"images/train.sif@sha256:{HASH}", tmp_path, "apptainer").container.image
    assert found == f"{tmp_path}/images/train.sif@sha256:{HASH}"


def test_a_name_is_what_the_nearest_lock_file_pins(tmp_path: Path) -> None:
    write_lock(tmp_path, train="sha256:" + "b" * 64, other=PIN)
    deep = tmp_path / "experiments" / "today"
    deep.mkdir(parents=True)
    assert spec("other", deep).container.image == PIN
    write_lock(tmp_path / "experiments", train=PIN)
    assert spec("train", deep).container.image == PIN
    assert spec("train", tmp_path).container.image == "sha256:" + "b" * 64


def test_the_name_does_not_make_another_run_than_the_pin(tmp_path: Path) -> None:
    write_lock(tmp_path, train=PIN)
    assert spec("train", tmp_path) == spec(PIN, tmp_path)


def test_an_unknown_name_says_which_there_are(tmp_path: Path) -> None:
    path = write_lock(tmp_path, train=PIN, eval=PIN)
    with pytest.raises(SpecError) as caught:
        spec("trian", tmp_path)
    (problem,) = caught.value.problems
    assert problem["field"] == "container.image"
    for words in ("(eval, train)", "Did you mean `train`?", str(path), "orch image lock TAG --name trian"):
        assert words in str(problem["message"])


def test_a_lone_word_without_a_lock_file_is_an_unpinned_image(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="has no digest"):
        spec("train", tmp_path)


def test_what_looks_like_a_reference_is_no_name(tmp_path: Path) -> None:
    write_lock(tmp_path, train=PIN)
    for image in ("train:latest", "lab/train", "Train"):
        with pytest.raises(SpecError, match=r"orch image lock|not an image reference"):
            spec(image, tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not a lock file"),
        ("[]", "is not a lock file"),
        (json.dumps({"version": 2, "images": {}}), "has version 2"),
        (json.dumps({"version": 1, "images": {"train": {"image": "train:latest"}}}), "train: .* is a tag"),
        (json.dumps({"version": 1, "images": {"train": {}}}), "is not a lock file"),
    ],
)
def test_a_lock_file_that_is_none(tmp_path: Path, content: str, words: str) -> None:
    path = write_lock(tmp_path, train=PIN)
    path.write_text(content)
    assert find_lock(tmp_path) == path
    with pytest.raises(SpecError, match=words) as caught:
        read_lock(path)
    assert caught.value.hint


def test_a_lock_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        read_lock(tmp_path / "gone")

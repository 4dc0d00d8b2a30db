"""`image pull`, `verify`, `prune`: what becomes of files and names. Real engines answer in tests/cluster."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from orchestrator import operations
from orchestrator.containers.image_cache import CachedImage, ImageCache
from orchestrator.errors import RegistryError, SpecError
from orchestrator.files import write_json
from orchestrator.operations.image_results import PrunedImages
from orchestrator.paths import RootPaths
from tests.unit.operations.conftest import World

HASH = "0123456789abcdef" * 4
PIN = f"ghcr.io/lab/train@sha256:{HASH}"
DAY = 86_400


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    program = tmp_path / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho squashed >"$2"\n')
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:/usr/bin:/bin", "HOME": str(tmp_path), "ORCH_ROOT": str(tmp_path / "root")}


def cached(environ: dict[str, str], image: str, *, days: float, size: int = 100) -> CachedImage:
    """An imported image, last used so long ago."""
    cache = ImageCache(RootPaths(Path(environ["ORCH_ROOT"])).images, environ)
    entry = cache.fetch(image, "apptainer")
    content = bytes(size)
    entry.path.write_bytes(content)
    said = {"image": image, "sha256": hashlib.sha256(content).hexdigest(), "size_bytes": size}
    write_json(entry.description, said)
    os.utime(entry.description, (time.time() - days * DAY,) * 2)
    found = cache.find(image, "apptainer")
    assert found is not None
    return found


def pin(letter: str) -> str:
    return f"train@sha256:{letter * 64}"


def test_a_file_that_every_node_sees(environ: dict[str, str], tmp_path: Path) -> None:
    pulled = operations.pull_image(PIN, runtime="apptainer", environ=environ)
    assert pulled.path == str(tmp_path / "root" / "images" / f"{HASH}.sif")
    assert (pulled.was_here, pulled.size_bytes) == (False, 9)
    assert operations.pull_image(PIN, runtime="apptainer", environ=environ).was_here


def test_a_name_is_fetched_as_what_it_pins(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    operations.name_image(PIN, "train")
    assert operations.pull_image("train", runtime="apptainer", environ=environ).image == PIN
    (checked,) = operations.verify_images(runtime="apptainer", environ=environ)
    assert (checked.image, checked.problem) == (PIN, None)


@pytest.mark.parametrize(
    ("reference", "runtime", "words"),
    [
        ("train:v1", "apptainer", "is a tag"),
        ("/i/train.sif@sha256:" + HASH, "apptainer", "is a file already"),
        ("sha256:" + HASH, "apptainer", "is an id of one engine"),
        (PIN, "none", "runs no images"),
        (PIN, "singularity", "runs no images"),
    ],
)
def test_what_cannot_be_fetched(environ: dict[str, str], reference: str, runtime: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        operations.pull_image(reference, runtime=runtime, environ=environ)


def test_what_is_damaged_or_missing_is_found(environ: dict[str, str], tmp_path: Path) -> None:
    good, bad = cached(environ, pin("a"), days=1), cached(environ, pin("b"), days=1)
    bad.path.write_bytes(b"x" * 100)
    file = tmp_path / "mine.sif"
    file.write_bytes(b"squashed")
    mine = f"{file}@sha256:{HASH}"
    asked = operations.verify_images([pin("a"), pin("c"), mine], runtime="apptainer", environ=environ)
    assert [checked.problem for checked in asked] == [
        None,
        f"not imported; `orch image pull {pin('c')} --runtime apptainer`",
        f"its SHA-256 is {hashlib.sha256(b'squashed').hexdigest()}",
    ]
    everything = operations.verify_images(runtime="apptainer", environ=environ)
    assert {checked.path: checked.problem is None for checked in everything} == {
        str(good.path): True,
        str(bad.path): False,
    }


# --- prune


def left(environ: dict[str, str]) -> set[str]:
    cache = ImageCache(RootPaths(Path(environ["ORCH_ROOT"])).images, environ)
    return {entry.image for entry in cache.entries()}


def prune(environ: dict[str, str], **limits: object) -> PrunedImages:
    return operations.prune_images(environ=environ, **limits)  # type: ignore[arg-type]


def test_by_age_and_then_by_size(environ: dict[str, str]) -> None:
    for letter, days in zip("abcd", (40, 3, 2, 1), strict=True):
        cached(environ, pin(letter), days=days)
    first = prune(environ, max_age="30d", dry_run=True)
    assert [image.image for image in first.removed] == [pin("a")]
    assert left(environ) == {pin(letter) for letter in "abcd"}, "a dry run removes nothing"
    second = prune(environ, max_age="30d", max_size="250B")
    assert [image.image for image in second.removed] == [pin("a"), pin("b")]
    assert (second.freed_bytes, second.left_bytes) == (200, 200)
    assert left(environ) == {pin("c"), pin("d")}


def test_nothing_is_removed_without_a_limit(environ: dict[str, str]) -> None:
    with pytest.raises(SpecError, match="nothing says what to remove"):
        prune(environ)
    with pytest.raises(SpecError, match="soon"):
        prune(environ, max_age="soon")


def test_what_a_run_may_start_from_stays(environ: dict[str, str], world: World) -> None:
    environ["ORCH_ROOT"] = str(world.root)
    image = f"mirror.example/lab/{pin('a')}"  # another repository, the same image
    text = world.spec.read_text().replace("runtime: none", f"runtime: apptainer, image: '{image}'")
    world.spec.write_text(text)
    done = world.submit()
    cached(environ, pin("a"), days=400)
    cached(environ, pin("b"), days=400)
    assert [image.image for image in prune(environ, max_age="30d").removed] == [pin("b")]
    assert left(environ) == {pin("a")}
    cached(environ, pin("c"), days=1)
    assert [image.image for image in prune(environ, max_size="150B").removed] == [pin("c")], "what stays takes room"
    world.paths(done.run_id).agent_plan.write_text("{")
    with pytest.raises(RegistryError, match="not valid JSON"):
        prune(environ, max_age="30d")


def test_scratch_of_imports_that_were_killed_goes_once_it_is_old(environ: dict[str, str]) -> None:
    entry = cached(environ, pin("a"), days=1)
    old, new = entry.path.parent / ".orch-import-old", entry.path.parent / ".orch-import-new"
    for directory in (old, new):
        directory.mkdir()
    os.utime(old, (1, 1))
    prune(environ, max_age="30d")
    assert (old.exists(), new.exists()) == (False, True)

"""Names and manifests: what is accepted from a directory that anybody may have touched."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoint.manifest import CheckpointName, FileEntry, Manifest, parse_manifest
from orchestrator.errors import CheckpointCorrupt

SHA = "ab" * 32


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "step": 120,
        "epoch": 3,
        "attempt": 1,
        "fence_epoch": 2,
        "world_size": 4,
        "nonce": "0123abcd",
        "files": (FileEntry("step-000000120.e0002.0123abcd.ckpt", 10, SHA),),
        "code_hash": "c0de",
        "image": None,
        "committed_at": 1.5,
        "directory": "/d",
        "sequence": 2,
        "base_step": 100,
    }
    return Manifest(**(fields | changes))


NAME = "step-000000120.e0002.0123abcd.json"


def parse(data: bytes, file_name: str = NAME) -> Manifest:
    return parse_manifest(data, file_name=file_name, directory="/d")


def changed(**changes: Any) -> bytes:
    return json.dumps(json.loads(manifest().render()) | changes).encode()


def test_file_names_are_those_of_the_protocol() -> None:
    name = CheckpointName(120, 2, "0123abcd")
    assert name.data == "step-000000120.e0002.0123abcd.ckpt"
    assert name.manifest == NAME


@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_names_read_back(step: int, epoch: int) -> None:
    name = CheckpointName.fresh(step, epoch)
    assert CheckpointName.parse(name.manifest, ".json") == name
    assert CheckpointName.parse(name.data, ".ckpt") == name
    assert CheckpointName.parse(name.data, ".json") is None
    assert CheckpointName.parse(name.data + ".corrupt", ".ckpt") is None


def test_every_file_belongs_to_its_checkpoint() -> None:
    name = CheckpointName(120, 2, "0123abcd")
    for file_name in (name.data, name.manifest, name.part("shard-0001.ckpt"), name.part("index.json")):
        assert CheckpointName.of(file_name) == name
        assert CheckpointName.parse_temporary(f".{file_name}.0123456789ab.tmp") == name
        assert CheckpointName.of(file_name + ".corrupt") is None
    assert name.part("index.json") == "step-000000120.e0002.0123abcd.index.json"
    assert CheckpointName.parse(name.part("index.json"), ".json") is None  # a part is no manifest
    assert CheckpointName.parse(name.part("shard-0001.ckpt"), ".ckpt") is None
    assert CheckpointName.of("step-000000120.e00002.0123abcd.ckpt") is None


@pytest.mark.parametrize(
    "part", ["ckpt", "json", "", "a/b.ckpt", "../x.ckpt", "a.b.ckpt", "x.tmp", "X.ckpt", ".ckpt", "x"]
)
def test_what_is_no_part(part: str) -> None:
    with pytest.raises(ValueError, match="not the name of a part"):
        CheckpointName(120, 2, "0123abcd").part(part)


def test_a_manifest_reads_back() -> None:
    assert parse(manifest().render()) == manifest()


def test_unknown_keys_of_a_later_version_are_ignored() -> None:
    assert parse(changed(shards=[1, 2])) == manifest()


def test_a_manifest_without_the_newer_fields_is_read() -> None:
    fields = json.loads(manifest().render())
    del fields["sequence"], fields["base_step"]
    assert parse(json.dumps(fields).encode()) == manifest(sequence=0, base_step=None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff",
        b"{}",
        changed(step="120"),
        changed(step=True),
        changed(step=121),  # a manifest under another step's name
        changed(fence_epoch=3),
        changed(nonce="ffffffff"),
        changed(version=99),
        changed(files=[{"name": "x", "size": 1}]),
        changed(files=None),
        changed(files=[]),
        changed(files=[{"name": "step-000000120.e0002.0123abcd.shard-0000.ckpt", "size": 1, "sha256": SHA}]),
        manifest().render()[:-30],
        b"[" * 100_000,
        changed(committed_at=10**400),
        changed(committed_at=float("inf")),
        changed(committed_at=float("nan")),
        changed(step=float("inf")),
    ],
)
def test_damaged_manifests_are_told_from_good_ones(data: bytes) -> None:
    with pytest.raises(CheckpointCorrupt):
        parse(data)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../secret",
        "..",
        ".",
        "",
        "a/b",
        "step-000000120.e0002.0123abcd./../x",
        "step-000000120.e0002.0123abcd.\0",
        "step-000000110.e0001.99999999.ckpt",  # another checkpoint's file
        "last.ckpt",
        NAME,
        "step-000000120.e0002.0123abcd.ckpt",  # twice
    ],
)
def test_names_in_a_manifest_never_leave_their_checkpoint(name: str) -> None:
    with pytest.raises(CheckpointCorrupt):
        parse(changed(files=[*json.loads(manifest().render())["files"], {"name": name, "size": 1, "sha256": SHA}]))


@pytest.mark.parametrize(("size", "sha256"), [(-1, SHA), (1, "abc"), (1, SHA.upper()), (1, "../" + SHA[3:])])
def test_sizes_and_hashes_are_checked(size: int, sha256: str) -> None:
    name = "step-000000120.e0002.0123abcd.ckpt"
    with pytest.raises(CheckpointCorrupt):
        parse(changed(files=[{"name": name, "size": size, "sha256": sha256}]))


def test_several_files_are_allowed() -> None:
    stem = "step-000000120.e0002.0123abcd"
    names = [f"{stem}.ckpt", f"{stem}.index.json", f"{stem}.shard-0000.ckpt"]
    files = [{"name": name, "size": 1, "sha256": SHA} for name in names]
    assert parse(changed(files=files)).size_bytes == 3

"""Do the pieces make the whole? Against a count of every single element."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoint.coverage import Chunk, Index, Tensor, parse_index, shard_part
from orchestrator.errors import CheckpointCorrupt

SHARDS = (shard_part(0), shard_part(1))


def index(*chunks: Chunk, shape: tuple[int, ...] = (4, 3)) -> Index:
    return Index(SHARDS, {"net.weight": Tensor(shape, "float32", chunks)})


def problem(*chunks: Chunk, shape: tuple[int, ...] = (4, 3)) -> str | None:
    return index(*chunks, shape=shape).problem(SHARDS)


def test_two_halves_make_a_whole() -> None:
    assert problem(Chunk((0, 0), (2, 3), 0), Chunk((2, 0), (2, 3), 1)) is None
    assert problem(Chunk((0, 0), (4, 2), 0), Chunk((0, 2), (4, 1), 1)) is None
    assert problem(Chunk((0, 0), (4, 3), 1)) is None


def test_a_number_and_an_empty_tensor() -> None:
    assert problem(Chunk((), (), 0), shape=()) is None
    assert "1 of 1 elements" in str(problem(shape=()))
    assert "overlap" in str(problem(Chunk((), (), 0), Chunk((), (), 1), shape=()))
    assert problem(shape=(0, 3)) is None


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([], "12 of 12 elements are in no shard"),
        ([Chunk((0, 0), (2, 3), 0)], "6 of 12 elements are in no shard"),
        ([Chunk((0, 0), (2, 3), 0), Chunk((1, 0), (3, 3), 1)], "overlap"),
        ([Chunk((0, 0), (4, 3), 0), Chunk((0, 0), (4, 3), 1)], "overlap"),
        ([Chunk((0, 0), (2, 3), 0), Chunk((1, 0), (2, 3), 1)], "overlap"),  # though the volumes add up
        ([Chunk((0, 0), (4, 4), 0)], "does not fit"),
        ([Chunk((-1, 0), (5, 3), 0)], "does not fit"),
        ([Chunk((0,), (12,), 0)], "does not fit"),
        ([Chunk((0, 0), (4, 0), 0)], "does not fit"),
        ([Chunk((0, 0), (4, 3), 2)], "there is no shard 2"),
        ([Chunk((0, 0), (4, 3), -1)], "there is no shard -1"),
    ],
)
def test_what_is_wrong_is_said_with_the_name_of_the_tensor(chunks: list[Chunk], words: str) -> None:
    said = problem(*chunks)
    assert said is not None
    assert words in said
    assert "net.weight" in said


def test_a_shard_that_the_manifest_does_not_list() -> None:
    assert index(Chunk((0, 0), (4, 3), 0)).problem(SHARDS[:1]) == "shard-0001.ckpt is not part of the checkpoint"


@given(st.data())
def test_it_agrees_with_counting_every_element(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    chunks = []
    for _ in range(data.draw(st.integers(0, 4))):
        offsets = [data.draw(st.integers(0, side - 1)) for side in shape]
        sizes = [data.draw(st.integers(1, side - at)) for side, at in zip(shape, offsets, strict=True)]
        chunks.append(Chunk(tuple(offsets), tuple(sizes), 0))
    counts = dict.fromkeys(itertools.product(*map(range, shape)), 0)
    for chunk in chunks:
        for at in itertools.product(*(range(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))):
            counts[at] += 1
    exact = all(count == 1 for count in counts.values())
    assert (problem(*chunks, shape=tuple(shape)) is None) == exact


def test_it_reads_back() -> None:
    written = index(Chunk((0, 0), (2, 3), 0), Chunk((2, 0), (2, 3), 1))
    assert parse_index(written.render(), file_name="x") == written


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 99},
        {"version": "1"},
        {"tensors": None},
        {"tensors": {"w": {"shape": [2], "dtype": "float32"}}},
        {"tensors": {"w": {"shape": [2.0], "dtype": "float32", "chunks": []}}},
        {"tensors": {"w": {"shape": [2], "dtype": "float32", "chunks": [[[0], [2]]]}}},
        {"shards": 3},
    ],
)
def test_damaged_ones_are_told_from_good_ones(changes: dict[str, Any]) -> None:
    fields = json.loads(index().render()) | changes
    with pytest.raises(CheckpointCorrupt, match="is not an index"):
        parse_index(json.dumps(fields).encode(), file_name="x")
    for data in (b"\xff", b"[" * 100_000):
        with pytest.raises(CheckpointCorrupt):
            parse_index(data, file_name="x")

"""Which piece of which tensor lies in which shard of a checkpoint, and whether the pieces make the whole. Pure.

The index is a file of the checkpoint like the shards, so that completeness can be checked without torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint.manifest import MALFORMED, integer
from orchestrator.errors import CheckpointCorrupt

INDEX_VERSION = 1


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the shard that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shard: int

    def end(self, dimension: int) -> int:
        """First index of a dimension that is behind the box."""
        return self.offsets[dimension] + self.sizes[dimension]


@dataclass(frozen=True)
class Tensor:
    """The whole: shape, element type as torch calls it (`bfloat16`), and the boxes that were written."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Index:
    """All tensors of a sharded checkpoint by name, and its shards (`shard-0000.ckpt`), one per rank."""

    shards: tuple[str, ...]
    tensors: Mapping[str, Tensor]

    def render(self) -> bytes:
        """The bytes of the index file (pure)."""
        tensors = {
            name: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "chunks": [[chunk.offsets, chunk.sizes, chunk.shard] for chunk in tensor.chunks],
            }
            for name, tensor in self.tensors.items()
        }
        return json.dumps({"version": INDEX_VERSION, "shards": self.shards, "tensors": tensors}).encode() + b"\n"

    def problem(self, parts: Iterable[str]) -> str | None:
        """Why a checkpoint of these parts is not complete, in words; None when it is (pure)."""
        there = set(parts)
        missing = [shard for shard in self.shards if shard not in there]
        if missing:
            return f"{missing[0]} is not part of the checkpoint"
        for name, tensor in self.tensors.items():
            if words := _problem(tensor, len(self.shards)):
                return f"tensor {name}: {words}"
        return None


def shard_part(rank: int) -> str:
    """What the file of a rank is called behind the name of its checkpoint."""
    return f"shard-{rank:04d}.ckpt"


def parse_index(data: bytes, *, file_name: str) -> Index:
    """The index in `data` (pure). Raises CheckpointCorrupt for anything else."""
    try:
        fields = json.loads(data)
        if integer(fields["version"]) > INDEX_VERSION:
            raise ValueError(f"version {fields['version']} was written by a newer orch")
        tensors = {
            str(name): Tensor(
                _numbers(tensor["shape"]),
                str(tensor["dtype"]),
                tuple(Chunk(_numbers(o), _numbers(s), integer(shard)) for o, s, shard in tensor["chunks"]),
            )
            for name, tensor in fields["tensors"].items()
        }
        return Index(tuple(str(shard) for shard in fields["shards"]), tensors)
    except MALFORMED as error:
        raise CheckpointCorrupt(f"{file_name} is not an index: {type(error).__name__}: {error}") from error


def _numbers(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(integer(value) for value in values)


def _problem(tensor: Tensor, shards: int) -> str | None:
    for chunk in tensor.chunks:
        if not 0 <= chunk.shard < shards:
            return f"there is no shard {chunk.shard}"
        if not _inside(chunk, tensor.shape):
            return (
                f"a piece at {list(chunk.offsets)} of size {list(chunk.sizes)} does not fit into {list(tensor.shape)}"
            )
    # Pieces that lie inside, do not overlap and have the volume of the whole leave no hole.
    if overlap := _overlap(tensor):
        return f"two pieces overlap at {list(overlap.offsets)}"
    volume, whole = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.shape)
    return None if volume == whole else f"{whole - volume} of {whole} elements are in no shard"


def _inside(chunk: Chunk, shape: tuple[int, ...]) -> bool:
    if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
        return False
    sides = zip(chunk.offsets, chunk.sizes, shape, strict=True)
    return all(offset >= 0 and size > 0 and offset + size <= side for offset, size, side in sides)


def _overlap(tensor: Tensor) -> Chunk | None:
    """A piece that overlaps another. Swept along one dimension: each against each takes minutes for many ranks."""
    if not tensor.shape:
        return tensor.chunks[1] if len(tensor.chunks) > 1 else None
    along = max(range(len(tensor.shape)), key=lambda d: len({chunk.offsets[d] for chunk in tensor.chunks}))
    active: list[Chunk] = []
    for chunk in sorted(tensor.chunks, key=lambda c: c.offsets[along]):
        active = [other for other in active if other.end(along) > chunk.offsets[along]]
        if any(_touch(chunk, other) for other in active):
            return chunk
        active.append(chunk)
    return None


def _touch(a: Chunk, b: Chunk) -> bool:
    return all(a.offsets[d] < b.end(d) and b.offsets[d] < a.end(d) for d in range(len(a.offsets)))

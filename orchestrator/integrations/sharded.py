"""Sharded checkpoints, for FSDP2 and whatever else holds DTensors: every rank writes its own pieces, in one file, by
torch.distributed.checkpoint, and any number of ranks loads them (docs/checkpoints.md, "Sharded checkpoints").

    session = Session.start(agree=agree)
    with session.guard():
        training = ModelAndOptimizer(model, optimizer)  # after fully_shard
        loop = ShardedLoop(session, {"training": training, "schedule": scheduler})

Nothing here unpickles more than `torch.load(weights_only=True)` does, and nothing that was not verified.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from orchestrator.checkpoint import FileEntry, Found, Manifest
from orchestrator.checkpoint.coverage import Chunk, Index, Tensor, parse_index, shard_part
from orchestrator.checkpoint.manifest import INDEX_PART
from orchestrator.errors import CheckpointError, Fenced, OrchError
from orchestrator.integrations.torch import ResumableLoop, Stateful, agree
from orchestrator.worker.session import Saving, Session

log = logging.getLogger("orchestrator.integrations")

T = TypeVar("T")


class ShardedLoop(ResumableLoop):
    """A ResumableLoop whose checkpoints are written by all ranks, and loaded by any number of them.

    `parts` are the same for the whole run: their DTensors are saved in pieces, everything else once. `own` is what each
    rank has for itself (random states, a position in its data); it comes back only to as many ranks as saved it.
    """

    def __init__(
        self,
        session: Session,
        parts: Mapping[str, Stateful],
        *,
        own: Mapping[str, Stateful] | None = None,
        max_steps: int | None = None,
    ) -> None:
        self._own = own or {}
        self._group = new_group()
        super().__init__(session, parts, max_steps=max_steps)

    def _resume(self) -> None:
        found = find(self.session)
        if found is None:
            return
        state, own = found.load(self._state(), group=self._group)
        self._restore(state)
        for name, part in self._own.items() if own is not None else ():
            part.load_state_dict(own[name])

    def _save(self, *, leaving: bool) -> None:
        own = {name: part.state_dict() for name, part in self._own.items()}
        state = self._state()
        step, epoch, metrics = self.step, self.epoch, self._metrics
        save(
            self.session,
            state,
            own=own,
            step=step,
            epoch=epoch,
            metrics=metrics,
            leaving=leaving,
            group=self._group,
        )
        self._schedule.saved(self.step)


class ModelAndOptimizer:
    """Both under the names of the parameters, which are the same for every number of ranks; also for a new optimizer,
    whose state does not exist before its first step and so could not be loaded in pieces."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """DTensors where there are some. Initialises the optimizer, by a step that changes nothing, if it is new."""
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Takes what `state_dict` gave, at any number of ranks."""
        set_state_dict(
            self._model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )


class RandomState:
    """torch's generators of this process, the CPU's and the current device's: for `own`."""

    def state_dict(self) -> dict[str, Any]:
        """Also of CUDA, where it is in use."""
        state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on where the draws had stopped."""
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])


def new_group() -> Any:
    """A process group of all ranks for saves and loads, on the CPU: they must not wait behind the training's."""
    if not dist.is_initialized():
        raise CheckpointError(
            "sharded checkpoints need a process group", hint="call torch.distributed.init_process_group first"
        )
    return dist.new_group(backend="gloo")


# --- saving


def save(
    session: Session,
    state: Mapping[str, Any],
    *,
    own: Any = None,
    step: int,
    epoch: int,
    metrics: Mapping[str, float] | None = None,
    leaving: bool = False,
    group: Any,
) -> None:
    """Make a checkpoint of all ranks' pieces of `state`. Collective: it succeeds on all ranks, or all raise the same.

    Tensors that are not DTensors, and objects, are taken from rank 0. Where such a tensor differs between the ranks
    (batch statistics), every rank's own is kept beside it. `leaving`: the save that a stop asks for. Raises Fenced,
    CheckpointError: the previous one stands.
    """
    started = time.monotonic()
    tensors: dict[str, torch.Tensor] = {}
    begin = partial(session.begin, step, leaving=leaving)
    writer = _Writer(session, _take_out(state, tensors), tensors, own, begin, step=step, epoch=epoch, metrics=metrics)
    planner = DefaultSavePlanner(flatten_state_dict=False, dedup_save_to_lowest_rank=True)
    failed: CheckpointException | None = None
    try:
        dcp_save(tensors, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:
        failed = error

    def conclude() -> None:
        if failed is not None:
            writer.take_back()
            raise _as_one(failed, f"save its part of step {step}")
        if writer.manifest is not None:
            session.committed(writer.manifest, seconds=time.monotonic() - started)

    _together(conclude, group)


class _Writer(StorageWriter):
    """One shard per rank; rank 0 adds the plain state and the index, and publishes when the pieces make the whole."""

    def __init__(
        self,
        session: Session,
        skeleton: Any,
        tensors: Mapping[str, torch.Tensor],
        own: Any,
        begin: Callable[[], Saving],
        *,
        step: int,
        epoch: int,
        metrics: Mapping[str, float] | None,
    ) -> None:
        self._begin = begin
        self.manifest: Manifest | None = None
        self._session, self._skeleton, self._tensors, self._own = session, skeleton, tensors, own
        self._step, self._epoch, self._metrics = step, epoch, metrics
        self._begun: Saving | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: rank 0 is the coordinator here and there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Tell rank 0 what the tensors are like that should be the same everywhere."""
        if self._session.world_size == 1:
            return replace(plan, storage_data={})
        plain = {name: tensor for name, tensor in self._tensors.items() if not isinstance(tensor, DTensor)}
        return replace(plan, storage_data={name: _digest(tensor) for name, tensor in plain.items()})

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Rank 0: open the save, and tell every rank its name and which tensors to keep for itself."""
        digests = [plan.storage_data for plan in plans]
        differing = [name for name in digests[0] if len({digest.get(name) for digest in digests}) > 1]
        self._begun = self._begin()
        return [replace(plan, storage_data=(self._begun, differing)) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's shard. The first result is the file itself: a rank without any piece has one as well."""
        saving, differing = plan.storage_data
        part = shard_part(self._session.rank)
        try:
            pieces = {_key(item.index): _alone(planner.resolve_data(item)) for item in plan.items}
            content = {
                "pieces": pieces,
                "own": self._own,
                "own_tensors": {name: _alone(self._tensors[name]) for name in differing},
            }
            entry = self._session.write_part(saving, lambda file: torch.save(content, file), part=part)
        except OrchError:
            raise
        except Exception as error:
            # It travels to the other ranks: an exception that cannot be pickled would leave them waiting for it.
            log.exception("rank %d could not write its shard of step %d", self._session.rank, self._step)
            raise CheckpointError(f"{type(error).__name__}: {error}") from error
        future: Future[list[WriteResult]] = Future()
        future.set_result(
            [WriteResult(MetadataIndex(""), entry.size, entry), *(WriteResult(i.index, 0, None) for i in plan.items)]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Rank 0, when all shards are durable: check that nothing is missing, then publish."""
        saving = self._begun
        assert saving is not None  # set by prepare_global_plan
        shards: list[FileEntry] = [written[0].storage_data for written in results]
        index = _index(metadata, [written[1:] for written in results])
        if problem := index.problem(entry.name.removeprefix(saving.name.stem + ".") for entry in shards):
            raise CheckpointError(
                f"the shards of step {self._step} are not the whole state: {problem}",
                hint="every rank must save the same state, with DTensors that cover their meshes",
            )
        sharded = [name for name, tensor in self._tensors.items() if isinstance(tensor, DTensor)]
        plain = {"state": self._skeleton, "sharded": sharded}
        files = [
            self._session.write_part(saving, lambda file: torch.save(plain, file)),
            self._session.write_part(saving, lambda file: file.write(index.render()), part=INDEX_PART),
            *shards,
        ]
        self._begun = None  # from now on it may have become another attempt's base: not ours to take back
        self.manifest = self._session.publish(saving, files, epoch=self._epoch, metrics=self._metrics)

    def take_back(self) -> None:
        """Rank 0: remove the shards of a save that was not published."""
        if self._begun is not None:
            self._session.abandon(self._begun)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never: it is not chosen by a path."""
        return False


def _index(metadata: Metadata, written: Sequence[list[WriteResult]]) -> Index:
    """What was written, by what the ranks say they wrote and not by what was planned."""
    shard_of = {result.index: rank for rank, results in enumerate(written) for result in results}
    tensors = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)  # nothing else is given to the planner
        chunks = [
            Chunk(tuple(chunk.offsets), tuple(chunk.sizes), shard_of[MetadataIndex(name, chunk.offsets)])
            for chunk in tensor.chunks
            if MetadataIndex(name, chunk.offsets) in shard_of and 0 not in chunk.sizes  # a rank may have nothing of it
        ]
        tensors[name] = Tensor(tuple(tensor.size), _dtype_name(tensor.properties.dtype), tuple(chunks))
    return Index(tuple(shard_part(rank) for rank in range(len(written))), tensors)


# --- loading


def find(session: Session) -> Checkpoint | None:
    """The checkpoint every rank starts from; None = from the beginning. Collective. Rank 0 opens the fence epoch."""
    found = session.resume()
    mine = None if found is None else [found.manifest.name.manifest, found.manifest.sharded, found.manifest.step]
    agreed = json.loads(agree(json.dumps(mine)))
    if agreed is None:
        return None
    manifest_name, sharded, step = agreed
    if not sharded:
        raise CheckpointError(
            f"the checkpoint of step {step} is one file; this program loads shards",
            hint="resume it with orchestrator.integrations.torch.ResumableLoop",
        )
    return Checkpoint(session, found or session.store.fetch(manifest_name, only=()))


class Checkpoint:
    """A checkpoint that all ranks have agreed on. Each reads, and verifies where it is, the files that it needs."""

    def __init__(self, session: Session, found: Found) -> None:
        self.manifest = found.manifest
        self._session, self._verified = session, dict(found.files)

    def path(self, part: str | None = None) -> Path:
        """A verified file of it; on rank 0, `find` has verified all. Raises CheckpointError."""
        name = self.manifest.name.data if part is None else self.manifest.name.part(part)
        if name not in self._verified:
            self._verified |= self._session.store.fetch(self.manifest.name.manifest, only=[name]).files
        return self._verified[name]

    def load(self, fresh: Mapping[str, Any], *, group: Any) -> tuple[Any, Any]:
        """The state, and what this rank had for itself (None where another number of ranks saved). Collective.

        `fresh` is the program's own state: what belongs into its DTensors is read into them, piece by piece. Raises
        CheckpointError, the same on all ranks.
        """
        skeleton, tensors, index = _together(lambda: self._prepare(fresh), group)
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        failed: CheckpointException | None = None
        try:
            dcp_load(tensors, storage_reader=_Reader(self, index), planner=planner, process_group=group)
        except CheckpointException as error:
            failed = error

        def conclude() -> Any:
            if failed is not None:
                raise _as_one(failed, f"load the checkpoint of step {self.manifest.step}")
            return self._load_own(tensors)

        own = _together(conclude, group)
        return _put_back(skeleton, tensors), own

    def _prepare(self, fresh: Mapping[str, Any]) -> tuple[Any, dict[str, torch.Tensor], Index]:
        """What is saved, and for each of its tensors one of this program to read it into."""
        plain = torch.load(self.path(), weights_only=True)
        file_name = self.manifest.name.part(INDEX_PART)
        index = parse_index(self.path(INDEX_PART).read_bytes(), file_name=file_name)
        saved: dict[str, torch.Tensor] = {}
        places: dict[str, torch.Tensor] = {}
        _take_out(plain["state"], saved)
        _take_out(fresh, places)
        sharded = set(plain["sharded"])
        tensors = {name: _room(name, like, places.get(name), name in sharded) for name, like in saved.items()}
        return plain["state"], tensors, index

    def _load_own(self, tensors: dict[str, torch.Tensor]) -> Any:
        if self.manifest.world_size != self._session.world_size:
            if self._session.is_chief:
                log.warning(
                    "%d ranks go on from what %d have saved: what each of them had for itself is not restored",
                    self._session.world_size,
                    self.manifest.world_size,
                )
            return None
        shard = torch.load(self.path(shard_part(self._session.rank)), map_location="cpu", mmap=True, weights_only=True)
        for name, tensor in shard["own_tensors"].items():
            tensors[name].copy_(tensor)
        return shard["own"]


class _Reader(StorageReader):
    """Reads pieces of the shards, wherever the planner wants them."""

    def __init__(self, checkpoint: Checkpoint, index: Index) -> None:
        self._checkpoint, self._index = checkpoint, index
        self._shards: dict[tuple[str, tuple[int, ...]], str] = {
            (name, chunk.offsets): index.shards[chunk.shard]
            for name, tensor in index.tensors.items()
            for chunk in tensor.chunks
        }

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a reader serves one load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, in torch's words."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(getattr(torch, tensor.dtype)),
                    torch.Size(tensor.shape),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks],
                )
                for name, tensor in self._index.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: every rank reads alike."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """One shard after the other; only those that hold something for this rank, and of them only these pages."""
        wanted: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            wanted[self._shards[item.storage_index.fqn, tuple(item.storage_index.offset or ())]].append(item)
        try:
            for part, items in wanted.items():
                path = self._checkpoint.path(part)
                pieces = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["pieces"]
                for item in items:
                    piece = pieces[_key(item.storage_index)]
                    for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                        piece = piece.narrow(dimension, start, length)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(piece)
                    planner.commit_tensor(item, target)
        except OrchError:
            raise
        except Exception as error:  # see _Writer.write_data
            log.exception("the checkpoint of step %d could not be loaded", self._checkpoint.manifest.step)
            raise CheckpointError(f"{type(error).__name__}: {error}") from error
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Never: it is not chosen by a path."""
        return False


def _room(name: str, like: torch.Tensor, place: torch.Tensor | None, sharded: bool) -> torch.Tensor:
    """The tensor to load a saved one into: the program's own where that is sharded, else a new one."""
    if place is None and sharded:
        raise CheckpointError(
            f"{name} was saved in shards, and this program has no such tensor",
            hint="build the same model first; for an optimizer, use ModelAndOptimizer",
        )
    if place is not None and (place.shape != like.shape or place.dtype != like.dtype):
        raise CheckpointError(
            f"{name} was saved as {_described(like)}, this program has {_described(place)}",
            hint="resume with the model that was saved",
        )
    return place if isinstance(place, DTensor) else torch.empty_like(like, device="cpu")


# --- all ranks together


def _together(do: Callable[[], T], group: Any) -> T:
    """What `do` returns on this rank, or what it raised on one of them, on all. Collective."""
    result: T | None = None
    error: OrchError | None = None
    try:
        result = do()
    except OrchError as raised:
        error = raised
    except Exception as raised:  # see _Writer.write_data
        log.exception("a sharded checkpoint failed")
        error = CheckpointError(f"{type(raised).__name__}: {raised}")
    errors: list[OrchError | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    raised_by = sorted((e for e in errors if e is not None), key=lambda e: not isinstance(e, Fenced))
    if raised_by:
        raise raised_by[0]
    return cast(T, result)


def _as_one(failed: CheckpointException, doing: str) -> OrchError:
    """One error for what went wrong on any number of ranks: that a newer attempt owns the run, or the first's."""
    errors = {rank: error for rank, (error, _) in sorted(failed.failures.items())}
    for error in errors.values():
        if isinstance(error, Fenced):
            return error
    rank, error = next(iter(errors.items()))
    words = error.message if isinstance(error, OrchError) else f"{type(error).__name__}: {error}"
    others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    hint = error.hint if isinstance(error, OrchError) else "what happened is in the log of that rank"
    return CheckpointError(f"rank {rank}{others} could not {doing}: {words}", hint=hint)


# --- tensors in a nested state


def _take_out(node: Any, tensors: dict[str, torch.Tensor], path: tuple[str, ...] = ()) -> Any:
    """A copy of `node` with a meta tensor (shape and type, no content) for every tensor; these go into `tensors`."""
    if isinstance(node, torch.Tensor):
        name = ".".join(path)
        if name in tensors:
            raise CheckpointError(f"two tensors of the state are both called {name}")
        tensors[name] = node
        return torch.empty(node.shape, dtype=node.dtype, device="meta")
    if isinstance(node, Mapping):
        return {key: _take_out(value, tensors, (*path, str(key))) for key, value in node.items()}
    if isinstance(node, list | tuple):
        items = [_take_out(value, tensors, (*path, str(number))) for number, value in enumerate(node)]
        return items if isinstance(node, list) else tuple(items)
    return node


def _put_back(node: Any, tensors: Mapping[str, torch.Tensor], path: tuple[str, ...] = ()) -> Any:
    """The reverse of `_take_out`."""
    if isinstance(node, torch.Tensor):
        return tensors[".".join(path)]
    if isinstance(node, Mapping):
        return {key: _put_back(value, tensors, (*path, str(key))) for key, value in node.items()}
    if isinstance(node, list | tuple):
        items = [_put_back(value, tensors, (*path, str(number))) for number, value in enumerate(node)]
        return items if isinstance(node, list) else tuple(items)
    return node


def _alone(tensor: Any) -> torch.Tensor:
    """`tensor` without what shares its memory (padding, its neighbours): torch.save writes whole storages."""
    alone: torch.Tensor = tensor.detach()
    if alone.untyped_storage().nbytes() > alone.nbytes:
        alone = alone.to("cpu", copy=True)
    return alone


def _digest(tensor: torch.Tensor) -> bytes:
    dense = tensor.detach().cpu().contiguous()
    return hashlib.blake2b(ctypes.string_at(dense.data_ptr(), dense.nbytes), digest_size=16).digest()


def _key(index: MetadataIndex) -> str:
    """What a piece is called in its shard: `net.weight@4,0`."""
    return f"{index.fqn}@{','.join(str(number) for number in index.offset or ())}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _described(tensor: torch.Tensor) -> str:
    return f"{_dtype_name(tensor.dtype)} {list(tensor.shape)}"

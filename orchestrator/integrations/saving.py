"""Handing a state to the session: as it is, or as a copy in host memory that is written while the loop goes on."""

from __future__ import annotations

import ctypes
import io
import pickle
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, BinaryIO

import torch

from orchestrator.worker.session import Session


class StateSaver:
    """Commits states (rank 0). With `checkpoint.async` the caller waits for the copy only, and for a save in flight."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._snapshots = SnapshotBuffers()

    def save(
        self,
        state: Any,
        *,
        step: int,
        epoch: int,
        metrics: Mapping[str, float] | None = None,
        leaving: bool = False,
    ) -> None:
        """Make `state` the checkpoint of `step`; `leaving`: the process is about to end, so nothing is left behind."""

        def freeze() -> Callable[[BinaryIO], None]:
            copy = self._snapshots.take(state)
            return lambda file: torch.save(copy(), file)

        if leaving:
            self._session.commit_before_leaving(partial(torch.save, state), step=step, epoch=epoch, metrics=metrics)
        elif self._session.settings.asynchronous:
            self._session.commit_async(freeze, step=step, epoch=epoch, metrics=metrics)
        else:
            self._session.commit(partial(torch.save, state), step=step, epoch=epoch, metrics=metrics)


class SnapshotBuffers:
    """Host memory for one snapshot at a time, kept for the next one: fresh pages cost more than the copy itself."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[torch.UntypedStorage]] = {}

    def take(self, state: Any) -> Callable[[], Any]:
        """Copy anything that `torch.save` takes, over the copy before. What is returned builds the copy, on the CPU.

        It saves to the same bytes. Tensors that share a storage share one there; everything else is pickled now.
        """
        copies = _Copies(self._free)
        pickled = io.BytesIO()  # without the tensors' data
        pickler = pickle.Pickler(pickled, protocol=pickle.HIGHEST_PROTOCOL)
        pickler.persistent_id = copies.replace  # type: ignore[method-assign]
        pickler.dump(state)
        copies.finish()
        self._free = copies.used

        def build() -> Any:
            pickled.seek(0)
            unpickler = pickle.Unpickler(pickled)
            unpickler.persistent_load = copies.restore  # type: ignore[method-assign]
            state = unpickler.load()
            # Else torch keeps sparse tensors alive until its next torch.load, which then checks them instead of us.
            torch._utils._validate_loaded_sparse_tensors()  # type: ignore[no-untyped-call]
            return state

        return build


class _Copies:
    """What a snapshot does not pickle, numbered in the order in which it was met."""

    def __init__(self, free: dict[tuple[int, bool], list[torch.UntypedStorage]]) -> None:
        self.used: defaultdict[tuple[int, bool], list[torch.UntypedStorage]] = defaultdict(list)
        self._free = free
        self._copied: dict[int, torch.UntypedStorage] = {}
        self._references: list[torch.UntypedStorage | torch.TypedStorage | str] = []
        self._devices: set[torch.device] = set()

    def replace(self, part: object) -> int | None:
        """Pickle asks about every object: a number for what is kept here, None for what it is to pickle itself."""
        if isinstance(part, torch.TypedStorage):
            copy = torch.TypedStorage(  # type: ignore[no-untyped-call]
                wrap_storage=self._copy(part._untyped_storage), dtype=part.dtype, _internal=True
            )
            self._references.append(copy)
        elif isinstance(part, torch.UntypedStorage):
            self._references.append(self._copy(part))
        elif isinstance(part, str):
            self._references.append(part)  # the same object, for `torch.save` writes each string object once
        else:
            return None
        return len(self._references) - 1

    def restore(self, number: int) -> torch.UntypedStorage | torch.TypedStorage | str:
        """What has that number."""
        return self._references[number]

    def _copy(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        copy = self._copied.get(storage._cdata)
        if copy is None:
            # Only from pinned memory does an accelerator copy at full speed, and beside other copies.
            pinned = storage.device.type == "cuda"
            key = (storage.nbytes(), pinned)
            waiting = self._free.get(key)
            copy = waiting.pop() if waiting else _allocate(*key)
            if storage.device.type == "cpu":
                # torch would copy with all its threads, and wait for the slowest: on busy cores that takes ten times
                # as long as one thread does.
                ctypes.memmove(copy.data_ptr(), storage.data_ptr(), storage.nbytes())
            else:
                copy.copy_(storage, non_blocking=pinned)
            if pinned:
                self._devices.add(storage.device)
            self._copied[storage._cdata] = copy
            self.used[key].append(copy)
        return copy

    def finish(self) -> None:
        """Wait for the copies that were only begun: the loop is about to change what they read."""
        for device in self._devices:
            torch.cuda.synchronize(device)


def _allocate(size: int, pinned: bool) -> torch.UntypedStorage:
    return torch.empty(size, dtype=torch.uint8, pin_memory=pinned).untyped_storage()

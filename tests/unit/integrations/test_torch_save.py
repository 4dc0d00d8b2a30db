"""torch.save streams into a commit: the store hashes what passes and keeps no copy of it."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint import PosixStore, posix, take_over
from orchestrator.checkpoint.stream import BLOCK_BYTES
from orchestrator.errors import CheckpointError

torch = pytest.importorskip("torch")


class OnlyWrite:
    """A file that has nothing but what torch.save may use."""

    def __init__(self) -> None:
        self.data = io.BytesIO()
        self.largest = 0

    def write(self, data: Any) -> int:
        self.largest = max(self.largest, memoryview(data).nbytes)
        return self.data.write(data)

    def flush(self) -> None:
        pass


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    shared = torch.randn(1000, 300)
    return {"model": {"a": shared, "b": shared[10:20], "n": torch.arange(7)}, "step": 3, "empty": torch.empty(0)}


def test_torch_save_only_writes_in_order() -> None:
    file = OnlyWrite()
    torch.save(state(), file)
    file.data.seek(0)
    assert torch.load(file.data, weights_only=True)["step"] == 3
    assert file.largest <= 1000 * 300 * 4  # one tensor at a time


def test_what_torch_saved_is_verified_and_loads(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    _, fence = take_over(store, attempt=0)
    store.commit(fence, lambda f: torch.save(state(), f), step=3, epoch=0, world_size=1)
    found = store.find()
    assert found is not None
    loaded = torch.load(found.path, weights_only=True)
    assert torch.equal(loaded["model"]["a"], state()["model"]["a"])
    assert torch.equal(loaded["model"]["b"], state()["model"]["b"])
    plain = io.BytesIO()
    torch.save(state(), plain)
    # 1 % for the archive's name inside the file, which is all that may differ
    assert found.path.stat().st_size == pytest.approx(len(plain.getvalue()), rel=0.01)


def test_a_full_disk_in_the_middle_of_torch_save_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PosixStore(tmp_path)
    _, fence = take_over(store, attempt=0)
    written: list[int] = []

    def filling_up(descriptor: int, data: memoryview) -> int:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(write(descriptor, data))
        return written[-1]

    write = os.write
    monkeypatch.setattr(posix.os, "write", filling_up)
    large = [torch.zeros(BLOCK_BYTES // 4) for _ in range(8)]
    with pytest.raises(CheckpointError, match="ENOSPC"):
        store.commit(fence, lambda file: torch.save(large, file), step=3, epoch=0, world_size=1)
    assert written == [BLOCK_BYTES]
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-0001.json"]

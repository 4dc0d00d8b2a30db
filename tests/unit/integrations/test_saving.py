"""A state that is saved beside the training: the file is the one a save in the foreground would have written."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

from orchestrator.integrations.saving import SnapshotBuffers, StateSaver  # noqa: E402 - torch may be missing
from orchestrator.worker.session import CheckpointSettings, Session  # noqa: E402

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]  # only where there is one


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Custom:
    weight: Any
    name: str


def model_and_optimizer() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}


def awkward() -> dict[str, Any]:
    base = torch.randn(30, 20)
    return {
        "tied": [base, base],
        "view": base[3:9, ::2],
        "transposed": base.t(),
        "expanded": torch.ones(1).expand(5),
        "parameter": torch.nn.Parameter(torch.randn(3, 4)),
        "leaf": torch.ones(2, requires_grad=True),
        "types": [torch.ones(3, dtype=dtype) for dtype in (torch.bfloat16, torch.int8, torch.complex64, torch.bool)],
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0),
        "meta": torch.empty(3, device="meta"),
        "random": (torch.get_rng_state(), random.getstate()),
        "containers": OrderedDict(a=Pair(1, torch.zeros(2)), b={"set": {1}, "none": None, 3: 2.5}),
        "object": Custom(torch.ones(4), "exp_avg"),
        "storage": torch.arange(4, dtype=torch.uint8).untyped_storage(),
    }


def saved(state: Any, path: Path) -> bytes:
    with path.open("wb") as file:
        torch.save(state, file)
    return path.read_bytes()


@pytest.mark.parametrize("make", [model_and_optimizer, awkward])
def test_a_snapshot_saves_to_the_same_bytes(tmp_path: Path, make: Any) -> None:
    state, buffers = make(), SnapshotBuffers()
    expected = saved(state, tmp_path / "a")
    for _ in range(2):  # the second one into memory that was used before
        assert saved(buffers.take(state)(), tmp_path / "a") == expected


def tensors(state: Any) -> Iterator[Any]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors(value)


def test_nothing_that_is_changed_afterwards_reaches_the_snapshot(tmp_path: Path) -> None:
    state, buffers = model_and_optimizer(), SnapshotBuffers()
    state["log"] = {"rows": [1, 2]}
    expected = saved(state, tmp_path / "a")
    build = buffers.take(state)
    with torch.no_grad():
        for tensor in tensors(state):
            tensor.add_(1)
    state["step"] = 99
    state["log"]["rows"].append(3)
    state["new"] = torch.ones(3)
    assert saved(build(), tmp_path / "a") == expected


def test_the_memory_of_a_snapshot_is_used_again() -> None:
    state, buffers = model_and_optimizer(), SnapshotBuffers()
    first = sorted(tensor.data_ptr() for tensor in tensors(buffers.take(state)()))
    second = sorted(tensor.data_ptr() for tensor in tensors(buffers.take(state)()))
    assert first == second
    mine = {tensor.data_ptr() for tensor in tensors(state)}
    assert mine.isdisjoint(first)


def test_a_state_that_cannot_be_saved_is_refused_at_once() -> None:
    with pytest.raises(Exception, match="pickle"):
        SnapshotBuffers().take({"function": lambda: None})


@pytest.mark.parametrize("device", DEVICES)
def test_a_snapshot_of_a_device_is_on_the_host(device: str) -> None:
    state, buffers = {"a": torch.randn(1000, device=device), "b": torch.randn(3)}, SnapshotBuffers()
    expected = state["a"].cpu().clone()
    copy = buffers.take(state)()
    state["a"].zero_()
    assert copy["a"].device.type == "cpu"
    assert copy["a"].is_pinned() == (device == "cuda")
    assert not copy["b"].is_pinned()
    assert torch.equal(copy["a"], expected)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_saved_is_the_state_at_the_step_boundary(tmp_path: Path, asynchronous: bool) -> None:
    settings = CheckpointSettings(asynchronous=asynchronous)
    session = Session.start(environ={}, default_dir=tmp_path, settings=settings)
    session.resume()
    let, commit = threading.Event(), session.store.commit

    def held(*arguments: Any, **options: Any) -> Any:
        assert let.wait(60)
        return commit(*arguments, **options)

    if asynchronous:
        session.store.commit = held  # type: ignore[method-assign]
    weights, rows = torch.zeros(1000), [1]
    StateSaver(session).save({"weights": weights, "rows": rows}, step=1, epoch=0)
    for _ in range(10):
        weights.add_(1)
        rows.append(2)
    let.set()
    session.finish_save()
    found = session.store.find()
    assert found is not None
    loaded = torch.load(found.path, weights_only=True)
    assert torch.equal(loaded["weights"], torch.zeros(1000))
    assert loaded["rows"] == [1]
    session.close()


def test_no_copy_is_made_of_what_is_saved_before_leaving(tmp_path: Path) -> None:
    session = Session.start(environ={}, default_dir=tmp_path, settings=CheckpointSettings(asynchronous=True))
    session.resume()
    saver = StateSaver(session)

    class Refusing(SnapshotBuffers):
        def take(self, state: Any) -> Any:
            raise AssertionError("a snapshot")

    saver._snapshots = Refusing()
    saver.save({"weights": torch.ones(3)}, step=1, epoch=0, leaving=True)
    assert session.last_manifest is not None
    session.close()

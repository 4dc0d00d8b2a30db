"""Sharded checkpoints of FSDP2 trainings, with real ranks on gloo: exact at the same number of ranks, the same state at
another, and complete or absent whatever happens to one of the ranks."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint import open_store
from orchestrator.checkpoint.coverage import parse_index
from orchestrator.integrations.torch import agree, resume_path
from orchestrator.paths import RunPaths
from orchestrator.registry import read_events
from orchestrator.states import ExitCode
from orchestrator.worker.session import Session
from tests.integration.forked import outputs, run_ranks
from tests.integration.sharded_toy import STEPS, Sharded, train, verdict
from tests.integration.test_exact_loops import differences

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that nobody touched."""
    run_dir = tmp_path_factory.mktemp("untouched")
    assert attempt(Sharded(), run_dir, 0) == [0, 0], outputs(run_dir, 0)
    return run_dir


def attempt(plan: Sharded, run_dir: Path, number: int, *, world_size: int = 2) -> list[int]:
    return run_ranks(partial(train, plan, run_dir), run_dir, world_size=world_size, attempt=number)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def steps(run_dir: Path) -> list[int]:
    return [manifest.step for manifest in open_store(str(run_dir / "checkpoints")).manifests()]


def resumed(run_dir: Path) -> list[int]:
    return [event["step"] for event in read_events(RunPaths(run_dir)) if event["event"] == "resumed"]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_stops_leave_no_trace(untouched: Path, tmp_path: Path, rank: int) -> None:
    for number, at in enumerate((2, 6)):
        assert attempt(Sharded(at=at, rank=rank), tmp_path, number) == [0, 0], outputs(tmp_path, number)
        assert verdict(tmp_path, number)["outcome"] == "saved"
    assert attempt(Sharded(), tmp_path, 2) == [0, 0], outputs(tmp_path, 2)
    assert resumed(tmp_path) == [3, 7]
    for name in ("final.pt", "final-0.pt", "final-1.pt"):
        assert differences(load(untouched / name), load(tmp_path / name)) == []
    buffers = [load(tmp_path / f"final-{r}.pt")["buffers"] for r in (0, 1)]
    assert differences(*buffers)  # batch statistics do differ: every rank got its own back


def test_after_a_kill_the_last_save_is_gone_on_from(untouched: Path, tmp_path: Path) -> None:
    killed = Sharded(every_steps=4, at=6, signal=signal.SIGKILL)
    assert attempt(killed, tmp_path, 0)[1] == -signal.SIGKILL  # the other follows, killed or by itself
    assert attempt(Sharded(every_steps=4), tmp_path, 1) == [0, 0], outputs(tmp_path, 1)
    assert resumed(tmp_path) == [4]
    for name in ("final.pt", "final-0.pt", "final-1.pt"):
        assert differences(load(untouched / name), load(tmp_path / name)) == []


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_any_number_of_ranks_loads_what_was_saved(tmp_path: Path, before: int, after: int) -> None:
    stopped = Sharded(at=4, rank=before - 1)
    assert set(attempt(stopped, tmp_path, 0, world_size=before)) == {0}, outputs(tmp_path, 0)
    [manifest] = open_store(str(tmp_path / "checkpoints")).manifests()
    assert manifest.world_size == before
    assert set(attempt(Sharded(), tmp_path, 1, world_size=after)) == {0}, outputs(tmp_path, 1)
    assert resumed(tmp_path) == [5]
    assert differences(load(tmp_path / "saved-0.pt"), load(tmp_path / "loaded-1.pt")) == []
    assert verdict(tmp_path, 1)["step"] == STEPS


def test_the_files_say_what_they_hold(tmp_path: Path) -> None:
    attempt(Sharded(at=4), tmp_path, 0)
    [manifest] = open_store(str(tmp_path / "checkpoints")).manifests()
    stem = manifest.name.stem
    assert [entry.name.removeprefix(stem) for entry in manifest.files] == [
        ".ckpt",
        ".index.json",
        ".shard-0000.ckpt",
        ".shard-0001.ckpt",
    ]
    assert set(names(tmp_path)) >= {entry.name for entry in manifest.files}
    directory = tmp_path / "checkpoints"
    assert (directory / "last.ckpt").readlink() == Path(f"{stem}.ckpt")
    plain = load(directory / "last.ckpt")  # readable without orch
    assert plain["state"]["step"] == 5
    weight = plain["state"]["parts"]["training"]["model"]["0.weight"]
    assert (tuple(weight.shape), weight.device.type) == ((7, 12), "meta")
    index = parse_index((directory / f"{stem}.index.json").read_bytes(), file_name="")
    pieces = index.tensors["parts.training.model.0.weight"].chunks
    assert [(chunk.offsets, chunk.sizes, chunk.shard) for chunk in pieces] == [
        ((0, 0), (4, 12), 0),
        ((4, 0), (3, 12), 1),
    ]
    shard = load(directory / f"{stem}.shard-0001.ckpt")
    saved = load(tmp_path / "saved-0.pt")["model"]["0.weight"]
    assert torch.equal(shard["pieces"]["parts.training.model.0.weight@4,0"], saved[4:])
    # The padding of an uneven shard, which is in the same storage, is not written.
    storages = [piece.untyped_storage().nbytes() - piece.nbytes for piece in shard["pieces"].values()]
    assert set(storages) == {0}


# --- one rank fails


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_disk_is_full_fails_all_and_the_previous_checkpoint_stands(tmp_path: Path, rank: int) -> None:
    failing = Sharded(every_steps=4, at=7, rank=rank, file_limit=6000)
    assert attempt(failing, tmp_path, 0) == [1, 1], outputs(tmp_path, 0)
    assert steps(tmp_path) == [4]
    assert not [name for name in names(tmp_path) if "step-000000008" in name]  # both shards were taken back
    said = [verdict(tmp_path, 0)]
    if (tmp_path / "verdict-000.rank1.json").exists():  # unless it came so late that it could see rank 0's
        said.append(json.loads((tmp_path / "verdict-000.rank1.json").read_text()))
    for words in said:
        assert (words["outcome"], words["reason"]) == ("failed", "checkpoint_failure")
        assert f"rank {rank} could not save its part of step 8" in words["message"]
        assert "File too large (EFBIG)" in words["message"]
    assert attempt(Sharded(), tmp_path, 1) == [0, 0], outputs(tmp_path, 1)
    assert resumed(tmp_path) == [4]


@pytest.mark.parametrize(
    ("rank", "part"), [(1, "shard-0001.ckpt"), (0, "shard-0000.ckpt"), (0, "ckpt"), (0, "index.json")]
)
def test_a_rank_that_is_killed_while_it_writes_leaves_nothing_to_be_seen(tmp_path: Path, rank: int, part: str) -> None:
    dying = Sharded(every_steps=4, at=7, rank=rank, die_writing=part)
    assert attempt(dying, tmp_path, 0)[rank] == -signal.SIGKILL, outputs(tmp_path, 0)
    assert steps(tmp_path) == [4]
    leftovers = [name for name in names(tmp_path) if "step-000000008" in name]
    assert any(part in name for name in leftovers)  # it did die there
    assert attempt(Sharded(every_steps=2), tmp_path, 1) == [0, 0], outputs(tmp_path, 1)
    assert resumed(tmp_path) == [4]
    assert not set(leftovers) & set(names(tmp_path))
    assert steps(tmp_path) == [10, 8, 6]


def test_a_piece_that_nobody_wrote_is_missed_before_anything_is_published(tmp_path: Path) -> None:
    assert attempt(Sharded(every_steps=4, at=7, forget=True), tmp_path, 0) == [1, 1], outputs(tmp_path, 0)
    said = verdict(tmp_path, 0)["message"]
    assert "36 of 84 elements are in no shard" in said  # 3 of 7 rows of 12
    assert "parts.training.model.0.weight" in said
    assert steps(tmp_path) == [4]
    assert not [name for name in names(tmp_path) if "step-000000008" in name]


def test_an_attempt_that_was_replaced_leaves_on_all_ranks(tmp_path: Path) -> None:
    plan = Sharded(every_steps=4, at=7, rank=0, take_over=True)
    assert attempt(plan, tmp_path, 0) == [ExitCode.NEVER_RESTART] * 2, outputs(tmp_path, 0)
    assert verdict(tmp_path, 0)["outcome"] == "fenced"
    assert steps(tmp_path) == [4]


# --- damage


@pytest.mark.parametrize("harm", ["remove", "flip"])
def test_a_damaged_shard_sets_all_aside_and_the_older_checkpoint_is_used(
    untouched: Path, tmp_path: Path, harm: str
) -> None:
    attempt(Sharded(every_steps=4, at=8, signal=signal.SIGKILL), tmp_path, 0)
    newest = open_store(str(tmp_path / "checkpoints")).manifests()[0]
    assert newest.step == 8
    shard = tmp_path / "checkpoints" / newest.name.part("shard-0001.ckpt")
    if harm == "remove":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    assert attempt(Sharded(), tmp_path, 1) == [0, 0], outputs(tmp_path, 1)
    assert resumed(tmp_path) == [4]
    [rejected] = [event for event in read_events(RunPaths(tmp_path)) if event["event"] == "checkpoint_rejected"]
    assert "shard-0001.ckpt" in rejected["reason"]
    aside = [name for name in names(tmp_path) if newest.name.stem in name]
    assert aside
    assert all(name.endswith(".corrupt") for name in aside)
    assert differences(load(untouched / "final.pt"), load(tmp_path / "final.pt")) == []


# --- programs that do not fit


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (Sharded(width=13), "was saved as float32 [7, 12], this program has float32 [7, 13]"),
        (Sharded(dtype=torch.float64), "was saved as float32 [7, 12], this program has float64 [7, 12]"),
    ],
)
def test_another_model_is_refused_on_all_ranks(tmp_path: Path, changed: Sharded, words: str) -> None:
    attempt(Sharded(at=2), tmp_path, 0)
    assert attempt(changed, tmp_path, 1) == [1, 1], outputs(tmp_path, 1)
    assert words in verdict(tmp_path, 1)["message"]
    assert attempt(replace(Sharded(), at=5), tmp_path, 2) == [0, 0]  # nothing was harmed
    assert resumed(tmp_path)[-1] == 3


def resume_as_one_file(run_dir: Path) -> None:
    session = Session.start(agree=agree)
    with session.guard():
        resume_path(session)


def commit_one_file(run_dir: Path) -> None:
    session = Session.start(agree=agree)
    session.resume()
    session.commit(lambda file: torch.save({"step": 3}, file), step=3, epoch=0)


def test_programs_for_shards_and_for_one_file_refuse_each_others_checkpoints(tmp_path: Path) -> None:
    one, shards = tmp_path / "one", tmp_path / "shards"
    attempt(Sharded(at=2), shards, 0)
    assert run_ranks(partial(resume_as_one_file, shards), shards, world_size=1, attempt=1) == [1]
    assert "step 3 lies in shards" in verdict(shards, 1)["message"]
    assert run_ranks(partial(commit_one_file, one), one, world_size=1, attempt=0) == [0], outputs(one, 0)
    assert attempt(Sharded(), one, 1) == [1, 1]
    assert "step 3 is one file" in verdict(one, 1)["message"]

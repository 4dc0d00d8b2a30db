"""Training whose checkpoints lie in an object store, on both kinds of S3 servers: exact resume, other nodes, fences."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import operations
from orchestrator.checkpoint import Refuge, open_store, take_over
from orchestrator.errors import CheckpointCorrupt
from orchestrator.integrations.torch import agree, resume_path
from orchestrator.operations.checkpoints import open_run_store
from orchestrator.paths import RunPaths
from orchestrator.registry import read_events
from orchestrator.worker.session import Session
from tests.integration.forked import outputs, run_ranks
from tests.integration.sharded_toy import Sharded
from tests.integration.sharded_toy import train as train_sharded
from tests.integration.test_exact_loops import assert_exact, differences
from tests.integration.toy import Toy, train, verdict
from tests.objects.servers import KEY, KINDS, SECRET, Server, serving
from tests.polling import poll

pytestmark = pytest.mark.slow

CONTENT = b"the state of step 10" * 1000


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(request.param, tmp_path_factory.mktemp(request.param)) as running:
        yield running


@dataclass(frozen=True)
class Remote:
    """A run with its checkpoints in a bucket: what its agent would tell its ranks."""

    run_dir: Path
    server: Server
    url: str
    fence: str = "store"

    def plan(self) -> None:
        path = RunPaths(self.run_dir).agent_plan
        path.parent.mkdir(parents=True)
        checkpoint = {
            "every_steps": 5, "scratch": str(self.run_dir / "scratch"), "fence": self.fence,
            "storage_options": {"endpoint_url": self.server.endpoint},
        }  # fmt: skip
        checkpoint |= {"uri": self.url, "keep_last": 2}
        path.write_text(json.dumps({"run_dir": str(self.run_dir), "checkpoint": checkpoint}))
        (self.run_dir / "scratch").mkdir()

    @property
    def variables(self) -> dict[str, str]:
        return {"ORCH_CHECKPOINT_URI": self.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}

    def names(self) -> list[str]:
        found = self.server.files().ls(self.url.removeprefix("s3://"), detail=False, refresh=True)
        return [str(path).rpartition("/")[2] for path in found]

    def on_disk(self) -> list[str]:
        directory = self.run_dir / "checkpoints"
        return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


@pytest.fixture
def remote(server: Server, tmp_path: Path) -> Remote:
    run = Remote(tmp_path / "run-1", server, f"s3://{server.new_bucket()}/pre fix/run-1")
    run.plan()
    return run


def ended_well(codes: list[int], run_dir: Path, attempt: int) -> None:
    assert set(codes) == {0}, outputs(run_dir, attempt)


def test_a_run_stopped_twice_is_exact(remote: Remote, tmp_path: Path) -> None:
    untouched = tmp_path / "untouched"
    ended_well(run_ranks(partial(train, Toy(), untouched), untouched, world_size=2, attempt=0), untouched, 0)
    run_dir = remote.run_dir
    for number, toy in enumerate([Toy(at=3), Toy(at=12, signal=signal.SIGTERM), Toy()]):
        codes = run_ranks(
            partial(train, toy, run_dir), run_dir, world_size=2, attempt=number, variables=remote.variables
        )
        ended_well(codes, run_dir, number)
        if toy.at is not None:
            saved = verdict(run_dir, number)
            assert saved["outcome"] == "saved"
            # In a hurry, to the disk: the store's answer is not waited for, and its pointer does not name it.
            assert saved["checkpoint"].startswith(str(run_dir / "checkpoints"))
            assert Path(saved["checkpoint"]).name not in remote.names()
    assert_exact(untouched, run_dir)
    assert remote.on_disk() == []  # all brought in
    left = {path.name.partition(".")[0] for path in (run_dir / "scratch").glob("*/*")}
    assert left == {"attempt-002"}  # it left by os._exit, not as an interpreter does: see test_scratch.py
    resumed = [event for event in read_events(RunPaths(run_dir)) if event["event"] == "resumed"]
    assert [event["step"] for event in resumed] == [verdict(run_dir, number)["step"] for number in (0, 1)]
    assert all(event["checkpoint"].startswith(remote.url) for event in resumed)


@pytest.mark.parametrize("told", [0, 1])  # the rank that hears of the stop
def test_a_sharded_run_is_exact_and_every_node_fetches_the_shards_it_needs(
    remote: Remote, tmp_path: Path, told: int
) -> None:
    untouched = tmp_path / "untouched"
    codes = run_ranks(partial(train_sharded, Sharded(), untouched), untouched, world_size=2, attempt=0)
    ended_well(codes, untouched, 0)
    run_dir = remote.run_dir
    killed = Sharded(at=5, signal=signal.SIGKILL)  # after a save into the bucket; the next one saves to the disk
    for number, plan in enumerate([killed, Sharded(at=6, rank=told), Sharded()]):
        codes = run_ranks(
            partial(train_sharded, plan, run_dir),
            run_dir,
            world_size=2,
            attempt=number,
            ranks_per_node=1,
            variables=remote.variables,
        )
        if plan is not killed:
            ended_well(codes, run_dir, number)
        if number == 1:
            assert any("shard-0001.ckpt" in name for name in remote.on_disk())
    resumed = [event["step"] for event in read_events(RunPaths(run_dir)) if event["event"] == "resumed"]
    assert resumed == [5, 7]
    for name in ("final.pt", "final-0.pt", "final-1.pt"):
        states = [torch.load(run / name, weights_only=True) for run in (untouched, run_dir)]
        assert differences(*states) == []
    assert remote.on_disk() == []  # all shards were brought in
    assert any("shard-0001.ckpt" in name for name in remote.names())


def commit_one(remote: Remote) -> None:
    options = remote.server.storage_options
    store = open_store(remote.url, storage_options=options, scratch=remote.run_dir / "made")
    _, fence = take_over(store, attempt=0)
    store.commit(fence, lambda file: file.write(CONTENT), step=10, epoch=0, world_size=1)


def note_resume_path(run_dir: Path, broken_rank: int | None = None) -> None:
    """A rank that notes where it would resume from, and whether the file is there."""
    rank = int(os.environ["RANK"])
    session = Session.start(agree=agree)
    if rank == broken_rank:  # a node whose disk is full, say
        session.fetch = lambda name: session.store.fetch(name + "x").path  # type: ignore[method-assign]
    try:
        with session.guard():
            path = resume_path(session)
        assert path is not None
        (run_dir / f"found-{rank}.json").write_text(json.dumps([path, Path(path).read_bytes() == CONTENT]))
    finally:
        (run_dir / f"through-{rank}").touch()
        if rank == 0:  # it hosts the key-value store
            poll(lambda: len(list(run_dir.glob("through-*"))) == 4, "the other ranks", timeout=60)


def found(run_dir: Path) -> list[Any]:
    return [json.loads((run_dir / f"found-{rank}.json").read_text()) for rank in range(4)]


def test_every_node_fetches_one_copy(remote: Remote) -> None:
    commit_one(remote)
    run_dir = remote.run_dir
    codes = run_ranks(
        partial(note_resume_path, run_dir), run_dir,
        world_size=4, attempt=1, ranks_per_node=2, variables=remote.variables,
    )  # fmt: skip
    ended_well(codes, run_dir, 1)
    paths = [path for path, same in found(run_dir) if same]
    assert len(paths) == 4
    assert paths[0] == paths[1]
    assert paths[2] == paths[3]
    assert paths[0] != paths[2]


def test_a_node_that_cannot_fetch_says_so_on_all_its_ranks(remote: Remote) -> None:
    commit_one(remote)
    run_dir = remote.run_dir
    codes = run_ranks(
        partial(note_resume_path, run_dir, broken_rank=2), run_dir,
        world_size=4, attempt=1, ranks_per_node=2, variables=remote.variables,
    )  # fmt: skip
    assert codes[2] != 0
    assert codes[3] != 0
    assert "the first rank of this node could not fetch the checkpoint" in outputs(run_dir, 1)
    failed = json.loads((run_dir / "verdict-001.rank2.json").read_text())
    assert (failed["outcome"], failed["reason"]) == ("failed", "checkpoint_failure")


def test_a_person_looks_after_checkpoints_in_a_bucket(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in remote.variables.items():
        monkeypatch.setenv(name, value)
    run = str(remote.run_dir)
    assert operations.list_checkpoints(run) == []
    store = open_run_store(RunPaths(remote.run_dir))
    _, fence = take_over(store, attempt=0)
    for step in (10, 20, 30):
        store.commit(fence, lambda file: file.write(CONTENT), step=step, epoch=0, world_size=1)
    refuge = Refuge(RunPaths(remote.run_dir).checkpoints)
    refuge.open().commit(fence, lambda file: file.write(CONTENT), step=34, epoch=0, world_size=1)

    listed = operations.list_checkpoints(run)
    assert [(entry.step, entry.valid, entry.size_bytes) for entry in listed] == [
        (step, True, len(CONTENT)) for step in (34, 30, 20, 10)
    ]
    assert listed[0].path.startswith(f"{remote.run_dir}/checkpoints/step-000000034.")
    assert listed[1].path.startswith(f"{remote.url}/step-000000030.")
    assert all(entry.valid for entry in operations.verify_checkpoints(run))
    copy = operations.pull_checkpoint(run, tmp_path / "copy", step=20)
    assert copy.path.read_bytes() == CONTENT

    done = operations.collect_checkpoints(run)
    assert done.steps_left == (34, 30)  # the save that had not reached the bucket is the newest, and not lost
    assert done.freed_bytes > 2 * len(CONTENT)
    assert operations.rollback(run, step=30).checkpoints_given_up == 1
    result, _ = take_over(open_run_store(RunPaths(remote.run_dir)), attempt=1)
    assert result is not None
    assert result.manifest.step == 30


def test_a_save_that_had_no_time_for_the_bucket_is_pushed_by_hand(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in remote.variables.items():
        monkeypatch.setenv(name, value)
    run = str(remote.run_dir)
    store = open_run_store(RunPaths(remote.run_dir))
    _, fence = take_over(store, attempt=0)
    store.commit(fence, lambda file: file.write(CONTENT), step=10, epoch=0, world_size=1)
    assert operations.push_checkpoint(run).step is None
    refuge = Refuge(RunPaths(remote.run_dir).checkpoints)
    for step in (17, 18):
        manifest = refuge.open().commit(fence, lambda file: file.write(CONTENT), step=step, epoch=0, world_size=1)
    read: list[int] = []
    pushed = operations.push_checkpoint(run, reading=lambda count, total: read.append(count))
    assert (pushed.step, pushed.path, pushed.size_bytes) == (18, f"{remote.url}/{manifest.name.data}", len(CONTENT))
    assert sum(read) == len(CONTENT)
    assert remote.on_disk() == []
    result, _ = take_over(open_run_store(RunPaths(remote.run_dir)), attempt=1)
    assert result is not None
    assert result.manifest.step == 18
    assert operations.push_checkpoint(run).step is None


def test_a_damaged_save_is_not_pushed(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in remote.variables.items():
        monkeypatch.setenv(name, value)
    _, fence = take_over(open_run_store(RunPaths(remote.run_dir)), attempt=0)
    directory = RunPaths(remote.run_dir).checkpoints
    manifest = Refuge(directory).open().commit(fence, lambda file: file.write(CONTENT), step=17, epoch=0, world_size=1)
    (directory / manifest.name.data).write_bytes(b"short")
    with pytest.raises(CheckpointCorrupt, match="step 17 is damaged"):
        operations.push_checkpoint(str(remote.run_dir))
    assert manifest.name.data in remote.on_disk()
    assert manifest.name.manifest not in remote.names()


def test_a_weak_store_is_named_once_an_attempt(remote: Remote) -> None:
    run_dir = remote.run_dir
    codes = run_ranks(partial(train, Toy(), run_dir), run_dir, world_size=1, attempt=0, variables=remote.variables)
    ended_well(codes, run_dir, 0)
    told = [event["message"] for event in read_events(RunPaths(run_dir)) if event.get("action") == "weak_store"]
    assert len(told) == (0 if remote.server.kind == "moto" else 2)
    assert not any(name.startswith(".orch-probe") for name in remote.names())

"""A small FSDP2 training with everything that a sharded checkpoint must bring back: uneven shards, tensors that are not
sharded, some of which differ between the ranks (batch statistics), random states, a schedule."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.futures import Future

from orchestrator.checkpoint import CheckpointName, FileEntry, open_store, take_over
from orchestrator.integrations import sharded
from orchestrator.integrations.sharded import ModelAndOptimizer, RandomState, ShardedLoop
from orchestrator.integrations.torch import agree
from orchestrator.worker.session import CheckpointSettings, Session

WIDTH, HIDDEN, STEPS = 12, 7, 10  # 7 rows on 2 ranks: 4 and 3


@dataclass(frozen=True)
class Sharded:
    """What to train, and what goes wrong: at the end of step `at`, on one rank."""

    every_steps: int | None = None
    at: int | None = None
    rank: int = 1
    signal: int = signal.SIGUSR1
    take_over: bool = False  # another attempt claims the run instead
    file_limit: int | None = None  # bytes, from step `at` on: a full disk
    die_writing: str | None = None  # the part in the middle of whose writing the rank is killed, from step `at` on
    forget: bool = False  # the rank writes all of its pieces but one
    width: int = WIDTH
    dtype: torch.dtype = torch.float32


def build(plan: Sharded) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(plan.width, HIDDEN),
        nn.BatchNorm1d(HIDDEN),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(HIDDEN, 64),
        nn.Linear(64, 1),  # one row: the second rank has nothing of it
    ).to(plan.dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[4], model[5]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def train(plan: Sharded, run_dir: Path) -> None:
    """One attempt, in this process; ends it when interrupted."""
    torch.set_num_threads(1)
    session = Session.start(agree=agree, settings=CheckpointSettings(every_steps=plan.every_steps, every_epochs=None))
    if session.world_size > 1:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    with session.guard():
        model, optimizer, schedule = build(plan)
        torch.manual_seed(100 + session.rank)  # dropout
        training = ModelAndOptimizer(model, optimizer)
        loop = ShardedLoop(session, {"training": training, "schedule": schedule}, own={"random": RandomState()})
        if loop.step:
            dump(training, run_dir / f"loaded-{session.attempt}.pt")
        while loop.step < STEPS:
            generator = torch.Generator().manual_seed(1000 * loop.step + session.rank)
            optimizer.zero_grad()
            model(torch.randn(6, plan.width, generator=generator, dtype=plan.dtype)).square().mean().backward()
            optimizer.step()
            schedule.step()
            if loop.step == plan.at:
                dump(training, run_dir / f"saved-{session.attempt}.pt")
                go_wrong(plan, session)
            loop.step_done()
        dump(training, run_dir / "final.pt")
        own = {"buffers": dict(model.named_buffers()), "random": torch.get_rng_state(), "lr": schedule.get_last_lr()}
        torch.save(own, run_dir / f"final-{session.rank}.pt")
        if session.is_chief:
            session.verdict("completed", step=loop.step, epoch=loop.epoch)


def go_wrong(plan: Sharded, session: Session) -> None:
    if session.rank != plan.rank:
        return
    if plan.take_over:
        take_over(open_store(session.store.uri), attempt=session.attempt + 1)
    elif plan.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan.file_limit, plan.file_limit))
    elif plan.forget:
        forget_a_piece()
    elif plan.die_writing is not None:
        die_writing(session, None if plan.die_writing == "ckpt" else plan.die_writing)
    else:
        os.kill(os.getpid(), plan.signal)


def forget_a_piece() -> None:
    original = sharded._Writer.write_data

    def write_data(self: sharded._Writer, saved: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        return original(self, replace(saved, items=saved.items[1:]), planner)

    sharded._Writer.write_data = write_data  # type: ignore[method-assign]


def die_writing(session: Session, fatal: str | None) -> None:
    original = session.store.write_part

    def half_of_it(file: BinaryIO) -> None:
        file.write(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    def write_part(
        name: CheckpointName, write: Callable[[BinaryIO], object], *, part: str | None = None, **options: Any
    ) -> FileEntry:
        return original(name, half_of_it if part == fatal else write, part=part, **options)

    session.store.write_part = write_part  # type: ignore[method-assign]


def dump(training: ModelAndOptimizer, path: Path) -> None:
    """The whole state, of all ranks together. Collective."""
    whole = gathered(training.state_dict())
    if dist.get_rank() == 0:
        torch.save(whole, path)


def gathered(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: gathered(value) for key, value in node.items()}
    if isinstance(node, DTensor):
        return node.full_tensor()
    return node.clone() if isinstance(node, Tensor) else node


def verdict(run_dir: Path, attempt: int) -> dict[str, Any]:
    return dict(json.loads((run_dir / f"verdict-{attempt:03d}.json").read_text()))

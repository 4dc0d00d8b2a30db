"""Training for test_random_stops.py: order, noise, dropout, batch norm, Adam and its schedule all leave their mark.

While the file `unbound` is missing, an attempt makes at most PER_ATTEMPT steps, and slow ones, then waits to be
stopped: a slow driver must not find the run finished. The last thing it does waits for the file `may_end`.
"""

import time

import torch
from torch import nn

from orchestrator.integrations.randomness import SeededDataset, exact_loader_options, seed_step
from orchestrator.integrations.sampler import ExactBatchSampler
from orchestrator.integrations.torch import ResumableLoop, agree
from orchestrator.registry import MetricsLog
from orchestrator.worker.session import Session

SEED, SIZE, WIDTH, BATCH = 11, 200, 32, 16
PER_ATTEMPT, PACE_S = 24, 0.02


class Noisy(torch.utils.data.Dataset[torch.Tensor]):
    """Samples with a random part that is drawn in the loader's worker."""

    def __init__(self) -> None:
        self._data = torch.randn(SIZE, WIDTH, generator=torch.Generator().manual_seed(SEED))

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._data[index] + 0.1 * torch.randn(WIDTH)


class Rows:
    """metrics.csv as a part of the checkpoint: it notes how many rows there are."""

    def __init__(self) -> None:
        self.kept: int | None = None
        self.log: MetricsLog | None = None

    def state_dict(self) -> dict[str, int]:
        assert self.log is not None
        self.log.sync()
        return {"rows": self.log.rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.kept = state["rows"]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, WIDTH),
    )  # fmt: skip


def loader_of(sampler: ExactBatchSampler) -> torch.utils.data.DataLoader[torch.Tensor]:
    return torch.utils.data.DataLoader(
        SeededDataset(Noisy(), seed=SEED), batch_sampler=sampler, persistent_workers=True, **exact_loader_options(1)
    )


def wait_for(session: Session, name: str) -> None:
    """Until the file is there, or the run is to stop."""
    while not (session.run_dir / name).exists() and not session.stop_requested:
        time.sleep(0.01)


def hold_back(session: Session, *, made: int) -> None:
    """Slow down, and stand still once this attempt has made its steps."""
    if not (session.run_dir / "unbound").exists():
        time.sleep(PACE_S)
        if made >= PER_ATTEMPT:
            wait_for(session, "unbound")


def main(epochs: int) -> None:
    session = Session.start(agree=agree)
    torch.manual_seed(SEED)
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    sampler = ExactBatchSampler(SIZE, BATCH, seed=SEED)
    max_steps = epochs * len(sampler)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    loader = loader_of(sampler)
    rows = Rows()
    with session.guard():
        parts = {"net": net, "optimizer": optimizer, "schedule": schedule, "rows": rows}
        loop = ResumableLoop(session, parts, max_steps=max_steps)
        first = loop.step
        rows.log = session.open_metrics(keep_rows=rows.kept)
        said = (session.run_dir / "said.txt").open("a", buffering=1)
        for epoch in range(loop.epoch, epochs):
            sampler.seek(epoch, loop.batch)
            for batch_idx, batch in enumerate(loader, start=loop.batch):
                hold_back(session, made=loop.step - first)
                seed_step(SEED, epoch=epoch, batch=batch_idx, rank=session.rank)
                loss = (net(batch) - batch).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                rows.log.append(loop.step + 1, epoch, {"loss": loss.item(), "lr": schedule.get_last_lr()[0]})
                said.write(f"{session.attempt} {loop.step + 1}\n")
                loop.step_done()
            loop.epoch_done()
        (session.run_dir / "ending").write_text(str(session.attempt))
        wait_for(session, "may_end")
        if session.stop_requested:
            session.stopped(step=loop.step, epoch=loop.epoch)
        export = session.run_dir / "final.pt"
        torch.save(net.state_dict(), export.with_suffix(".partial"))
        export.with_suffix(".partial").replace(export)
        session.verdict("completed", step=loop.step, epoch=loop.epoch)


if __name__ == "__main__":
    import sys

    main(int(sys.argv[1].partition("=")[2]))

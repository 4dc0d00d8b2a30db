"""What ExactResume costs a training step: bare Lightning steps and steps with the callback, taken in turns in one run.

    python benchmarks/callback_overhead.py [--steps 240] [--json]

ResNet-18, 64 pixels, batch 16, one process, no save in between. Every step is timed from its `on_train_batch_start` to
its last `on_train_batch_end`, alternately with the callback's hooks and without them, so that whatever else the machine
does hits both alike. `callback_share_of_bare_step` is the median time inside the hooks over the median bare step: the
cost. `callback_step_ratio` compares the medians of the two kinds of step; a busy machine makes it vary by some per
cent, so its bound is loose: it would show a cost outside the hooks.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.integrations.lightning import ExactResume
from orchestrator.worker.session import CheckpointSettings

TARGET = 0.01
RATIO_BOUND = 1.05
WARM_UP_STEPS = 10


class _Block(nn.Module):
    """The basic block of ResNet-18 (He et al., 2016)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet18(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        widths = (64, 64, 128, 256, 512)
        blocks = [
            block
            for stage in range(4)
            for block in (
                _Block(widths[stage], widths[stage + 1], 1 if stage == 0 else 2),
                _Block(widths[stage + 1], widths[stage + 1], 1),
            )
        ]
        self.net = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class TakingTurns(pl.Callback):
    """Stands in for `exact` in the trainer and lets it take part in every second step only."""

    def __init__(self, exact: ExactResume) -> None:
        self.exact = exact
        self.steps: dict[bool, list[float]] = {True: [], False: []}
        self.hooks: list[float] = []
        self._begin = self._inside = 0.0

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self.exact.setup(*args, **kwargs)

    def on_train_start(self, *args: Any) -> None:
        self.exact.on_train_start(*args)

    def on_train_batch_start(self, *args: Any) -> None:
        self._begin = time.perf_counter()
        if args[-1] % 2:
            self.exact.on_train_batch_start(*args)
            self._inside = time.perf_counter() - self._begin

    def on_train_batch_end(self, *args: Any) -> None:
        taking_part = bool(args[-1] % 2)
        entered = time.perf_counter()
        if taking_part:
            self.exact.on_train_batch_end(*args)
        left = time.perf_counter()
        if args[-1] >= WARM_UP_STEPS:
            self.steps[taking_part].append(left - self._begin)
            if taking_part:
                self.hooks.append(self._inside + left - entered)

    def on_exception(self, *args: Any) -> None:
        self.exact.on_exception(*args)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        self.exact.teardown(*args, **kwargs)


def measure(steps: int) -> dict[str, dict[str, Any]]:
    """The figures, by name: value, target, ok."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        exact = ExactResume(seed=0, out=Path(folder), settings=CheckpointSettings(every_epochs=None))
        turns = TakingTurns(exact)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps + WARM_UP_STEPS,
            callbacks=[turns],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        images = torch.randn(16 * (steps + WARM_UP_STEPS), 3, 64, 64)
        sampler = exact.batch_sampler(len(images), 16)
        trainer.fit(ResNet18(), torch.utils.data.DataLoader(_Images(images), batch_sampler=sampler))
        exact.session.close()
    bare = statistics.median(turns.steps[False])
    share = statistics.median(turns.hooks) / bare
    ratio = statistics.median(turns.steps[True]) / bare
    return {
        "callback_share_of_bare_step": {"value": round(share, 6), "target": TARGET, "ok": share <= TARGET},
        "callback_step_ratio": {"value": round(ratio, 4), "target": RATIO_BOUND, "ok": ratio <= RATIO_BOUND},
    }


class _Images(torch.utils.data.Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        return self._images[key[0]]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("orchestrator").setLevel(logging.ERROR)
    figures = measure(options.steps)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, figure in figures.items():
            print(f"{name}: {figure['value']} (target {figure['target']}, {'ok' if figure['ok'] else 'MISSED'})")
    return 0 if all(figure["ok"] for figure in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the same stops do to a plain Lightning job with a batch script written by hand, for docs/preemption.md.

    python -m tests.cluster.plain_lightning FILE        appends one JSON line per stop

The script and the program are what Lightning's own pages on Slurm ask for: `--signal=SIGUSR1@…`, auto-requeue (on by
default), a checkpoint at the end of every epoch, `ckpt_path="last"`. An epoch has 200 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import processes, test_stops
from tests.cluster.handle import FINAL, Cluster
from tests.cluster.service import ClusterError, wait_for

BEGIN_AT = 230  # in the middle of the second epoch
TIMEOUT_S = 150

PROGRAM = """
import os, pathlib, sys, time
import lightning.pytorch as pl
import torch

here = pathlib.Path(sys.argv[1])
restart = os.environ.get("SLURM_RESTART_COUNT", "0")

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(0.05)
        return self.net(batch).square().mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with open(here / "said.txt", "a") as said:
            said.write(f"{restart} {self.trainer.global_step}\\n")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

loader = torch.utils.data.DataLoader(torch.randn(1600, 8), batch_size=8, shuffle=True)
checkpoint = pl.callbacks.ModelCheckpoint(dirpath=here / "checkpoints", save_last=True)
trainer = pl.Trainer(accelerator="cpu", max_epochs=1000, default_root_dir=here, callbacks=[checkpoint], logger=False,
                     enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Model(), loader, ckpt_path="last")
"""

SCRIPT = """#!/bin/bash
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --mem=1G
#SBATCH --time={time}
#SBATCH --partition={partition}
#SBATCH --signal=SIGUSR1@30
#SBATCH --open-mode=append
#SBATCH --output={directory}/out.log
{more}
srun {python} {directory}/train.py {directory}
"""


@dataclass(frozen=True)
class PlainStop:
    """One of the rows of `test_stops`, as far as it makes sense without `orch`."""

    name: str
    act: Callable[[Any], None]
    settings: tuple[str, ...] = ()
    partition: str = "low"
    time: str = "00:10:00"
    more: str = ""


class PlainScene:
    """What the functions of `test_stops` need of a scene."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory
        self.job = ""
        self.started_at = 0.0

    def mark(self) -> None:
        self.started_at = time.monotonic()

    def ranks(self) -> list[int]:
        return processes.pythons(f"{self.directory}/train.py")

    def said(self) -> list[tuple[int, int]]:
        """(restart, step) of every step made."""
        path = self.directory / "said.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(restart), int(step)) for restart, step in (line.split() for line in lines)]


def kill_slurmd(scene: PlainScene) -> None:
    node = scene.cluster.job(scene.job)["NodeList"]
    scene.mark()
    scene.cluster.stop(node, signal="SIGKILL")


def kill_slurmstepd(scene: PlainScene) -> None:
    (rank,) = scene.ranks()
    scene.mark()
    os.kill(processes.parent(rank), signal.SIGKILL)


SETTINGS = {stop.name: stop.settings for stop in test_stops.STOPS}
PLAIN = (
    PlainStop("preemption, Slurm's defaults (GraceTime=20)", test_stops.preempt),
    PlainStop("preemption, preempt_send_user_signal without `B:`", test_stops.preempt),
    PlainStop("preemption, GraceTime=0", test_stops.preempt, partition="nograce"),
    PlainStop("preemption, PreemptMode=CANCEL", test_stops.preempt, partition="cancel"),
    PlainStop("preemption, JobRequeue=0", test_stops.preempt),
    PlainStop("preemption by QOS", test_stops.preempt_by_qos, more="#SBATCH --qos=low"),
    PlainStop("time limit", test_stops.nothing, time="00:01:00"),
    PlainStop("`scontrol requeue` by an administrator", test_stops.requeue_by_admin),
    PlainStop("`scancel` while running", test_stops.scancel),
    PlainStop("node failure: slurmd killed, SlurmdTimeout=10", kill_slurmd),
    PlainStop("slurmstepd killed", kill_slurmstepd),
    PlainStop("rank killed", test_stops.kill_a_rank),
)


def measure(stop: PlainStop, cluster: Cluster, directory: Path) -> dict[str, Any]:
    """Run the job, stop it, and look for what is left."""
    if SETTINGS[stop.name]:
        cluster.configure(*SETTINGS[stop.name])
    (directory / "train.py").write_text(PROGRAM)
    script = directory / "job.sh"
    script.write_text(
        SCRIPT.format(
            directory=directory, python=sys.executable, time=stop.time, partition=stop.partition, more=stop.more
        )
    )
    scene = PlainScene(cluster, directory)
    # Not Cluster.sbatch: its options would beat the script's.
    scene.job = cluster.run("sbatch", "--parsable", str(script)).stdout.strip()
    cluster.wait("the step to stop at", lambda: [line for line in scene.said() if line[1] >= BEGIN_AT], timeout=120)
    stop.act(scene)
    state, code, came_back = outcome(scene)
    lost = steps_lost(scene) if came_back else since_newest_checkpoint(scene)
    return {
        "plain": True,
        "slurm": cluster.slurm_version,
        "stop": stop.name,
        "state": state,
        "exit_code": code,
        "came_back": came_back,
        "lost": lost,
        "seconds": round(time.monotonic() - scene.started_at, 1),
    }


def outcome(scene: PlainScene) -> tuple[str, str, bool]:
    """(state and exit code that Slurm reports, whether it made a step again by itself)."""

    def look() -> tuple[str, str, bool] | None:
        job = scene.cluster.job(scene.job)
        made = scene.said()
        if made and made[-1][0] > 0:
            return job["JobState"], job["ExitCode"], True
        return (job["JobState"], job["ExitCode"], False) if job.get("JobState") in FINAL else None

    try:
        return wait_for("the end or a new beginning", look, timeout=TIMEOUT_S, interval=0.5) or ("", "", False)
    except ClusterError:
        return f"{scene.cluster.state(scene.job)}, for ever", "", False


def steps_lost(scene: PlainScene) -> int:
    made = scene.said()
    before = [step for restart, step in made if restart == 0]
    after = [step for restart, step in made if restart > 0]
    return max(0, before[-1] - after[0] + 1)


def since_newest_checkpoint(scene: PlainScene) -> int:
    """What a person who submits it again loses: steps made since the newest checkpoint that loads."""
    import torch

    saved = [torch.load(path, weights_only=False)["global_step"] for path in scene.directory.rglob("*.ckpt")]
    return scene.said()[-1][1] - max(saved, default=0)


def main() -> int:
    """Measure every row on a cluster of its own."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path)
    target = parser.parse_args().file
    cluster = Cluster.start("--no-docker")
    try:
        for stop in PLAIN:
            with tempfile.TemporaryDirectory(prefix="plain-") as directory:
                row = measure(stop, cluster, Path(directory))
                cluster.tidy()
            print(json.dumps(row), flush=True)
            with target.open("a") as table:
                table.write(json.dumps(row) + "\n")
    finally:
        cluster.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())

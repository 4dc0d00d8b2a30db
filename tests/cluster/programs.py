"""Programs that make steps and save them: most without torch, because these tests are about everything around training.

Each writes a line `attempt step word` to said.txt for every step it makes. `PAUSE_AT` (attempt 0 only) makes it wait at
a named point until the file `go` is there, so that a test can stop it exactly then.
"""

from __future__ import annotations

from typing import Any

from tests.cluster.orch import Orch

PAUSE = """
import os, pathlib, time
run_dir = pathlib.Path(os.environ["ORCH_RUN_DIR"])

def pause(point):
    if os.environ.get("PAUSE_AT") == point and os.environ["ORCH_ATTEMPT"] == "0":
        (run_dir / "paused").touch()
        while not (run_dir / "go").exists():
            time.sleep(0.02)

def say(attempt, step, word):
    with open(run_dir / "said.txt", "a") as said:
        said.write(f"{attempt} {step} {word}\\n")
"""

# Runs until the file `enough` is there; saves every 40 steps and when it is told to stop.
TRAIN = (
    PAUSE
    + """
import json
from orchestrator.worker.session import Session
from words import WORD

session = Session.start()
session.install_signal_handlers()
with session.guard():
    pause("start")
    found = session.resume()
    step = json.loads(found.path.read_text())["step"] if found else 0

    def save():
        def write(out):
            text = json.dumps({"step": step}).encode()
            out.write(text[:5])
            pause("save")
            out.write(text[5:])
        session.commit(write, step=step, epoch=0)

    while not (run_dir / "enough").exists():
        pause("step")
        time.sleep(0.05)
        step += 1
        session.report(step, 0, None)
        say(session.attempt, step, WORD)
        stop = session.stop_requested  # once: a signal after the save is for the next step
        if stop or step % 40 == 0:
            save()
        if stop:
            session.stopped(step=step, epoch=0)
    save()
    pause("export")
    (run_dir / "exported").touch()
    session.verdict("completed", step=step, epoch=0)
"""
)

# As TRAIN, until it eats more memory than it has been given, unless the file `fed` is there.
EATER = TRAIN.replace(
    'pause("step")', 'if step == 60 and not (run_dir / "fed").exists():\n            b"x" * 3 * 2**30'
)

# Fails before its first step until the file `mended` is there.
CRASHER = TRAIN.replace("    found =", '    assert (run_dir / "mended").exists(), "this can not work"\n    found =')

# Two ranks that meet in a collective at every step; rank 1 stays away from it for ever in attempt 0, after step 50.
COLLECTIVE = (
    PAUSE
    + """
import json, threading
import torch
import torch.distributed as dist
from orchestrator.integrations.torch import Agreement, agree
from orchestrator.worker.session import Session

dist.init_process_group("gloo")
session = Session.start(agree=agree)
session.install_signal_handlers()
with session.guard():
    found = session.resume()
    step = json.loads(found.path.read_text())["step"] if found else 0
    step = int(agree(str(step)))
    agreement = Agreement(2, session.world_size)

    def save():
        session.commit(lambda out: out.write(json.dumps({"step": step}).encode()), step=step, epoch=0)

    def stand_still():
        threading.Event().wait()

    while True:
        agreement.begin([int(session.stop_requested), int((run_dir / "enough").exists())])
        time.sleep(0.05)
        if step == 50 and session.attempt == 0 and session.rank == 1:
            stand_still()
        dist.all_reduce(torch.ones(1))
        step += 1
        stop, enough = agreement.finish()
        if session.is_chief:
            session.report(step, 0, None)
            say(session.attempt, step, "rank0")
            if stop or enough or step % 40 == 0:
                save()
        if stop:
            session.stopped(step=step, epoch=0, barrier=agreement.barrier)
        if enough:
            break
    if session.is_chief:
        session.verdict("completed", step=step, epoch=0)
"""
)

# The same with Lightning: 20 steps an epoch, then a validation.
LIGHTNING = (
    PAUSE
    + """
import lightning.pytorch as pl
import torch
from orchestrator.integrations.lightning import ExactResume, RunLogger, SeededDataset, exact_loader_options

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        pause("step")
        time.sleep(0.05)
        return self.net(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking and self.trainer.global_step > 0:
            pause("validation")
            time.sleep(0.05)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        say(exact.session.attempt, self.trainer.global_step, "lightning")
        if (run_dir / "enough").exists():
            self.trainer.should_stop = True

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

data = torch.randn(160, 8, generator=torch.Generator().manual_seed(1))
exact = ExactResume(seed=0)
sampler = exact.batch_sampler(len(data), batch_size=8)
loader = torch.utils.data.DataLoader(SeededDataset(data, seed=0), batch_sampler=sampler, **exact_loader_options(0))
trainer = pl.Trainer(
    accelerator="cpu", max_epochs=10_000, callbacks=[exact], logger=RunLogger(exact.session), log_every_n_steps=1,
    use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(Model(), loader, torch.utils.data.DataLoader(data, batch_size=8), ckpt_path=exact.ckpt_path)
"""
)


def script_spec(orch: Orch, program: str = TRAIN, **changes: Any) -> dict[str, Any]:
    workspace = orch.directory / "code"
    workspace.mkdir(exist_ok=True)
    (workspace / "train.py").write_text(program)
    (workspace / "words.py").write_text("WORD = 'first'\n")
    return {
        "name": "life",
        "backend": "slurm",
        "job": {"script": "code/train.py"},
        "resources": {"mem": "500M", "time": "00:10:00"},
        "slurm": {"partition": "low"},
        "workspace": {"path": "code"},
        "preemption": {"lead_time": "20s"},
        **changes,
        # A run id of each test's own: several clusters may run on this machine, and processes are looked for by it.
        "env": {"OF_TEST": str(orch.directory), **changes.get("env", {})},
    }


def said(orch: Orch, run: str) -> list[list[str]]:
    """The lines the program wrote: attempt, step, word."""
    path = orch.run_dir(run) / "said.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

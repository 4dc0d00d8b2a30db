"""A program that makes steps and saves them, without torch: these tests are about everything around training."""

from __future__ import annotations

from typing import Any

from tests.cluster.orch import Orch

# Runs until the file `enough` is there; saves every 40 steps and when it is told to stop.
TRAIN = """
import json, os, pathlib, sys, time
from orchestrator.worker.session import Session
from words import WORD

session = Session.start()
session.install_signal_handlers()
run_dir = pathlib.Path(os.environ["ORCH_RUN_DIR"])
with session.guard():
    found = session.resume()
    step = json.loads(found.path.read_text())["step"] if found else 0
    while not (run_dir / "enough").exists():
        time.sleep(0.05)
        step += 1
        session.report(step, 0, None)
        with open(run_dir / "said.txt", "a") as said:
            said.write(f"{session.attempt} {step} {WORD}\\n")
        if session.stop_requested or step % 40 == 0:
            session.commit(lambda out: out.write(json.dumps({"step": step}).encode()), step=step, epoch=0)
        if session.stop_requested:
            session.stopped(step=step, epoch=0)
    session.verdict("completed", step=step, epoch=0)
"""


def script_spec(orch: Orch, **changes: Any) -> dict[str, Any]:
    workspace = orch.directory / "code"
    workspace.mkdir(exist_ok=True)
    (workspace / "train.py").write_text(TRAIN)
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
    }


def said(orch: Orch, run: str) -> list[list[str]]:
    path = orch.run_dir(run) / "said.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

"""The main job on the local backend: the same commands, the same rules, no cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.data.digits import write_digits
from tests.equality import assert_same_run
from tests.polling import poll

EPOCHS, IMAGES, BATCH = 24, 320, 32  # steps go on while a stop is on its way
STEPS = EPOCHS * IMAGES // BATCH


class Local:
    """`orch` on this machine, with a root and a state directory of its own."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        monkeypatch.setenv("XDG_STATE_HOME", str(directory / "state"))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(directory / "config"))

    def call(self, *arguments: str) -> Any:
        argv = [sys.executable, "-m", "orchestrator", *arguments, "--json"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300, cwd=self.directory, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def submit(self, root: str) -> Path:
        spec = {
            "name": "local",
            "backend": "local",
            "root": str(self.directory / root),
            "job": {
                "module": "jobs.pretrain",
                "args": {
                    "data": str(self.directory / "digits"), "epochs": EPOCHS, "batch_size": BATCH, "seed": 1,
                    "num_workers": 1, "log_every_n_steps": 1,
                },
            },
            "checkpoint": {"every_steps": 15},
        }  # fmt: skip
        path = self.directory / "work" / f"{root}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(spec))
        return Path(self.call("submit", str(path))["run_dir"])


def step_of(run_dir: Path, attempt: int) -> int:
    path = run_dir / "progress.json"
    progress = json.loads(path.read_text()) if path.exists() else {"attempt": -1, "step": 0}
    return int(progress["step"]) if progress["attempt"] == attempt else 0


def test_preempted_twice_on_this_machine_equals_the_untouched_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Local(tmp_path, monkeypatch)
    write_digits(tmp_path / "digits", limit=IMAGES)
    stopped = local.submit("stopped")
    for attempt, step in enumerate([7, 22]):
        poll(lambda a=attempt, s=step: step_of(stopped, a) >= s, f"step {step} of attempt {attempt}", timeout=180)
        local.call("preempt", stopped.name, "--root", "stopped")
        poll((stopped / f"verdict-{attempt:03d}.json").exists, "the verdict", timeout=60)
    done = local.call("wait", stopped.name, "--root", "stopped", "--timeout", "240")
    assert done["state"] == "completed"
    attempts = json.loads((stopped / "sidecar.json").read_text())["attempts"]
    assert [entry["exit_reason"] for entry in attempts] == ["preempted", "preempted", "completed"]
    assert [entry["step_start"] for entry in attempts[1:]] == [entry["step_end"] for entry in attempts[:-1]]
    assert attempts[-1]["step_end"] == STEPS

    calm = local.submit("calm")
    local.call("wait", calm.name, "--root", "calm", "--timeout", "240")
    assert calm.name == stopped.name
    assert_same_run(calm, stopped)

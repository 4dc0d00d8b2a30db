"""A run's life on the local backend through the command line: real processes, real signals, no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, os, sys, time
from orchestrator.worker.session import Session

steps = int(sys.argv[1].partition("=")[2])
session = Session.start()
session.install_signal_handlers()
held_at, may_go_on = int(os.environ.get("HELD_AT", steps)), session.run_dir / "may_go_on"
print("secret", os.environ.get("API_TOKEN") == "s3cret value\\n", flush=True)
with session.guard():
    found = session.resume()
    metrics = session.open_metrics()
    step = found.manifest.step if found else 0
    print("begins at", step, flush=True)
    while step < steps:
        while step >= held_at and not may_go_on.exists() and not session.stop_requested:
            session.report(step, 0, steps)
            time.sleep(0.02)
        time.sleep(0.02)
        step += 1
        session.report(step, 0, steps)
        metrics.append(step, 0, {"loss": 1 / step})
        print("step", step, flush=True)
        if step == 30 and os.environ.get("CRASH"):
            raise RuntimeError("boom at 30")
        if session.stop_requested or step % 20 == 0:
            session.commit(lambda file: file.write(json.dumps({"step": step}).encode()), step=step, epoch=0)
        if session.stop_requested:
            session.stopped(step=step, epoch=0)
    session.commit(lambda file: file.write(b"the end"), step=step, epoch=0)
    session.verdict("completed", step=step, epoch=0)
"""

SPEC = """
name: life
backend: local
job:
  command: [{python}, train.py]
  args: {{steps: 150}}
secrets: [API_TOKEN]
"""


class User:
    """Somebody at a shell, in a directory of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {**os.environ, "ORCH_STATE_DIR": str(folder / "state"), "API_TOKEN": "s3cret value\n"}
        (folder / "train.py").write_text(PROGRAM)
        (folder / "spec.yaml").write_text(SPEC.format(python=sys.executable))
        self.started: set[str] = set()

    def orch(self, *arguments: str, code: int = 0) -> str:
        argv = [sys.executable, "-m", "orchestrator", *arguments]
        done = subprocess.run(
            argv, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=90, check=False
        )
        assert done.returncode == code, f"{argv} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        assert "s3cret" not in done.stdout + done.stderr
        return done.stdout

    def json(self, *arguments: str, code: int = 0) -> Any:
        return json.loads(self.orch(*arguments, "--json", code=code))

    def submit(self, *options: str) -> Any:
        document = self.json("submit", "spec.yaml", *options)
        self.started.add(document["run_id"])
        return document

    def submit_held(self, step: int) -> Any:
        """A run that stands at that step until it is asked to stop, so that no command comes too late."""
        return self.submit("--set", f"env.HELD_AT={step}")

    def let_go(self, run_dir: str) -> None:
        (Path(run_dir) / "may_go_on").touch()

    def until(self, run: str, condition: Callable[[Any], bool]) -> Any:
        end = time.monotonic() + 60
        while not condition(status := self.json("status", run)):
            assert time.monotonic() < end, status
        return status


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    somebody = User(tmp_path)
    yield somebody
    for run in somebody.started:
        somebody.orch("cancel", run)
        somebody.until(run, lambda status: not status["alive"])


def stepping(status: Any) -> bool:
    return bool(status["progress"]["step"])


def test_from_submit_to_the_end(user: User) -> None:
    first = user.submit_held(5)
    assert (first["action"], first["backend"]) == ("submitted", "local")
    run = first["run_id"]
    assert user.submit_held(5) == {**first, "action": "already_running"}
    user.let_go(first["run_dir"])
    assert user.json("wait", run, "--timeout", "60")["state"] == "completed"
    assert user.submit_held(5)["action"] == "already_completed"
    log = user.orch("logs", run).splitlines()
    assert log[:2] == ["secret True", "begins at 0"]
    assert log[-1] == "step 150"
    status = user.json("status", run)
    assert (status["alive"], status["attempt"], status["progress"]["step"]) == (False, 0, 150)
    assert not (Path(first["run_dir"]) / "secrets.json").exists()
    written = [path for path in Path(first["run_dir"]).rglob("*") if path.is_file()]
    assert not [path for path in written if b"s3cret" in path.read_bytes()]


def test_after_a_rollback_it_goes_on_from_there_and_what_came_after_is_logged_once(user: User) -> None:
    first = user.submit_held(70)
    run = first["run_id"]
    user.until(run, lambda status: (status["progress"]["step"] or 0) > 65)
    assert user.json("ckpt", "rollback", run, "--step", "40", code=7)["error"]["type"] == "RefusedError"
    user.orch("cancel", run)
    stopped = user.until(run, lambda status: not status["alive"])["last_checkpoint"]["step"]
    user.orch("ckpt", "verify", run)
    listed = user.json("ckpt", "ls", run)
    assert stopped == listed[0]["step"] > 60
    back = next(row["step"] for row in listed if row["step"] % 20 == 0)
    told = user.json("ckpt", "rollback", run, "--step", str(back))
    assert (told["step"], told["steps_given_up"]) == (back, stopped - back)
    assert user.json("status", run)["last_checkpoint"]["step"] == back
    user.let_go(first["run_dir"])
    assert user.json("resume", run)["action"] == "resumed"
    status = user.json("wait", run, "--timeout", "60")
    assert (status["state"], status["resumed_from"]["step"]) == ("completed", back)
    assert status["resumed_from"]["attempt"] == 0
    assert status["resumed_from"]["path"].endswith(".ckpt")
    assert [Path(skip["path"]).name for skip in status["resumed_from"]["skipped"]] == [Path(listed[0]["path"]).name]
    assert f"begins at {back}" in user.orch("logs", run)
    run_dir = Path(status["run_dir"])
    steps = [int(line.split(",")[0]) for line in (run_dir / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == list(range(1, 151))


def test_other_arguments_and_code_only_where_they_are_allowed(user: User) -> None:
    first = user.submit_held(30)
    run = first["run_id"]
    user.until(run, lambda status: (status["progress"]["step"] or 0) > 25)
    user.orch("cancel", run)
    user.until(run, lambda status: not status["alive"])
    user.let_go(first["run_dir"])
    (user.folder / "train.py").write_text(PROGRAM.replace('"begins at"', '"better, begins at"'))
    change = ["resume", run, "--set", "job.args.steps=149", "--code"]
    refused = user.json(*change, "--allow-drift", "code", code=7)["error"]
    assert "job.args.steps: 150 → 149" in refused["message"]
    assert "  code: " in refused["message"]
    assert "--allow-drift job.args.steps" in refused["hint"]
    assert "--allow-drift code" not in refused["hint"]
    resumed = user.json(*change, "--allow-drift", "code", "--allow-drift", "job.args.steps")
    assert (resumed["run_id"], resumed["action"]) == (run, "resumed")
    status = user.json("wait", run, "--timeout", "60")
    assert (status["state"], status["progress"]["step"]) == ("completed", 149)
    log = user.orch("logs", run)
    assert f"better, begins at {status['resumed_from']['step']}" in log
    [drift] = [event for event in status["events"] if event["event"] == "drift"]
    assert (drift["attempt"], drift["step"]) == (1, status["resumed_from"]["step"])
    assert [change["key"] for change in drift["changes"]] == ["job.args.steps", "code"]


def test_a_drill_loses_no_step(user: User) -> None:
    first = user.submit_held(30)
    run = first["run_id"]
    user.until(run, stepping)
    told = user.orch("preempt", run)
    assert told.startswith("signalled (SIGUSR1) … saved step ")
    assert told.endswith(" 0 steps lost.\n")
    user.let_go(first["run_dir"])
    assert user.json("wait", run)["state"] == "completed"
    status = user.json("status", run)
    assert status["attempt"] == 1
    saved = status["resumed_from"]["step"]
    logs = [user.orch("logs", run, "--attempt", number).splitlines() for number in ("0", "1")]
    steps = [int(line.split()[1]) for log in logs for line in log if line.startswith("step ")]
    assert steps == list(range(1, 151))  # none twice, none left out
    assert logs[1][1] == f"begins at {saved}"


def test_cancel_saves_and_resume_goes_on(user: User) -> None:
    first = user.submit_held(30)
    run = first["run_id"]
    user.until(run, stepping)
    user.orch("cancel", run)
    ended = user.until(run, lambda status: status["state"] == "cancelled")
    assert ended["last_checkpoint"]["step"] >= 1
    user.orch("submit", "spec.yaml", "--set", "env.HELD_AT=30", code=7)
    (user.folder / "train.py").write_text("raise SystemExit('edited since')\n")
    user.let_go(first["run_dir"])
    assert user.json("resume", run)["action"] == "resumed"
    assert user.json("wait", run)["state"] == "completed"
    assert user.json("status", run)["resumed_from"]["step"] == ended["last_checkpoint"]["step"]


def test_a_crash_is_told_with_its_reason_and_the_run_can_go_on(user: User) -> None:
    run = user.submit("--set", "env.CRASH=1")["run_id"]
    assert user.json("wait", run, code=1)["state"] == "failed"
    told = user.orch("status", run)
    assert "boom at 30" in told
    assert "Your work is safe up to step 20." in told
    assert f"orch resume {run}" in told


def test_a_killed_agent_is_lost_and_submit_goes_on(user: User) -> None:
    first = user.submit("--set", "job.args.steps=100000")
    run = first["run_id"]
    user.until(run, lambda status: (status["last_checkpoint"] or {}).get("step", 0) >= 20)
    os.kill(int(first["job_id"].partition(".")[0]), 9)
    lost = user.until(run, lambda status: status["state"] == "lost")
    assert not lost["alive"]
    assert user.submit("--set", "job.args.steps=100000")["action"] == "resumed"
    again = user.until(run, lambda status: status["resumed_from"] is not None)
    assert again["attempt"] == 1
    assert again["resumed_from"]["step"] >= lost["last_checkpoint"]["step"]


def test_a_killed_supervisor_takes_the_program_with_it(user: User) -> None:
    run = user.submit("--set", "job.args.steps=100000")["run_id"]
    status = user.until(run, stepping)
    (started,) = [event for event in status["events"] if event["event"] == "container_started"]
    program = int((Path(status["run_dir"]) / "heartbeat").read_text().partition('"pid": ')[2].partition(",")[0])
    os.kill(int(started["pid"]), 9)
    assert user.json("wait", run, code=1)["state"] == "failed"
    assert not Path(f"/proc/{program}").exists()


def test_following_shows_the_log_and_ends_with_the_run(user: User) -> None:
    told = user.orch("submit", "spec.yaml", "--follow")
    assert "step 150\n" in told
    assert "completed · attempt 0" in told
    other = user.orch("submit", "spec.yaml", "--follow", "--set", "env.CRASH=1", code=1)
    assert "boom at 30" in other

"""`orch preempt --verify`: a certificate for this job on this cluster, and words that teach where there can be none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster.handle import Cluster
from tests.cluster.orch import Orch
from tests.cluster.programs import TRAIN, said, script_spec

# Hears nothing, saves nothing; runs until it is ended.
DEAF = "import time, signal; signal.signal(signal.SIGUSR1, signal.SIG_IGN); print('deaf', flush=True); time.sleep(300)"
# Hears and leaves at once, as somebody writes it who trusts a checkpoint of their own.
LEAVES = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0)); print('up'); time.sleep(300)"
# Only rank 0 writes.
TRAIN_ON_TWO = TRAIN.replace("session.commit(", "session.is_chief and session.commit(").replace(
    "    session.verdict(", "    session.is_chief and session.verdict("
)


def container(orch: Orch, runtime: str) -> dict[str, Any]:
    return {"runtime": "docker", "image": orch.cluster.image} if runtime == "docker" else {"runtime": "none"}


def finish(orch: Orch, run: str) -> None:
    """End the run; every step was made exactly once."""
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed", timeout=60)
    steps = [int(step) for _, step, _ in said(orch, run)]
    assert steps == list(range(1, len(steps) + 1))
    assert orch.cluster.containers() == []


@pytest.mark.parametrize("backend", ["slurm", "local"])
@pytest.mark.parametrize("runtime", ["none", "docker"])
def test_a_job_that_saves_gets_its_certificate(orch: Orch, runtime: str, backend: str) -> None:
    run = orch.submit(script_spec(orch, container=container(orch, runtime), backend=backend))["run_id"]
    orch.wait_for_step(run, 5)
    done = orch.call("preempt", run, "--verify", "--json", timeout=120)
    shown = json.loads(done.stdout)
    assert (done.returncode, shown["verdict"], shown["reasons"]) == (0, "PASS", []), orch.story(run)
    assert (shown["attempt"], shown["next_attempt"], shown["exact"], shown["steps_lost"]) == (0, 1, True, 0)
    assert shown["step_saved"] == shown["step_resumed"] < shown["step_made"]
    assert [told["cause"] for told in shown["told"]] == ["preempted"]
    # Without a container Slurm's signal may reach the program first.
    assert 0 <= shown["grace_used_s"] < shown["grace_s"] <= 25
    assert shown["verified"]
    assert shown["size_bytes"] == len(json.dumps({"step": shown["step_saved"]}))
    assert shown["requeue_wait_s"] > 0
    assert shown["startup_s"] > 0
    assert json.loads((orch.run_dir(run) / "drills" / "drill-000.json").read_text()) == shown
    assert "drill       passed" in orch.call("status", run).stdout
    finish(orch, run)


def test_two_nodes_are_told_and_named(orch: Orch, cluster: Cluster) -> None:
    spec = script_spec(orch, resources={"nodes": 2, "mem": "300M", "time": "00:10:00"})
    (orch.directory / "code" / "train.py").write_text(TRAIN_ON_TWO)
    run = orch.submit(spec)["run_id"]
    orch.wait_for_step(run, 5)
    done = orch.call("preempt", run, "--verify", timeout=120)
    assert done.returncode == 0, done.stdout + orch.story(run)
    certificate = json.loads((orch.run_dir(run) / "drills" / "drill-000.json").read_text())
    assert [told["node"] for told in certificate["told"]] == orch.attempts(run)[0]["nodes"]
    assert len(certificate["told"]) == 2
    assert "drill passed" in done.stdout
    assert "0 steps lost (exact)" in done.stdout
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed", timeout=60)


@pytest.mark.parametrize(
    ("runtime", "program", "words"),
    [
        ("none", DEAF, "did not react to SIGUSR1"),
        ("docker", DEAF, "did not react to SIGUSR1"),
        ("none", LEAVES, "cannot see whether it saved"),  # also where Slurm's own signal reached it before PID 1's
        ("docker", LEAVES, "cannot see whether it saved"),
    ],
)
def test_a_program_that_saves_nothing_fails_with_words_that_teach(
    orch: Orch, runtime: str, program: str, words: str
) -> None:
    spec = script_spec(
        orch,
        job={"command": ["python3", "-u", "-c", program]},
        container=container(orch, runtime),
        preemption={"lead_time": "5s"},
    )
    run = orch.submit(spec)["run_id"]
    log = orch.run_dir(run) / "logs" / "attempt-000" / "node-0.log"
    orch.cluster.wait("the program to be up", lambda: log.exists() and log.read_text(), timeout=60)
    done = orch.call("preempt", run, "--verify", timeout=120)
    assert done.returncode == 1
    assert "drill FAILED" in done.stdout
    assert words in done.stdout
    assert words in orch.call("status", run).stdout
    orch.json("cancel", run)


def test_when_the_time_is_up_it_says_what_is_known(orch: Orch, cluster: Cluster) -> None:
    """The partition is closed while the job waits to go on."""
    run = orch.submit(script_spec(orch))["run_id"]
    orch.wait_for_step(run, 5)
    cluster.run("scontrol", "update", "partition=low", "state=down")  # a requeued job does not start again
    try:
        done = orch.call("preempt", run, "--verify", "--timeout", "45s", "--json", timeout=180)
    finally:
        cluster.run("scontrol", "update", "partition=low", "state=up")
    shown = json.loads(done.stdout)
    assert (done.returncode, shown["verdict"]) == (1, "FAIL")
    assert shown["step_saved"] is not None
    (reason,) = shown["reasons"]
    assert reason.startswith("the time was up before the next attempt made a step; the run is preempted")
    orch.wait_for_step(run, shown["step_saved"] + 1, attempt=1)
    finish(orch, run)


def test_a_drill_needs_a_running_job(orch: Orch) -> None:
    run = orch.submit(script_spec(orch, slurm={"partition": "low", "extra_sbatch": {"hold": True}}))["run_id"]
    done = orch.call("preempt", run, "--verify")
    assert done.returncode == 3
    assert "a drill needs a running job" in done.stderr
    assert not (orch.run_dir(run) / "drills").exists()
    orch.json("cancel", run)

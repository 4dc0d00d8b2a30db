"""How a cluster stops a job, beyond ordinary preemption: each stop ends in a saved run, or in one that says why not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.handle import Cluster
from tests.cluster.orch import Orch
from tests.cluster.programs import said, script_spec

EVERY_STEPS = 40  # of the program


def spec_for(orch: Orch, runtime: str, **changes: Any) -> dict[str, Any]:
    container = {"runtime": "docker", "image": orch.cluster.image} if runtime == "docker" else {"runtime": "none"}
    return script_spec(orch, container=container, **changes)


def finish(orch: Orch, run: str, *, attempts: int) -> list[dict[str, Any]]:
    """Let the newest attempt work a little, then end the run; return the records of all attempts."""
    orch.wait_for_step(run, orch.step(run) + 3, attempt=attempts - 1)
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed", timeout=60)
    records = orch.attempts(run)
    assert len(records) == attempts, records
    assert orch.cluster.containers() == []
    return records


def steps_of(orch: Orch, run: str, attempt: int) -> list[int]:
    return [int(step) for number, step, _ in said(orch, run) if number == str(attempt)]


def assert_nothing_lost(orch: Orch, run: str) -> None:
    steps = [int(step) for _, step, _ in said(orch, run)]
    assert steps == list(range(1, len(steps) + 1))


def assert_at_most_every_steps_lost(orch: Orch, run: str) -> None:
    repeated = steps_of(orch, run, 0)[-1] - steps_of(orch, run, 1)[0] + 1
    assert 0 <= repeated <= EVERY_STEPS


def pythons(marker: str) -> list[int]:
    """pids of the Python processes whose command line contains `marker` (srun carries the agent's, too)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
            if "python" in words[0] and marker in " ".join(words):
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return found


def programs_of(run: str) -> list[int]:
    """PID 1, torchrun and the ranks of a run, in a container or not."""
    return pythons(f"/orch-{os.getuid()}/{run}.") + pythons("train.py")


def agent_of(orch: Orch, run: str) -> int:
    (pid,) = pythons(f"orchestrator.worker.agent node {orch.run_dir(run)}")
    return pid


@pytest.mark.parametrize("runtime", ["none", "docker"])
@pytest.mark.parametrize("stop", ["preemption without grace", "requeue by an administrator"])
def test_a_stop_with_only_killwait_to_save_loses_nothing(orch: Orch, cluster: Cluster, runtime: str, stop: str) -> None:
    partition = "nograce" if stop == "preemption without grace" else "low"
    run = orch.submit(spec_for(orch, runtime, slurm={"partition": partition}))["run_id"]
    orch.wait_for_step(run, 5)
    if stop == "preemption without grace":
        cluster.preempt(nodes=3, seconds=1)
    else:
        cluster.run("scontrol", "requeue", orch.status(run)["job_id"])
    records = finish(orch, run, attempts=2)
    assert_nothing_lost(orch, run)
    # Slurm has requeued the job before it says a word, and then tells the two apart nowhere (22.05).
    assert (records[0]["outcome"], records[0]["exit_reason"]) == ("saved", "requeued_by_admin")


def test_a_job_cancelled_in_the_queue_never_starts(orch: Orch, cluster: Cluster) -> None:
    cluster.sbatch("--partition=high", "--nodes=3", "--exclusive", "--mem=0", wrap="sleep 300")
    run = orch.submit(spec_for(orch, "none"))["run_id"]
    assert orch.status(run)["state"] == "queued"
    orch.json("cancel", run)
    assert orch.wait_for_state(run, "cancelled", timeout=60)["attempt"] in (None, 0)
    assert said(orch, run) == []


@pytest.mark.parametrize("runtime", ["none", "docker"])
def test_a_second_notice_of_another_kind_is_harmless(orch: Orch, cluster: Cluster, runtime: str) -> None:
    run = orch.submit(spec_for(orch, runtime))["run_id"]
    orch.wait_for_step(run, 5)
    job = orch.status(run)["job_id"]
    for name in ("USR1", "TERM", "USR1"):
        cluster.run("scancel", f"--signal={name}", f"{job}.0", check=False)  # the step may have ended by then
    finish(orch, run, attempts=2)
    assert_nothing_lost(orch, run)


def test_a_notice_before_the_first_step_is_kept(orch: Orch, cluster: Cluster) -> None:
    run = orch.submit(spec_for(orch, "docker"))["run_id"]
    started = orch.run_dir(run) / "events" / "agent-n0.jsonl"
    cluster.wait("the agent", lambda: started.exists() and "attempt_started" in started.read_text(), timeout=60)
    os.kill(agent_of(orch, run), signal.SIGUSR1)
    finish(orch, run, attempts=2)
    assert_nothing_lost(orch, run)
    assert len(steps_of(orch, run, 0)) <= 1


def kill_agent(orch: Orch, run: str) -> None:
    os.kill(agent_of(orch, run), signal.SIGKILL)


def kill_pid_1(orch: Orch, run: str) -> None:
    if containers := orch.cluster.containers():
        orch.cluster.run("docker", "kill", *containers)
    else:
        (pid,) = pythons(f"launch.py /dev/shm/orch-{os.getuid()}/{run}.")
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("runtime", ["none", "docker"])
@pytest.mark.parametrize("kill", [kill_agent, kill_pid_1])
def test_a_killed_supervisor_leaves_no_writer_behind_and_loses_at_most_every_steps(
    orch: Orch, cluster: Cluster, runtime: str, kill: Callable[[Orch, str], None]
) -> None:
    run = orch.submit(spec_for(orch, runtime, retry={"failure": 1}))["run_id"]
    orch.wait_for_step(run, EVERY_STEPS + 5)
    kill(orch, run)
    finish(orch, run, attempts=2)
    assert_at_most_every_steps_lost(orch, run)
    # Lines of the two attempts never mix: the first had ended before the second began.
    numbers = [number for number, _, _ in said(orch, run)]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("runtime", ["none", "docker"])
def test_nobody_writes_after_slurmstepd_was_killed(orch: Orch, cluster: Cluster, runtime: str) -> None:
    """srun never hears of it and holds the allocation until the time limit; but no program runs on unsupervised."""
    run = orch.submit(spec_for(orch, runtime))["run_id"]
    orch.wait_for_step(run, EVERY_STEPS + 5)
    agent = agent_of(orch, run)
    parent = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1]
    assert Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd")
    os.kill(int(parent), signal.SIGKILL)
    cluster.wait("the agent to die", lambda: not Path(f"/proc/{agent}").exists(), timeout=10)
    cluster.wait("the program to die", lambda: programs_of(run) == [], timeout=10)
    orch.json("cancel", run)
    orch.wait_for_state(run, "cancelled", timeout=60)
    orch.json("resume", run)
    finish(orch, run, attempts=2)
    assert_at_most_every_steps_lost(orch, run)


def test_a_silent_scheduler_leaves_the_run_saved_and_waiting(orch: Orch, cluster: Cluster) -> None:
    run = orch.submit(spec_for(orch, "docker"))["run_id"]
    orch.wait_for_step(run, 5)
    agent = agent_of(orch, run)
    cluster.stop("slurmctld", signal="SIGKILL")
    os.kill(agent, signal.SIGUSR1)
    sidecar = orch.run_dir(run) / "sidecar.json"
    cluster.wait("the run to say what it needs", lambda: '"needs_resume"' in sidecar.read_text(), timeout=120)
    assert orch.attempts(run)[0]["outcome"] == "saved"
    cluster.start_daemon("slurmctld")
    orch.wait_for_state(run, "needs_resume", timeout=120)
    assert orch.json("resume", run)["action"] == "resumed"
    finish(orch, run, attempts=2)
    assert_nothing_lost(orch, run)


def test_an_engine_that_is_restarted_does_not_end_a_run_twice(orch: Orch, cluster: Cluster) -> None:
    run = orch.submit(spec_for(orch, "docker", retry={"failure": 1}))["run_id"]
    orch.wait_for_step(run, EVERY_STEPS + 5)
    cluster.stop("dockerd", signal="SIGKILL")
    cluster.start_daemon("dockerd")
    orch.wait_for_step(run, orch.step(run) + 3, attempt=orch.attempt(run))
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed", timeout=120)
    assert cluster.containers() == []
    numbers = [number for number, _, _ in said(orch, run)]
    assert numbers == sorted(numbers)

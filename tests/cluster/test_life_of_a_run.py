"""What PROTOCOLS 1 promises about names, code and repeated submissions, and how a run ends badly but clearly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.handle import Cluster
from tests.cluster.orch import Orch
from tests.cluster.programs import TRAIN, said, script_spec


def test_one_run_whoever_asks_however_often_and_the_code_it_began_with(orch: Orch, cluster: Cluster) -> None:
    spec = script_spec(orch)
    first = orch.submit(spec)
    assert first["action"] == "submitted"
    run = first["run_id"]
    orch.wait_for_step(run, 5)
    again = orch.submit(spec)
    assert (again["run_id"], again["action"], again["job_id"]) == (run, "already_running", first["job_id"])
    elsewhere = orch.directory / "elsewhere"
    elsewhere.mkdir()
    other = Orch(cluster, elsewhere)
    answer = other.json("submit", str(orch.directory / "spec.yaml"))
    assert (answer["run_id"], answer["action"]) == (run, "already_running")

    # An edit makes another run; the one that is running keeps its code, in the next attempt, too.
    (orch.directory / "code" / "words.py").write_text("WORD = 'second'\n")
    edited = json.loads(orch.call("submit", str(orch.directory / "spec.yaml"), "--dry-run", "--json").stdout)
    assert edited["run_id"] != run
    orch.json("preempt", run)
    orch.wait_for_step(run, orch.step(run) + 1, attempt=1)
    (orch.run_dir(run) / "enough").touch()
    done = orch.wait_for_state(run, "completed")
    assert {word for _, _, word in said(orch, run)} == {"first"}
    steps = [int(step) for _, step, _ in said(orch, run)]
    assert steps == list(range(1, len(steps) + 1)), "a signalled stop repeats and skips no step"
    assert done["attempt"] == 1

    (orch.directory / "code" / "words.py").write_text("WORD = 'first'\n")
    assert orch.submit(spec)["action"] == "already_completed"
    fresh = orch.submit(spec, "--new")
    assert (fresh["action"], fresh["run_id"]) == ("submitted", f"{run}-2")
    orch.wait_for_step(fresh["run_id"], 1)
    orch.json("cancel", fresh["run_id"])
    cancelled = orch.wait_for_state(fresh["run_id"], "cancelled", timeout=60)
    assert not cancelled["alive"]


def test_a_killed_step_costs_at_most_every_steps(orch: Orch, cluster: Cluster) -> None:
    run = orch.submit(script_spec(orch, retry={"failure": 1}))["run_id"]
    orch.wait_for_step(run, 50)
    job = orch.status(run)["job_id"]
    cluster.run("scancel", "--signal=KILL", f"{job}.0")
    orch.wait_for_step(run, 41, attempt=1)
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed")
    first = [int(step) for attempt, step, _ in said(orch, run) if attempt == "0"]
    second = [int(step) for attempt, step, _ in said(orch, run) if attempt == "1"]
    assert (second[0] - 1) % 40 == 0
    assert 0 <= first[-1] - second[0] + 1 <= 40


def test_a_cancelled_run_is_refused_until_resume_lifts_the_tombstone(orch: Orch) -> None:
    spec = script_spec(orch)
    run = orch.submit(spec)["run_id"]
    orch.wait_for_step(run, 3)
    orch.json("cancel", run)
    status = orch.wait_for_state(run, "cancelled", timeout=60)
    assert status["last_checkpoint"] is not None, "a cancelled run has saved, too"
    refused = orch.call("submit", str(orch.directory / "spec.yaml"))
    assert refused.returncode == 7
    assert "orch resume" in refused.stderr
    assert orch.json("resume", run)["action"] == "resumed"
    orch.wait_for_step(run, status["last_checkpoint"]["step"] + 1, attempt=1)
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed")


def test_scancel_by_hand_is_a_cancellation_too(orch: Orch, cluster: Cluster) -> None:
    run = orch.submit(script_spec(orch))["run_id"]
    orch.wait_for_step(run, 3)
    cluster.run("scancel", orch.status(run)["job_id"])
    status = orch.wait_for_state(run, "cancelled", timeout=60)
    assert status["exit_reason"] == "cancelled"


@pytest.mark.parametrize("runtime", ["none", "docker"])
def test_a_program_without_our_library_ends_by_its_exit_code(orch: Orch, cluster: Cluster, runtime: str) -> None:
    container = {"runtime": "docker", "image": cluster.image} if runtime == "docker" else {"runtime": "none"}
    good = script_spec(orch, job={"command": ["python3", "-c", "print('fine')"]}, container=container)
    bad = script_spec(orch, job={"command": ["python3", "-c", "raise SystemExit('boom')"]}, container=container)
    one, two = orch.submit(good)["run_id"], orch.submit(bad)["run_id"]
    orch.wait_for_state(one, "completed", timeout=60)
    failed = orch.wait_for_state(two, "failed", timeout=60)
    assert failed["exit_reason"] == "failure"
    assert "boom" in orch.call("status", two).stdout
    waited = orch.call("wait", two)
    assert waited.returncode == 1


@pytest.mark.parametrize("runtime", ["none", "docker"])
def test_the_local_backend_keeps_the_same_rules(orch: Orch, cluster: Cluster, runtime: str) -> None:
    container = {"runtime": "docker", "image": cluster.image} if runtime == "docker" else {"runtime": "none"}
    run = orch.submit(script_spec(orch, backend="local", container=container))["run_id"]
    orch.wait_for_step(run, 5)
    orch.json("preempt", run)
    orch.wait_for_step(run, orch.step(run) + 1, attempt=1)
    assert len(cluster.containers(f"label=orch.run_id={run}")) == (1 if runtime == "docker" else 0)
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed", timeout=60)
    steps = [int(step) for _, step, _ in said(orch, run)]
    assert steps == list(range(1, len(steps) + 1))
    assert cluster.containers() == []


def test_the_same_run_under_two_roots_is_two_runs(orch: Orch, cluster: Cluster) -> None:
    """They share a name, a node and an engine: the second attempt of one must not sweep away the first of the other."""
    container = {"runtime": "docker", "image": cluster.image}
    spec = script_spec(orch, container=container, slurm={"partition": "low", "nodelist": "n1"})
    run = orch.submit(spec)["run_id"]
    other = Orch(cluster, orch.directory)
    other.root = orch.directory / "other"
    assert other.submit({**spec, "root": str(other.root)})["run_id"] == run
    orch.wait_for_step(run, 3)
    other.wait_for_step(run, 3)
    orch.json("preempt", run, "--root", str(orch.root))
    orch.wait_for_step(run, orch.step(run) + 3, attempt=1)
    for one in (orch, other):
        (one.run_dir(run) / "enough").touch()
        one.wait_for_state(run, "completed", timeout=60)
    assert [len(one.attempts(run)) for one in (orch, other)] == [2, 1]


def test_an_image_that_is_not_there_is_named_with_the_fix(orch: Orch) -> None:
    image = "sha256:" + "1" * 64
    run = orch.submit(script_spec(orch, container={"runtime": "docker", "image": image}))["run_id"]
    failed = orch.wait_for_state(run, "failed", timeout=60)
    assert failed["exit_reason"] == "container_failure"
    told = orch.call("status", run).stdout
    assert image[:20] in told
    assert "load it on every node" in told


def test_an_engine_that_is_down_is_named_with_the_fix(orch: Orch, cluster: Cluster) -> None:
    spec = script_spec(orch, container={"runtime": "docker", "image": cluster.image})
    path = orch.write_spec(spec)
    run = orch.json("submit", str(path), env={"DOCKER_HOST": "unix:///nowhere/docker.sock"})["run_id"]
    failed = orch.wait_for_state(run, "failed", timeout=60)
    assert failed["exit_reason"] == "container_failure"
    assert "no container engine answers" in orch.call("status", run).stdout.lower()


def test_a_crash_in_the_first_step_quotes_the_program(orch: Orch) -> None:
    spec = script_spec(orch)
    (orch.directory / "code" / "words.py").write_text("raise ValueError('no words today')\n")
    run = orch.submit(spec)["run_id"]
    failed = orch.wait_for_state(run, "failed", timeout=60)
    assert "no words today" in orch.call("status", run).stdout
    assert failed["attempt"] == 0, "retry.failure is 0 unless asked for"


def test_a_local_job_without_an_engine_is_refused_before_anything_is_written(orch: Orch, cluster: Cluster) -> None:
    spec = script_spec(orch, backend="local", container={"runtime": "docker", "image": cluster.image})
    done = orch.call("submit", str(orch.write_spec(spec)), env={"DOCKER_HOST": "unix:///nowhere/docker.sock"})
    assert done.returncode == 4
    assert "hint:" in done.stderr
    assert not any((orch.root / "runs").glob("*"))


def test_an_unknown_partition_is_told_in_slurms_words_and_leaves_nothing(orch: Orch) -> None:
    spec = script_spec(orch, slurm={"partition": "nowhere"})
    done = orch.call("submit", str(orch.write_spec(spec)))
    assert done.returncode == 3
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert orch.json("ps", "--root", str(orch.root)) == [] or not any((orch.root / "runs").glob("*/sidecar.json"))


def test_without_sbatch_the_hint_names_the_local_backend(orch: Orch) -> None:
    path = orch.write_spec(script_spec(orch))
    done = orch.call("submit", str(path), env={"PATH": "/nonexistent"})
    assert done.returncode == 3
    assert "sbatch" in done.stderr
    assert "hint:" in done.stderr


@pytest.fixture
def tiny_disk(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    cluster.run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk))
    yield disk
    cluster.run("umount", "--lazy", str(disk))


def test_a_full_disk_during_a_save_loses_nothing(orch: Orch, tiny_disk: Path) -> None:
    spec = script_spec(orch, checkpoint={"uri": str(tiny_disk), "keep_last": 2})
    big = TRAIN.replace('json.dumps({"step": step})', 'json.dumps({"step": step, "x": "y" * (3000 * step)})')
    assert big != TRAIN
    (orch.directory / "code" / "train.py").write_text(big)
    run = orch.submit(spec)["run_id"]
    failed = orch.wait_for_state(run, "failed", timeout=60)
    assert failed["exit_reason"] == "checkpoint_failure"
    told = orch.call("status", run).stdout
    assert "No space left" in told or "full" in told
    assert failed["last_checkpoint"]["step"] == 40
    assert Path(failed["last_checkpoint"]["path"]).stat().st_size > 120_000


def test_without_slurmdbd_a_run_is_followed_to_its_end(cluster_without_accounting: Cluster, tmp_path: Path) -> None:
    orch = Orch(cluster_without_accounting, tmp_path)
    run = orch.submit(script_spec(orch))["run_id"]
    orch.wait_for_step(run, 3)
    assert orch.status(run)["state"] == "running"
    orch.json("preempt", run)
    orch.wait_for_step(run, orch.step(run) + 1, attempt=1)
    (orch.run_dir(run) / "enough").touch()
    waited = orch.json("wait", run, "--timeout", "60", timeout=90)
    assert waited["state"] == "completed"

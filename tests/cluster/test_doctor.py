"""`orch doctor` on the real cluster: what it says is what the cluster is, and what it says will happen does."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.worker.node import _LOCK
from tests.cluster.handle import Cluster
from tests.cluster.orch import Orch
from tests.cluster.programs import script_spec
from tests.cluster.service import wait_for

SCHEDULER, DISK = 3, 6
CANCEL = "PartitionName=cancel Nodes=ALL PriorityTier=1 PreemptMode=CANCEL MaxTime=INFINITE State=UP"


def examine(orch: Orch, *arguments: str, code: int = 0, timeout: float = 90) -> dict[str, Any]:
    """The document of `orch doctor`, which must end with `code`."""
    root = () if any(word in ("--root", "spec.yaml") for word in arguments) else ("--root", str(orch.root))
    done = orch.call("doctor", *arguments, *root, "--json", timeout=timeout)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == ""
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["ok"] == (code == 0)
    return document


def told(document: dict[str, Any], topic: str, level: str | None = None) -> list[str]:
    """The messages of one topic, with their fixes."""
    return [
        f"{finding['message']} | {finding.get('fix', '')}"
        for finding in document["findings"]
        if finding["topic"] == topic and level in (None, finding["level"])
    ]


def levels(document: dict[str, Any]) -> set[str]:
    return {finding["level"] for finding in document["findings"]}


def left_behind(orch: Orch) -> list[str]:
    """Files, jobs and containers that an examination may not leave."""
    files = [str(path) for path in orch.directory.rglob(".orch-doctor*")]
    node = Path(f"/dev/shm/orch-{os.getuid()}")
    files += [str(path) for path in node.glob("doctor-*") if abandoned(path)]
    jobs = orch.cluster.run("squeue", "--noheader", "--format=%j").stdout.split()
    containers = orch.cluster.containers() + orch.cluster.podman_containers()
    return files + [job for job in jobs if job.startswith("orch-doctor")] + containers


def abandoned(directory: Path) -> bool:
    """Nobody holds its lock. Another test process's cluster may use its own, or just be making or removing it."""
    for _ in range(20):
        try:
            with (directory / _LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            if not directory.exists():
                return False
        time.sleep(0.1)
    return True


def test_without_a_spec_it_tells_of_the_default_partition(orch: Orch) -> None:
    found = examine(orch)
    assert found["save_seconds"] == {"preemption": 20, "time_limit": None, "requeue_by_admin": 31}
    assert levels(found) == {"ok"}
    assert [finding["topic"] for finding in found["findings"]] == [
        "slurm", "partition", "preemption", "save", "save", "time", "requeue", "arrays", "dead node", "accounting",
        "qos", "python", "engine", "root", "root", "root", "caches",
    ]  # fmt: skip
    assert "22.05" in told(found, "slurm")[0]
    assert "`low` (the default) · PreemptMode=REQUEUE · GraceTime=20 s · KillWait=31 s" in told(found, "partition")[0]
    assert "SIGTERM goes to the steps and nothing to the batch script" in told(found, "preemption")[0]
    assert "every node of the partition is this machine" in told(found, "root")[2]
    assert not orch.root.exists() and left_behind(orch) == []


def test_a_spec_is_examined_with_its_own_values(orch: Orch, cluster: Cluster) -> None:
    spec = script_spec(
        orch,
        container={"runtime": "docker", "image": cluster.image},
        slurm={"partition": "nograce", "account": "nobodys"},
        checkpoint={"uri": str(orch.directory / "kept")},
    )
    orch.write_spec(spec)
    cluster.configure("KillWait=9")
    found = examine(orch, "spec.yaml")
    assert found["save_seconds"] == {"preemption": 9, "time_limit": 20, "requeue_by_admin": 9}
    assert "a save has 9 s at a preemption (KillWait)" in told(found, "save", "warn")[0]
    assert "SIGTERM goes to the batch script and to the steps" in told(found, "preemption")[0]
    assert "resources.time 00:10:00 fits" in told(found, "time")[0]
    assert "`nobodys` is not one of yours" in told(found, "accounting", "warn")[0]
    assert "slurm.account: one of root" in told(found, "accounting", "warn")[0]
    assert told(found, "image") == [f"{cluster.image} is on this machine | "]
    assert "fsync" in told(found, "checkpoints")[0]
    assert f"{orch.root}/caches" in told(found, "caches")[0]


def test_people_get_words_and_a_sum(orch: Orch) -> None:
    done = orch.call("doctor", "--root", str(orch.root))
    assert done.returncode == 0
    assert "✔ slurm " in done.stdout and done.stdout.endswith("nothing is wrong\n")
    plain = orch.call("doctor", "--root", str(orch.root), env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert "ok slurm " in plain.stdout


def test_a_partition_that_does_not_exist(orch: Orch) -> None:
    found = examine(orch, "--partition", "lwo", code=SCHEDULER)
    assert told(found, "partition", "bad") == [
        "there is no partition `lwo` | slurm.partition: one of low, nograce, cancel, high"
    ]


def test_a_silent_controller_is_one_finding_soon(orch: Orch, cluster: Cluster) -> None:
    cluster.stop("slurmctld")
    found = examine(orch, "--node", code=SCHEDULER)
    assert [finding["topic"] for finding in found["findings"] if finding["level"] == "bad"] == ["slurm"]
    assert "Slurm does not answer" in told(found, "slurm")[0]
    assert told(found, "root") and told(found, "engine")
    assert found["save_seconds"] == {"preemption": None, "time_limit": None, "requeue_by_admin": None}


def test_a_silent_accounting_database_is_worth_knowing(orch: Orch, cluster: Cluster) -> None:
    cluster.stop("slurmdbd")
    found = examine(orch)
    assert "does not answer" in told(found, "accounting", "warn")[0]


def test_a_cluster_without_accounting_is_no_fault(cluster_without_accounting: Cluster, tmp_path: Path) -> None:
    found = examine(Orch(cluster_without_accounting, tmp_path))
    assert "no accounting database" in told(found, "accounting", "ok")[0]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=True, timeout=60)
    try:
        (place / "filler").write_bytes(b"x" * 65536)
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=60)


def test_a_full_disk_is_a_bad_root(orch: Orch, full_disk: Path) -> None:
    found = examine(orch, "--root", str(full_disk / "orch"), code=DISK)
    assert "No space left on device" in told(found, "root", "bad")[0]


@pytest.fixture
def frozen_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system on which every write sleeps where no signal reaches it, like a hard mount of a dead server."""
    image, place = tmp_path / "disk.img", tmp_path / "frozen"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(16 * 1024**2)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, timeout=60)
    mounted = subprocess.run(
        ["mount", "-o", "loop", str(image), str(place)], capture_output=True, text=True, timeout=60
    )
    if mounted.returncode != 0:
        pytest.skip(f"hardware: no loop device ({mounted.stderr.strip()})")
    try:
        subprocess.run(["fsfreeze", "--freeze", str(place)], check=True, timeout=60)
        yield place
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(place)], timeout=60)
        # The probe that was killed while it slept ends only now.
        unmount = ["umount", str(place)]
        wait_for("the disk to be let go", lambda: subprocess.run(unmount, timeout=60).returncode == 0, timeout=60)


def test_a_dead_file_system_hangs_nobody(orch: Orch, frozen_disk: Path) -> None:
    found = examine(orch, "--node", "--root", str(frozen_disk / "orch"), code=DISK)
    assert "the file system gave no answer" in told(found, "root", "bad")[0]
    assert "no job was started" in told(found, "node", "bad")[0]


# --- a compute node ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("runtime", ["none", "docker", "podman"])
def test_a_job_looks_at_a_compute_node(orch: Orch, cluster: Cluster, runtime: str) -> None:
    container = {"runtime": runtime, **({} if runtime == "none" else {"image": cluster.image})}
    orch.write_spec(script_spec(orch, container=container))
    found = examine(orch, "spec.yaml", "--node", timeout=180)
    node = "\n".join(told(found, "node", "ok"))
    for words in ("orch runs there", "as the same directory", "scontrol answers", "/dev/shm holds"):
        assert words in node
    assert "is the same directory on n" in "\n".join(told(found, "root", "ok"))
    inside = [text for text in told(found, "engine", "ok") if "writes below the root as you" in text]
    assert len(inside) == (runtime != "none")
    assert left_behind(orch) == []


def test_a_program_that_is_not_on_the_node(orch: Orch) -> None:
    image = f"registry.example/train@sha256:{'0' * 64}"
    orch.write_spec(script_spec(orch, container={"runtime": "pyxis", "image": image}))
    here, there = told(examine(orch, "spec.yaml", "--node", timeout=180), "engine", "warn")
    assert "has no enroot (this machine; the nodes are what counts)" in here
    assert "has no enroot" in there and there.startswith("n")


@pytest.mark.parametrize("runtime", ["docker", "podman"])
def test_containers_that_nobody_owns_any_more(orch: Orch, cluster: Cluster, runtime: str) -> None:
    assert cluster.image is not None
    spec = script_spec(orch, container={"runtime": runtime, "image": cluster.image})
    run = orch.submit(spec)["run_id"]
    orch.wait_for_step(run, 1)
    labels = {"orch.run_id": "gone", "orch.run_dir": str(orch.run_dir(run)), "orch.attempt": "3", "orch.node": "n1"}
    create = [runtime, "create", *(f"--label={name}={value}" for name, value in labels.items())]
    left = cluster.run(*create, cluster.image, "true").stdout.strip()
    found = examine(orch, "spec.yaml", "--node", timeout=180)
    said = [text for text in told(found, "engine", "warn") if "attempts that have ended" in text]
    assert len(said) == 2, "the node and this machine have one engine here"
    for text in said:
        assert f"still there: {left[:12]} (gone, attempt 3) | " in text, "the living one is not among them"


def test_gpus_that_slurm_gives_without_saying_which(orch: Orch) -> None:
    resources = {"mem": "500M", "time": "00:10:00", "gpus_per_node": 1}
    orch.write_spec(script_spec(orch, resources=resources))
    found = examine(orch, "spec.yaml", "--node", timeout=180)
    assert "gives 1 GPU without saying which" in told(found, "gpus", "warn")[0]  # the cluster's GPUs are plain files


def test_a_job_that_does_not_start_is_cancelled(orch: Orch, cluster: Cluster) -> None:
    blocker = cluster.sbatch("--partition=high", "--nodes=3", "--exclusive", "--mem=0", wrap="sleep 600")
    cluster.wait_state(blocker, "RUNNING")
    found = examine(orch, "--node", "--timeout", "4s", code=SCHEDULER)
    (said,) = told(found, "node", "bad")
    assert re.match(r"the job did not start in time \((Resources|Priority|None)\) and was cancelled", said)
    cluster.wait("the job to be gone", lambda: left_behind(orch) == [])


@pytest.mark.parametrize(
    ("python", "words"),
    [("/nowhere/python", "/nowhere/python is not on the node"), ("/usr/bin/python3", "does not run orch on the node")],
)
def test_an_interpreter_that_cannot_run_the_agent(orch: Orch, python: str, words: str) -> None:
    orch.write_spec(script_spec(orch, slurm={"partition": "low", "python": python}))
    found = examine(orch, "spec.yaml", "--node", code=SCHEDULER, timeout=180)
    assert words in told(found, "node", "bad")[0]
    assert told(found, "python")[0].startswith(python)
    assert left_behind(orch) == []


# --- what it says about other settings is what then happens -----------------------------------------------------------
@pytest.mark.parametrize("grace_s", [20, 0])
def test_orch_brings_a_cancelled_job_back_as_it_says(orch: Orch, cluster: Cluster, grace_s: int) -> None:
    cluster.configure(f"{CANCEL} GraceTime={grace_s}")
    spec = script_spec(orch, slurm={"partition": "cancel"})
    orch.write_spec(spec)
    found = examine(orch, "spec.yaml")
    assert "Slurm does not requeue the job; orch does, after the save" in told(found, "preemption", "warn")[0]
    assert "PreemptMode=REQUEUE: low, nograce" in told(found, "preemption", "warn")[0]
    assert found["save_seconds"]["preemption"] == (grace_s or 31)

    run = orch.submit(spec)["run_id"]
    orch.wait_for_step(run, 5)
    cluster.preempt()
    orch.wait_for_step(run, 1, attempt=1)
    (first,) = orch.attempts(run)[:1]
    assert first["exit_reason"] == "preempted"
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed")


def test_a_cluster_that_forwards_the_signal(orch: Orch, cluster: Cluster) -> None:
    cluster.configure("SlurmctldParameters=preempt_send_user_signal")
    assert "SIGUSR1 goes to the batch script and nothing to the steps" in told(examine(orch), "preemption")[0]


def test_preemption_by_qos(orch: Orch, cluster: Cluster) -> None:
    cluster.configure("PreemptType=preempt/qos")
    orch.write_spec(script_spec(orch, slurm={"partition": "low", "qos": "low"}))
    found = examine(orch, "spec.yaml")
    assert "can be preempted by those of QOS urgent: SIGTERM goes to the steps" in told(found, "preemption")[0]
    assert found["save_seconds"]["preemption"] == 20
    assert "are not preempted (no QOS may preempt yours)" in told(examine(orch), "preemption")[0]

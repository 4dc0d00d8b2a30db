"""The main job on the real cluster: submitted, stopped, resumed, finished, and the same bit for bit."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.data.digits import write_digits
from tests.cluster.handle import Cluster
from tests.cluster.image import lock_python
from tests.cluster.orch import REPOSITORY, Orch
from tests.equality import assert_same_run

pytestmark = pytest.mark.alone
STUBS = Path(__file__).parent / "stubs"
IMAGES = 640
EPOCHS = 5
BATCH = 64
STEPS = IMAGES // BATCH * EPOCHS


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "digits"
    assert write_digits(directory, limit=IMAGES) == IMAGES
    return directory


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code of the runs: a copy, so that an edit of the checkout while the tests run makes no other run of them."""
    directory = tmp_path_factory.mktemp("workspace")
    for package in ("orchestrator", "jobs"):
        shutil.copytree(REPOSITORY / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def main_job(
    cluster: Cluster, digits: Path, workspace: Path, *, nodes: int, nproc: int, runtime: str, epochs: int = EPOCHS
) -> dict[str, Any]:
    container: dict[str, Any] = {"runtime": "none"}
    data = str(digits)
    if runtime != "none":
        data = "/data/digits"
        mount = {"source": str(digits), "target": data, "read_only": True}
        container = {"runtime": runtime, "image": cluster.image, "mounts": [mount]}
    arguments = {
        "data": data, "method": "simclr", "model": "orch/resnet9", "epochs": epochs, "batch_size": BATCH, "seed": 3,
        "num_workers": 1, "log_every_n_steps": 1,
    }  # fmt: skip
    return {
        "name": "digits-simclr",
        "backend": "slurm",
        "job": {"module": "jobs.pretrain", "args": arguments},
        "container": container,
        "resources": {"nodes": nodes, "cpus_per_task": nproc, "mem": "3G", "time": "00:30:00"},
        "slurm": {"partition": "low"},
        "torchrun": {"nproc_per_node": nproc},
        "checkpoint": {"every_steps": 10, "every_epochs": None},
        "preemption": {"lead_time": "60s"},
        "workspace": {"path": str(workspace)},
        "env": {"OMP_NUM_THREADS": "1"},
    }


def assert_no_step_was_lost_or_repeated(orch: Orch, run: str, steps_in_all: int = STEPS) -> None:
    """After a signalled stop: each attempt starts at the step at which the one before stopped."""
    attempts = orch.attempts(run)
    assert len(attempts) > 1
    for before, after in itertools.pairwise(attempts):
        assert after["step_start"] == before["step_end"], attempts
    rows = (orch.run_dir(run) / "metrics.csv").read_text().splitlines()[1:]
    steps = [row.split(",")[0] for row in rows if row.split(",")[2] == "loss_step"]
    assert len(steps) == len(set(steps)) == steps_in_all


# Steps go on while a stop is on its way, more of them the fewer ranks there are: the run must outlast three of them.
@pytest.mark.parametrize(
    ("nodes", "nproc", "epochs", "runtime", "calm_runtime"),
    [(1, 1, 40, "docker", "docker"), (2, 1, 40, "podman", "docker"), (2, 2, 15, "docker", "none")],
)
def test_preempted_three_times_it_equals_the_untouched_run_on_another_runtime(
    orch: Orch,
    cluster: Cluster,
    digits: Path,
    workspace: Path,
    nodes: int,
    nproc: int,
    epochs: int,
    runtime: str,
    calm_runtime: str,
) -> None:
    spec = main_job(cluster, digits, workspace, nodes=nodes, nproc=nproc, runtime=runtime, epochs=epochs)
    run = orch.submit(spec)["run_id"]
    for attempt in range(3):
        orch.wait_for_step(run, orch.step(run) + random.randint(3, 12), attempt=attempt)
        if attempt == 1:
            orch.json("preempt", run, "--root", str(orch.root))
        else:
            cluster.preempt(nodes=3, seconds=1)
        cluster.wait("the stop", lambda n=attempt: (orch.run_dir(run) / f"verdict-{n:03d}.json").exists(), timeout=60)
    done = orch.wait_for_state(run, "completed", timeout=400)
    assert done["attempt"] == 3
    assert [event["cause"] for event in orch.events(run, "signalled") if event["node"] == "n1"] == ["preempted"] * 3
    # The grace is 20 s, the drill's 60: a notice read wrongly would leave KillWait (31 s) or the time limit (30 min).
    for event in orch.events(run, "signalled"):
        low, high = (30, 70) if event["attempt"] == 1 else (5, 25)
        assert low < event["deadline"] - event["at"] < high, event
    assert_no_step_was_lost_or_repeated(orch, run, IMAGES // BATCH * epochs)
    for number in range(3):
        verdict = json.loads((orch.run_dir(run) / f"verdict-{number:03d}.json").read_text())
        assert (verdict["outcome"], verdict["reason"]) == ("saved", "preempted")
    assert cluster.containers() == cluster.podman_containers() == []
    assert len(done["progress"]["rank_seconds"]) == nodes * nproc
    spec = main_job(cluster, digits, workspace, nodes=nodes, nproc=nproc, runtime=calm_runtime, epochs=epochs)
    calm = orch.submit({**spec, "root": str(orch.directory / "calm")})["run_id"]
    calm_orch = Orch(cluster, orch.directory)
    calm_orch.root = orch.directory / "calm"
    assert (calm == run) == (calm_runtime != "none"), "an engine does not make another run of it, an image does"
    assert calm_orch.wait_for_state(calm, "completed", timeout=400)["attempt"] == 0
    assert_same_run(calm_orch.run_dir(calm), orch.run_dir(run))


def one_spec(base: dict[str, Any], runtime: str, image: str, directory: Path) -> dict[str, Any]:
    """The same job; only the container and the interpreter differ. apptainer and enroot are stubs, which start the
    program with the interpreter that `none` has."""
    python = lock_python()
    setup = [
        f"export ORCH_NODE_DIR={directory}/node ENROOT_DATA_PATH={directory}/unpacked ORCH_STUB_LOG={directory}/calls",
        f'export ORCH_STUB_PATH="{python.parent}:$PATH" PATH="{STUBS}:$PATH"',
    ]
    slurm = {**base["slurm"], "setup": setup}
    if runtime == "none":
        return {**base, "container": {"runtime": "none"}, "slurm": {**slurm, "python": str(python)}}
    return {**base, "container": {**base["container"], "runtime": runtime, "image": image}, "slurm": slurm}


def test_one_spec_on_every_runtime(orch: Orch, cluster: Cluster, digits: Path, workspace: Path, registry: str) -> None:
    tag = f"{registry}/lab/pretrain:1"
    cluster.run("docker", "tag", cluster.image, tag)
    cluster.run("docker", "push", "--quiet", tag, timeout=300)
    image = orch.json("image", "lock", tag)["image"]
    cluster.run("docker", "rmi", tag, image, check=False)
    assert image.startswith(f"{registry}/lab/pretrain@sha256:")
    base = main_job(cluster, digits, workspace, nodes=1, nproc=1, runtime="docker", epochs=20)
    base["job"]["args"]["data"] = str(digits)
    base["container"]["mounts"] = [{"source": str(digits), "target": str(digits), "read_only": True}]
    runs = {}
    for runtime in ("docker", "podman", "none", "apptainer", "pyxis"):
        here = Orch(cluster, orch.directory)
        here.root = orch.directory / runtime
        spec = one_spec(base, runtime, image, orch.directory)
        run = here.submit({**spec, "root": str(here.root)})["run_id"]
        here.wait_for_step(run, 5, timeout=300)
        cluster.preempt(nodes=3, seconds=1)
        assert here.wait_for_state(run, "completed", timeout=400)["attempt"] == 1
        assert_no_step_was_lost_or_repeated(here, run, IMAGES // BATCH * 20)
        assert [event["runtime"] for event in here.events(run, "container_started")] == [runtime] * 2
        runs[runtime] = here.run_dir(run)
    assert len({path.name for runtime, path in runs.items() if runtime != "none"}) == 1, "no runtime makes another run"
    for path in runs.values():
        assert_same_run(runs["docker"], path)


@pytest.mark.parametrize("nproc", [1, 2])
def test_without_a_container_a_run_survives_what_slurm_does_by_default(
    orch: Orch, cluster: Cluster, digits: Path, workspace: Path, nproc: int
) -> None:
    """Here Slurm's SIGTERM hits every process of the step: torchrun, ranks, data workers."""
    spec = main_job(cluster, digits, workspace, nodes=1, nproc=nproc, runtime="none", epochs=20)
    run = orch.submit(spec)["run_id"]
    orch.wait_for_step(run, random.randint(3, 20))
    cluster.preempt(nodes=3, seconds=1)
    done = orch.wait_for_state(run, "completed", timeout=400)
    assert done["attempt"] == 1
    assert_no_step_was_lost_or_repeated(orch, run, IMAGES // BATCH * 20)

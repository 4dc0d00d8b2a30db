"""The cluster that the other tests stand on: it is a real one, and it leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.engine import bridge_name
from tests.cluster.handle import Cluster
from tests.cluster.requirements import why_not
from tests.cluster.service import ClusterError, descendants, wait_for


def test_a_job_runs_on_two_nodes_and_sacct_knows_it(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = cluster.sbatch("--nodes=2", f"--output={out}", wrap="srun --label printenv SLURMD_NODENAME")
    assert cluster.wait_end(job) == "COMPLETED"
    assert sorted(out.read_text().split()) == ["0:", "1:", "n1", "n2"]
    states = ["sacct", "--noheader", "--allocations", "--format=State", f"--jobs={job}"]
    cluster.wait("sacct to know the end", lambda: "COMPLETED" in cluster.run(*states).stdout)


def test_a_job_without_grace_is_preempted_requeued_and_started_again(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "starts"
    job = cluster.sbatch(
        "--partition=nograce", "--nodes=2", wrap=f'echo "${{SLURM_RESTART_COUNT:-0}}" >> {log}; exec sleep 120'
    )
    cluster.wait_state(job, "RUNNING")
    cluster.wait("the first start", log.exists)
    cluster.preempt(nodes=3, seconds=1)
    cluster.wait("the second start", lambda: log.read_text().split() == ["0", "1"], timeout=90)


def test_a_crashed_node_daemon_leaves_its_jobs_running_and_comes_back(cluster: Cluster) -> None:
    job = cluster.sbatch("--nodelist=n2", wrap="sleep 6")
    cluster.wait_state(job, "RUNNING")
    cluster.stop("n2", signal="SIGKILL")
    assert cluster.pid("n2") is None
    cluster.start_daemon("n2")
    assert cluster.wait_end(job) == "COMPLETED"


def test_the_image_trains_nothing_but_imports_everything_as_any_user(cluster: Cluster) -> None:
    assert cluster.image is not None and cluster.image.startswith("sha256:")
    code = "import os, lightning, torch; print(os.getuid(), torch.distributed.is_gloo_available())"
    out = cluster.run(
        "docker", "run", "--rm", "--network=host", "--user=1234:1234", cluster.image, "python3", "-c", code, timeout=120
    )
    assert out.stdout.split() == ["1234", "True"]


def test_without_slurmdbd_jobs_run_and_sacct_fails(cluster_without_accounting: Cluster) -> None:
    job = cluster_without_accounting.sbatch(wrap="true")
    assert cluster_without_accounting.wait_end(job) == "COMPLETED"
    assert cluster_without_accounting.run("sacct", check=False).returncode != 0


@pytest.fixture
def directory() -> Iterator[Path]:
    """A path for a cluster: short, and unlike tmp_path below directories that every user may enter (munged insists)."""
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="orch-", dir="/tmp") as parent:
        Path(parent).chmod(0o755)
        yield Path(parent) / "c"


def test_a_start_that_fails_half_way_leaves_nothing_behind(directory: Path) -> None:
    with pytest.raises(ClusterError, match="slurmctld ended"):
        Cluster.start(
            "--no-accounting", "--no-image", "--extra-conf=SelectType=select/nonsense", f"--directory={directory}"
        )
    assert not directory.exists()
    assert not Path("/sys/class/net", bridge_name(directory)).exists()
    assert not _mentioning(str(directory))


def test_a_killed_pytest_takes_its_cluster_with_it(directory: Path) -> None:
    """The owner dies by SIGKILL with a job running: leash, adopted orphans and the directory all go."""
    owner = (
        "import sys, time\nfrom tests.cluster.handle import Cluster\n"
        f"c = Cluster.start('--no-accounting', '--no-docker', '--directory={directory}')\n"
        "job = c.sbatch('--nodes=2', wrap='srun sleep 300 & setsid sleep 301 & wait')\nc.wait_state(job, 'RUNNING')\n"
        "print('up', flush=True)\ntime.sleep(300)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "up\n"
        below = descendants(process.pid)
        process.kill()
    wait_for(
        "everything to be gone",
        lambda: not directory.exists() and not any(Path(f"/proc/{pid}").exists() for pid in below),
        timeout=30,
    )
    assert not _mentioning(str(directory))


def _mentioning(text: str) -> list[str]:
    """Command lines of running processes that contain `text`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # ended meanwhile
        if text in line:
            found.append(line)
    return found

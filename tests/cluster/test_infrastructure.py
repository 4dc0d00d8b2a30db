"""The cluster that the other tests stand on: it is a real one, and it leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import ANY

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


def test_daemons_commands_and_jobs_are_of_the_release_that_was_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    release = cluster.slurm_version
    assert release == (os.environ.get("ORCH_TEST_SLURM") or release)
    out = tmp_path / "out"
    cluster.wait_end(
        cluster.sbatch(f"--output={out}", wrap="srun --version; srun printenv SLURM_CONF; pwd", cwd=tmp_path)
    )
    assert out.read_text().split() == ["slurm-wlm", ANY, str(cluster.directory / "slurm.conf"), str(tmp_path)]
    daemons = cluster.run("sinfo", "--noheader", "--format=%v").stdout + cluster.run("scontrol", "version").stdout
    versions = {word for word in (out.read_text() + daemons).split() if word[0].isdigit()}
    assert {version.rpartition(".")[0] for version in versions} == {release}


def test_srun_hands_on_stdin_arguments_and_environment_unchanged(cluster: Cluster, tmp_path: Path) -> None:
    hostile = "two  spaces 'and' \"quotes\" $HOME\n"
    program = "import os, sys; print(os.environ['X'], sys.argv[1], sys.stdin.read(), os.getcwd(), sep='')"
    argv = ["srun", "--mem=100M", sys.executable, "-c", program, hostile]
    done = cluster.run(*argv, stdin=hostile, env={"X": hostile}, cwd=tmp_path)
    assert done.stdout == f"{hostile * 3}{tmp_path}\n"


def test_two_clusters_side_by_side_know_their_own_processes_and_share_no_job_number(
    cluster: Cluster, cluster_without_accounting: Cluster
) -> None:
    jobs, processes = [], []
    for each in (cluster, cluster_without_accounting):
        job = each.sbatch(wrap="sleep 60")
        each.wait_state(job, "RUNNING")
        jobs.append(job)
        processes.append(set(each.processes()))
        assert each.pid("slurmctld") in processes[-1]
    assert not processes[0] & processes[1]
    assert abs(int(jobs[0]) - int(jobs[1])) > 100


def test_a_job_without_grace_is_preempted_requeued_and_started_again(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "starts"
    job = cluster.sbatch(
        "--partition=nograce", "--nodes=2", wrap=f'echo "${{SLURM_RESTART_COUNT:-0}}" >> {log}; exec sleep 120'
    )
    cluster.wait_state(job, "RUNNING")
    cluster.wait("the first start", log.exists)
    cluster.preempt(nodes=3, seconds=1)
    cluster.wait("the second start", lambda: log.read_text().split() == ["0", "1"], timeout=90)


def until(file: Path) -> str:
    """Shell words that wait for a file."""
    return f"until [ -e {file} ]; do sleep 0.2; done"


def test_a_crashed_node_daemon_leaves_its_jobs_running_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch("--nodelist=n2", wrap=until(tmp_path / "go"))
    cluster.wait_state(job, "RUNNING")
    cluster.stop("n2", signal="SIGKILL")
    assert cluster.pid("n2") is None
    cluster.start_daemon("n2")
    (tmp_path / "go").touch()
    assert cluster.wait_end(job) == "COMPLETED"


def test_settings_of_a_test_are_taken_by_every_daemon_while_jobs_run_and_end_with_the_test(
    cluster: Cluster, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    program = f"echo start >> {log}; {until(tmp_path / 'go')}; echo end >> {log}"
    job = cluster.sbatch("--nodes=2", f"--output={tmp_path}/out", wrap=f"srun --ntasks-per-node=1 sh -c '{program}'")
    cluster.wait("both tasks", lambda: log.exists() and log.read_text() == "start\n" * 2)
    defaults = cluster.run("scontrol", "show", "config").stdout
    cluster.configure("SlurmctldParameters=preempt_send_user_signal", "SlurmdTimeout=10", "JobRequeue=0", "KillWait=9")
    config = "".join(cluster.run("scontrol", "show", "config").stdout.split())
    for setting in ("preempt_send_user_signal", "SlurmdTimeout=10sec", "JobRequeue=0", "KillWait=9sec"):
        assert setting in config
    refused = cluster.sbatch(wrap="sleep 60")
    cluster.wait_state(refused, "RUNNING")
    assert cluster.run("scontrol", "requeue", refused, check=False).returncode == 1
    (tmp_path / "go").touch()
    assert cluster.wait_end(job) == "COMPLETED", (tmp_path / "out").read_text()
    assert log.read_text() == "start\n" * 2 + "end\n" * 2
    cluster.tidy()
    again = cluster.run("scontrol", "show", "config").stdout
    assert _settings(again) == _settings(defaults)


def _settings(config: str) -> list[str]:
    """`scontrol show config` without what changes by itself."""
    return [
        line for line in config.splitlines() if not line.startswith(("Configuration data", "BOOT_TIME", "NEXT_JOB"))
    ]


def test_with_the_users_signal_a_preempted_step_hears_that_one(cluster: Cluster, tmp_path: Path) -> None:
    cluster.configure("SlurmctldParameters=preempt_send_user_signal")
    heard = tmp_path / "heard"
    traps = f'for s in USR1 TERM; do trap "echo $s >> {heard}; exit" $s; done'
    cluster.sbatch("--signal=USR1@20", wrap=f"srun sh -c '{traps}; touch {heard}; while :; do sleep 0.1; done'")
    cluster.wait("the step", heard.exists)
    cluster.preempt(seconds=1)
    assert cluster.wait("the signal", heard.read_text) == "USR1\n"


def test_a_partition_can_cancel_what_it_preempts(cluster: Cluster) -> None:
    job = cluster.sbatch("--partition=cancel", wrap="sleep 60")
    cluster.wait_state(job, "RUNNING")
    cluster.preempt(seconds=1)
    cluster.wait("the grace to begin", lambda: cluster.job(job)["PreemptTime"] != "None")
    assert cluster.state(job) == "RUNNING"
    assert cluster.wait_end(job) == "PREEMPTED"


def test_an_urgent_job_preempts_a_low_one_of_the_same_partition_by_qos(cluster: Cluster) -> None:
    cluster.configure("PreemptType=preempt/qos")
    low = cluster.sbatch("--qos=low", "--nodes=3", wrap="sleep 60")
    cluster.wait_state(low, "RUNNING")
    urgent = cluster.sbatch("--qos=urgent", "--nodes=3", "--exclusive", wrap="sleep 1")
    cluster.wait("the grace to begin", lambda: cluster.job(low)["PreemptTime"] != "None")
    assert cluster.state(low) == "RUNNING"
    assert cluster.wait_end(urgent) == "COMPLETED"
    assert cluster.wait_state(low, "RUNNING")["Restarts"] == "1"


def test_a_partition_of_a_tests_own_can_suspend(cluster: Cluster, tmp_path: Path) -> None:
    """Only with gang scheduling for all, so no partition of the defaults does."""
    cluster.configure("PreemptMode=SUSPEND,GANG", "PartitionName=suspend Nodes=ALL PriorityTier=1 PreemptMode=SUSPEND")
    job = cluster.sbatch("--partition=suspend", wrap=until(tmp_path / "low"))
    cluster.wait_state(job, "RUNNING")
    high = until(tmp_path / "high")
    cluster.sbatch("--partition=high", "--nodes=3", "--exclusive", wrap=high)  # memory stays with the suspended
    cluster.wait_state(job, "SUSPENDED")
    (tmp_path / "high").touch()
    cluster.wait_state(job, "RUNNING")
    (tmp_path / "low").touch()
    assert cluster.wait_end(job) == "COMPLETED"


def test_a_setting_that_slurm_refuses_is_told_and_ends_with_the_test(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="slurmctld ended"):
        cluster.configure("SelectType=select/nonsense")
    cluster.tidy()
    assert cluster.wait_end(cluster.sbatch(wrap="true")) == "COMPLETED"


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
            "--no-accounting", "--no-image", "--setting=SelectType=select/nonsense", f"--directory={directory}"
        )
    assert not directory.exists()
    assert not Path("/sys/class/net", bridge_name(directory)).exists()
    assert not _mentioning(str(directory))


def test_a_release_that_nobody_packages_is_refused(directory: Path) -> None:
    with pytest.raises(ClusterError, match=r"no Slurm 19\.05 .* there is 24\.11"):
        Cluster.start("--slurm=19.05", f"--directory={directory}")
    assert not directory.exists()


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
        timeout=60,
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

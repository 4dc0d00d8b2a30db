"""munged, slurmctld and one slurmd per virtual node, all on loopback and in one directory (`slurm.conf(5)`)."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.cluster.service import PORTS, Service, accepts, call, free_port, succeeds

NODES = ("n1", "n2", "n3")
CPUS = 8
MEMORY_MB = 8000
GPUS = 2
# Slurm's defaults everywhere, except what lets three nodes live on one machine and what only shortens waiting.
_CONF = """\
ClusterName=orchtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
# Clusters side by side have jobs of different numbers: the port at which a run's nodes meet depends on them.
FirstJobId={first_job}
AuthType=auth/munge
# A requeued job waits for the lifetime of its old credential (default 120 s) before it may start again.
AuthInfo=socket={munge_socket},cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
StateSaveLocation={dir}/state
SlurmctldPidFile={dir}/slurmctld.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmdLogFile={dir}/log/slurmd.%n.log
SlurmdSpoolDir={dir}/spool.%n
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=31
MailProg=/bin/true
GresTypes=gpu
{accounting}
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=nograce Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 MaxTime=INFINITE State=UP
PartitionName=cancel Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
# Used once a test sets PreemptType=preempt/qos; jobs of `low` have the grace of the partition of that name.
_QOS = (["low", "GraceTime=20"], ["urgent", "Preempt=low"])


def start_munge(directory: Path, env: Mapping[str, str]) -> Service:
    """munged with its own key and socket, as the user that starts the cluster (the key's owner must be that user)."""
    # munged refuses a socket directory that others may not enter, and a key directory that others may read.
    sockets, private = directory / "munge", directory / "munge-private"
    sockets.mkdir(mode=0o755)
    private.mkdir(mode=0o700)
    key = private / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    socket_path = munge_socket(directory)
    return Service(
        name="munged",
        argv=[
            "munged", "--foreground", f"--socket={socket_path}", f"--key-file={key}",
            f"--pid-file={sockets}/munged.pid", f"--seed-file={private}/seed", f"--log-file={private}/munged.log",
        ],
        env=env,
        log=directory / "log" / "munged.out",
        ready=lambda: succeeds(["munge", f"--socket={socket_path}", "--no-input", "--output=/dev/null"], env),
    )  # fmt: skip


def munge_socket(directory: Path) -> Path:
    """Where munged of this cluster listens."""
    return directory / "munge" / "socket"


def default_settings(directory: Path, *, dbd_port: int | None) -> dict[str, str]:
    """The lines of slurm.conf by what they set, in order."""
    host = socket.gethostname().partition(".")[0]
    ctld_port = free_port()
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr={_address(name)} Port={free_port()} CPUs={CPUS} "
        f"RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN"
        for name in NODES
    )
    accounting = "AccountingStorageType=accounting_storage/none"
    if dbd_port is not None:
        accounting = (
            "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
            f"AccountingStoragePort={dbd_port}\n"
            # Connections to slurmdbd ignore AuthInfo and look for munge's default socket unless this names it.
            f"AccountingStoragePass={munge_socket(directory)}\nJobAcctGatherType=jobacct_gather/linux"
        )
    text = _CONF.format(
        host=host, ctld_port=ctld_port, munge_socket=munge_socket(directory), dir=directory, accounting=accounting,
        nodes=nodes, first_job=(ctld_port - PORTS[0]) * 350 + 1,
    )  # fmt: skip
    return by_name(line for line in text.splitlines() if not line.startswith("#"))


def by_name(settings: Iterable[str]) -> dict[str, str]:
    """`KillWait=5` under `KillWait`; a node or partition with all it has is one setting (`PartitionName=low`)."""
    return {re.match(r"(NodeName|PartitionName)=\S+|[^=]*", line)[0]: line for line in settings}  # type: ignore[index]


def write_conf(directory: Path, settings: Mapping[str, str]) -> None:
    """slurm.conf."""
    (directory / "slurm.conf").write_text("".join(f"{line}\n" for line in settings.values()))


def prepare(directory: Path) -> None:
    """What the daemons want to find beside slurm.conf."""
    gpus = [directory / "gpu" / f"fake{i}" for i in range(GPUS)]
    gpus[0].parent.mkdir()
    for file in gpus:
        file.touch()  # a gres count without device files is refused
    (directory / "gres.conf").write_text(
        f"NodeName={','.join(NODES)} Name=gpu File={directory}/gpu/fake[0-{GPUS - 1}]\n"
    )
    (directory / "state").mkdir()


def register(env: Mapping[str, str]) -> None:
    """Tell slurmdbd of the cluster and of the two QOS `low` and `urgent`, which root may use."""
    for words in (
        ["add", "cluster", "orchtest"],
        *(["add", "qos", *words] for words in _QOS),
        ["modify", "user", "root", "set", f"qos+={','.join(name for name, _ in _QOS)}"],
    ):
        call(["sacctmgr", "--immediate", *words], env=env, timeout=60)


def _address(node: str) -> str:
    """An address each: torchrun knows its peers by address and pid, and in two containers both can be alike."""
    return f"127.0.0.{NODES.index(node) + 2}"


def controller(directory: Path, env: Mapping[str, str]) -> Service:
    """slurmctld."""
    return Service(
        name="slurmctld",
        argv=["slurmctld", "-D"],
        env=env,
        log=directory / "log" / "slurmctld.out",
        ready=lambda: succeeds(["scontrol", "ping"], env),
    )


def node(directory: Path, name: str, env: Mapping[str, str], *, settings: Mapping[str, str]) -> Service:
    """slurmd of one virtual node; ready when it listens and the controller lists it as idle or in use."""
    (directory / f"spool.{name}").mkdir(mode=0o755, exist_ok=True)
    port = int(settings[f"NodeName={name}"].partition(" Port=")[2].split()[0])
    return Service(
        name=name,
        # The path of slurmstepd is compiled in; this one is of the same release as slurmd.
        argv=["slurmd", "-D", "-N", name, "-d", shutil.which("slurmstepd", path=env["PATH"]) or "slurmstepd"],
        env=env,
        log=directory / "log" / f"{name}.out",
        ready=lambda: (
            # A controller that was restarted lists its nodes as it left them, whether they are there or not.
            accepts(port, _address(name))
            and _output(["sinfo", "-h", "-n", name, "-o", "%t"], env).split()[:1]
            in (["idle"], ["mix"], ["alloc"], ["comp"])
        ),
        timeout=60,
    )


def _output(argv: list[str], env: Mapping[str, str]) -> str:
    """Standard output of a short question, empty when it fails or takes more than 10 s."""
    executable = shutil.which(argv[0], path=env["PATH"])
    if executable is None:
        return ""
    try:
        done = subprocess.run([executable, *argv[1:]], env=dict(env), capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""

"""What a test holds in its hand: a running cluster, its commands with deadlines, its daemons by name."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tests.cluster.service import ClusterError, descendants, wait_for

T = TypeVar("T")
_REPOSITORY = Path(__file__).resolve().parents[2]
_START_TIMEOUT_S = 1500  # the first start on a machine builds the image
# States in which a job has left the queue for good.
FINAL = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "DEADLINE",
    "BOOT_FAIL",
    "PREEMPTED",
)


class Cluster:
    """A running cluster. Every method has a deadline; errors are ClusterError with what the command said."""

    def __init__(self, description: Mapping[str, Any], process: subprocess.Popen[str] | None = None) -> None:
        self.directory = Path(description["directory"])
        self.nodes: tuple[str, ...] = tuple(description["nodes"])
        self.accounting: bool = description["accounting"]
        self.image: str | None = description["image"]
        self.slurm_version = ".".join(description["slurm_version"].split(".")[:2])
        """The release: "22.05", "24.11"."""
        self.overrides: dict[str, str] = dict(description["env"])
        self._supervisor: int = description["supervisor"]
        self._process = process

    @classmethod
    def start(cls, *options: str) -> Cluster:
        """Start a cluster that ends with this process; `options` as in `python -m tests.cluster.supervisor --help`."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.supervisor", "--leash", *options],
            cwd=_REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches only pytest, which then lets go of the leash
        )
        assert process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout], [], [], _START_TIMEOUT_S)
            line = process.stdout.readline() if ready else ""
        except BaseException:  # Ctrl-C: while it starts it does not look at the leash, but it obeys SIGTERM
            process.terminate()
            _let_go(process)
            raise
        description = json.loads(line) if line else {"error": f"no word from the supervisor (code {process.poll()})"}
        if "error" in description:
            _let_go(process)
            raise ClusterError(description["error"])
        return cls(description, process)

    @classmethod
    def attach(cls, directory: Path) -> Cluster:
        """The cluster that `make cluster` started in `directory`; `end` leaves it running."""
        return cls(json.loads((directory / "cluster.json").read_text()))

    def end(self) -> None:
        """End it and everything it started; blocks until nothing is left."""
        if self._process is not None:
            _let_go(self._process)

    def hold(self) -> None:
        """Block until the cluster has ended, by whatever hand."""
        if self._process is not None:
            self._process.wait()

    @property
    def env(self) -> dict[str, str]:
        """This process's environment with the cluster's variables: pass it to whatever shall talk to the cluster."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "DOCKER_", "ORCH_"))}
        return {**inherited, **self.overrides}

    def run(
        self,
        *argv: str,
        timeout: float = 120,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: str | None = None,
        stdin: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command against the cluster, as `user` (a name of this machine) if given."""
        prefix = ["setpriv", "--reuid", user, "--regid", user, "--init-groups", "--"] if user else []
        try:
            done = subprocess.run(
                [*prefix, *argv],
                env={**self.env, **(env or {})},
                input=stdin,
                capture_output=True,
                text=True,
                timeout=timeout,
                cwd=cwd,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(
                f"no answer within {timeout:g} s: {' '.join(argv)}\n{error.stdout!r} {error.stderr!r}"
            ) from error
        if check and done.returncode != 0:
            raise ClusterError(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def sbatch(self, *options: str, wrap: str | None = None, cwd: Path | None = None) -> str:
        """Submit and return the job id; `options` as of sbatch, a script and its arguments last.

        100 MB unless they say otherwise: without `--mem` a job takes the whole memory of its nodes.
        """
        wrapped = [f"--wrap={wrap}"] if wrap is not None else []
        defaults = ["--parsable", "--output=/dev/null", "--mem=100M"]
        out = self.run("sbatch", *defaults, *wrapped, *options, cwd=cwd)
        return out.stdout.strip().partition(";")[0]

    def preempt(self, *, nodes: int = 3, seconds: float = 3) -> str:
        """Submit a job of higher priority that needs `nodes` whole nodes for `seconds`; returns its id."""
        return self.sbatch(
            "--partition=high", f"--nodes={nodes}", "--exclusive", "--mem=0", "--time=5", wrap=f"sleep {seconds}"
        )

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job` (an array: of its first element); empty when Slurm has forgotten it."""
        done = self.run("scontrol", "show", "job", "--oneliner", job_id, check=False)
        first = done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else ""
        return {key: value for key, _, value in (word.partition("=") for word in first.split()) if value}

    def state(self, job_id: str) -> str:
        """JobState of a job, empty when unknown."""
        return self.job(job_id).get("JobState", "")

    def wait_state(self, job_id: str, *states: str, timeout: float = 60) -> dict[str, str]:
        """Fields of the job once it is in one of `states`; fails early when it has ended in another."""

        def probe() -> dict[str, str] | None:
            job = self.job(job_id)
            state = job.get("JobState", "")
            if state in FINAL and state not in states:
                raise ClusterError(f"job {job_id} ended as {state}, not {'/'.join(states)}: {job}")
            return job if state in states else None

        try:
            return self.wait(f"job {job_id} to be {'/'.join(states)}", probe, timeout=timeout) or {}
        except ClusterError as error:
            raise ClusterError(f"{error}; it is: {self.job(job_id)}") from None

    def wait_end(self, job_id: str, *, timeout: float = 120) -> str:
        """Final state of a job."""
        return self.wait_state(job_id, *FINAL, timeout=timeout)["JobState"]

    def wait(self, what: str, probe: Callable[[], T], *, timeout: float = 90, interval: float = 0.2) -> T:
        """The first truthy value of `probe` (see `service.wait_for`)."""
        return wait_for(what, probe, timeout=timeout, interval=interval)

    def containers(self, *filters: str) -> list[str]:
        """Ids of the engine's containers, running or not; `filters` as of `docker ps --filter`."""
        return self.run("docker", "ps", "--all", "--quiet", *(f"--filter={f}" for f in filters)).stdout.split()

    def podman_containers(self, *filters: str) -> list[str]:
        """Ids of podman's containers, running or not; `filters` as of `podman ps --filter`."""
        return self.run("podman", "ps", "--all", "--quiet", *(f"--filter={f}" for f in filters)).stdout.split()

    def story(self) -> str:
        """What the cluster says of itself when a test waited in vain: queue, nodes, the ends of the logs."""
        told = []
        for argv in (["scontrol", "show", "job", "--oneliner"], ["sinfo", "-N", "-o", "%N %T %E"]):
            try:
                done = self.run(*argv, check=False)
                told.append(done.stdout + done.stderr)
            except ClusterError as error:
                told.append(str(error))
        logs = sorted((self.directory / "log").glob("slurm*.log"))
        told += ["\n".join([f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-15:]]) for log in logs]
        return "\n".join(told)

    def pid(self, daemon: str) -> int | None:
        """Process id of a daemon (munged, mariadbd, slurmdbd, slurmctld, n1 … n3, dockerd), None while it is down."""
        pid = self._ask(op="status")["pids"][daemon]
        return None if pid is None else int(pid)

    def processes(self) -> list[int]:
        """pids of everything that runs in this cluster (daemons, jobs, containers), and in no other of the machine.

        Runs of the same spec have the same id in every cluster, so a search through all of /proc finds strangers.
        """
        return descendants(self._supervisor)

    def stop(self, daemon: str, *, signal: str = "SIGTERM") -> None:
        """End one daemon (SIGKILL: as in a crash) and wait until it is gone. Jobs of a slurmd live on."""
        self._ask(op="stop", name=daemon, signal=signal)

    def start_daemon(self, daemon: str) -> None:
        """Start a daemon that was stopped and wait until it answers."""
        self._ask(op="start", name=daemon)

    def configure(self, *settings: str) -> None:
        """Run with these lines of slurm.conf instead of the defaults of the same name, until `tidy`.

        A partition is one line: its name and all it has. Slurm's daemons start again (2 s); jobs run on.
        """
        self._ask(op="configure", changes=settings)

    def tidy(self) -> None:
        """Bring the cluster back to idle: default settings, daemons up, queue empty, nodes usable, no containers."""
        status = self._ask(op="status")
        for name, pid in status["pids"].items():
            if pid is None and not (status["changes"] and name in ("slurmctld", *self.nodes)):
                self.start_daemon(name)
        if status["changes"]:
            self.configure()
        ids = self.run("squeue", "--noheader", "--format=%A").stdout.split()
        if ids:
            self.run("scancel", *ids, check=False)  # one that ends by itself meanwhile is no failure
        self.wait("the queue to be empty", lambda: not self.run("squeue", "--noheader").stdout.strip(), timeout=180)
        self.wait("all nodes to be idle", self._all_idle, timeout=180)
        if "DOCKER_HOST" not in self.overrides:
            return
        if left := self.containers():
            self.run("docker", "rm", "--force", *left)
        if left := self.podman_containers():
            self.run("podman", "rm", "--force", "--time=0", *left)

    def _all_idle(self) -> bool:
        states = dict(
            line.split() for line in self.run("sinfo", "-hN", "-p", "high", "-o", "%N %T").stdout.splitlines()
        )
        for name, state in states.items():
            if state.startswith(("down", "drain")):
                self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        return all(states.get(name) == "idle" for name in self.nodes)

    def _ask(self, **request: Any) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(300)
            connection.connect(str(self.directory / "control"))
            with connection.makefile("rw") as stream:
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                answer: dict[str, Any] = json.loads(stream.readline())
        if "error" in answer:
            raise ClusterError(f"{request}: {answer['error']}")
        return answer


def _let_go(process: subprocess.Popen[str]) -> None:
    """Close the leash and wait until the supervisor has cleared up."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    try:
        process.wait(300)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise ClusterError("the cluster did not end within 300 s of being told to; it was killed") from None
    finally:
        process.stdout.close()


def show_environment(cluster: Cluster) -> str:
    """Lines that make a shell talk to this cluster."""
    return "".join(f"export {key}={value}\n" for key, value in cluster.overrides.items())

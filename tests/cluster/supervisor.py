"""The process that owns the cluster: parent of every daemon, reachable through one socket, ends all when it ends.

It is a process of its own, so that the cluster dies with pytest however pytest dies: its standard input is a leash.
Requests are one JSON line each on `<directory>/control`: {"op": "status" | "start" | "stop" | "configure", …}.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.cluster import database, engine, image, podman, release, slurm
from tests.cluster.service import (
    ClusterError,
    Service,
    adopt_orphans,
    call,
    children_by_parent,
    descendants,
    end_descendants,
    free_port,
    reap,
    remove_tree,
)


class Supervisor:
    """Starts, answers for and ends the daemons of one cluster."""

    def __init__(
        self,
        directory: Path,
        *,
        accounting: bool,
        docker: bool,
        with_image: bool,
        settings: list[str],
        slurm_release: str | None,
    ) -> None:
        self.directory = directory
        self.accounting = accounting
        self.docker = docker
        self.with_image = with_image
        self.settings = slurm.by_name(settings)
        self.slurm_release = slurm_release
        self.changes: list[str] = []
        self.services: dict[str, Service] = {}
        self.bridge: str | None = None
        self.image: str | None = None
        self.env = {
            "PATH": os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin",
            "HOME": os.environ.get("HOME", "/root"),
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(directory / "slurm.conf"),
            "DOCKER_HOST": f"unix://{directory}/docker.sock",
            **podman.variables(directory),
        }
        for name in ("ORCH_TEST_CACHE", "XDG_CACHE_HOME"):
            if name in os.environ:
                self.env[name] = os.environ[name]

    def start(self) -> None:
        """Bring everything up; raises ClusterError. Call `end` afterwards in every case."""
        adopt_orphans()
        self.directory.chmod(0o755)
        (self.directory / "log").mkdir()
        if self.slurm_release is not None:
            self._install_slurm(self.slurm_release)
        if self.docker:
            self._start_engine()
        self._up(slurm.start_munge(self.directory, self.env))
        dbd_port = self._start_accounting() if self.accounting else None
        self.settings = {**slurm.default_settings(self.directory, dbd_port=dbd_port), **self.settings}
        slurm.prepare(self.directory)
        self._write_conf()
        if dbd_port is not None:
            slurm.register(self.env)
        self._up(slurm.controller(self.directory, self.env))
        for name in slurm.NODES:
            self.services[name] = slurm.node(self.directory, name, self.env, settings=self.settings)
        self._start_nodes()
        if self.docker:
            self._finish_engine()

    def _install_slurm(self, wanted: str) -> None:
        """Another release than the machine's: found first on PATH by daemons, tests and jobs."""
        tree = self.directory / "slurm"
        release.install(wanted, tree)
        self.env["PATH"] = f"{tree}/bin:{self.env['PATH']}"
        self.settings["PluginDir"] = f"PluginDir={release.plugins(tree)}"

    def _write_conf(self) -> None:
        slurm.write_conf(self.directory, {**self.settings, **slurm.by_name(self.changes)})

    def _start_nodes(self) -> None:
        nodes = [self.services[name] for name in slurm.NODES]
        for service in nodes:
            service.start()
        for service in nodes:
            service.wait_ready()

    def configure(self, changes: list[str]) -> None:
        """Defaults with `changes` from now on; daemons of Slurm start again, jobs run on. Raises ClusterError.

        Always a restart: `scontrol reconfigure` takes most parameters silently and some, such as PreemptType, not.
        """
        for name in ("slurmctld", *slurm.NODES):
            self.services[name].stop()
        self.changes = changes
        self._write_conf()
        controller = self.services["slurmctld"]
        controller.start()
        controller.wait_ready()
        self._start_nodes()

    def _up(self, service: Service) -> None:
        self.services[service.name] = service
        service.start()
        service.wait_ready()

    def _start_accounting(self) -> int:
        database_port, dbd_port = free_port(), free_port()
        self._up(database.database(self.directory, database_port, self.env))
        # slurmdbd reads the location of its own file from that of slurm.conf, which need not exist yet.
        self._up(
            database.accounting(
                self.directory,
                port=dbd_port,
                database_port=database_port,
                env=self.env,
                extra=self.settings.get("PluginDir", ""),
            )
        )
        return dbd_port

    def _start_engine(self) -> None:
        """Spawn dockerd first and look at it last: it needs seconds that the rest of the start can use."""
        self.bridge = engine.add_bridge(self.directory, self.env)
        if self.with_image:
            image.prefill(self.directory / "docker")
        service = engine.engine(self.directory, self.bridge, self.env)
        self.services[service.name] = service
        service.start()

    def _finish_engine(self) -> None:
        self._finish_docker()
        if self.with_image:
            podman.share_image()
        podman.configure(self.directory)

    def _finish_docker(self) -> None:
        service = self.services["dockerd"]
        service.wait_ready()
        if not self.with_image:
            return
        self.image = image.ensure_image(self.env)
        if not image.has_template():
            call(["docker", "image", "prune", "--force"], env=self.env, timeout=60)  # the build's stages
            service.stop()
            image.keep_template(self.directory / "docker")
            service.start()
            service.wait_ready()

    def describe(self) -> dict[str, Any]:
        """What a client needs; written to cluster.json."""
        env = {"SLURM_CONF": self.env["SLURM_CONF"]}
        if self.docker:
            env |= {name: self.env[name] for name in ("DOCKER_HOST", *podman.variables(self.directory))}
        if self.slurm_release is not None:
            env["PATH"] = self.env["PATH"]
        return {
            "directory": str(self.directory),
            "supervisor": os.getpid(),
            "accounting": self.accounting,
            "nodes": list(slurm.NODES),
            "image": self.image,
            "slurm_version": call(["scontrol", "--version"], env=self.env, timeout=60).stdout.split()[1],
            "env": env,
        }

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request; errors come back as {"error": …}."""
        try:
            if request["op"] == "status":
                pids = {name: service.pid for name, service in self.services.items()}
                return {"pids": pids, "changes": self.changes}
            if request["op"] == "configure":
                self.configure(request["changes"])
                return {}
            service = self.services[request["name"]]
            if request["op"] == "stop":
                service.stop(signal.Signals[request.get("signal", "SIGTERM")], timeout=request.get("timeout", 10))
            elif request["op"] == "start":
                service.start()
                service.wait_ready()
            else:
                return {"error": f"unknown op {request['op']!r}"}
            return {"pid": service.pid}
        except (ClusterError, KeyError, OSError, subprocess.SubprocessError) as error:
            # It fails one test; a supervisor that ends because of it fails all that follow.
            return {"error": f"{type(error).__name__}: {error}"}

    def end(self) -> None:
        """End every process, undo every mount, delete the directory. Idempotent."""
        for name in ("slurmctld", *slurm.NODES):
            if name in self.services:
                self.services[name].stop(timeout=5)
        rest = [name for name in ("dockerd", "slurmdbd", "mariadbd", "munged") if name in self.services]
        # Steps and what they started go before the engine: an agent that sees its engine vanish would write about it.
        sockets: list[Path] = []
        keep = [pid for name in rest if (pid := self.services[name].pid) is not None]
        keep += engine_processes(keep)
        end_descendants(keep=keep)
        if "dockerd" in rest:
            sockets = engine.shim_sockets(descendants(os.getpid()))
            engine.remove_containers(self.env)
        if (self.directory / "podman").exists():
            podman.end(self.directory, self.env)
        for name in rest:
            self.services[name].stop(timeout=15)
        end_descendants()
        for path in sockets:
            path.unlink(missing_ok=True)
        if self.bridge is not None:
            engine.remove_bridge(self.bridge, self.env)
        remove_tree(self.directory)


def engine_processes(roots: list[int]) -> list[int]:
    """Everything below the daemons that are still up, and the container shims that have detached from theirs."""
    found = [pid for root in roots for pid in descendants(root)]
    for pid in children_by_parent().get(os.getpid(), []):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().startswith("containerd"):
                found += [pid, *descendants(pid)]
    return found


def listen(path: Path) -> socket.socket:
    """Where clients ask; before anybody is told of it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def serve(supervisor: Supervisor, listener: socket.socket, *, leash: bool) -> None:
    """Answer requests until SIGTERM or SIGINT, or (with `leash`) until standard input closes."""
    stop_read, stop_write = os.pipe()
    os.set_blocking(stop_write, False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os.write(stop_write, b"."))
    watched: list[Any] = [listener, stop_read, *([sys.stdin] if leash else [])]
    while True:
        ready, _, _ = select.select(watched, [], [], 0.3)
        if stop_read in ready or (sys.stdin in ready and not os.read(sys.stdin.fileno(), 1024)):
            return
        if listener in ready:
            _serve_one(supervisor, listener)
        reap(s.process.pid for s in supervisor.services.values() if s.process is not None)


def _serve_one(supervisor: Supervisor, listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection, connection.makefile("rw") as stream:
        connection.settimeout(60)
        with suppress(OSError):  # the client went away: its loss, the cluster goes on
            stream.write(json.dumps(supervisor.answer(json.loads(stream.readline()))) + "\n")
            stream.flush()


def main() -> int:
    """Entry of `python -m tests.cluster.supervisor`; prints one JSON line: the description, or {"error": …}."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--leash", action="store_true")
    parser.add_argument("--no-accounting", action="store_true")
    parser.add_argument("--no-docker", action="store_true")
    parser.add_argument("--no-image", action="store_true")
    parser.add_argument("--slurm", metavar="RELEASE", help="another release than the machine's, e.g. 24.11")
    parser.add_argument("--setting", action="append", default=[], help="a line of slurm.conf instead of the default")
    options = parser.parse_args()
    # Short on purpose: a socket's path may have 107 characters, and the engine nests its own below ours.
    directory = options.directory or Path(tempfile.mkdtemp(prefix="orch-", dir="/tmp"))
    directory.mkdir(parents=True, exist_ok=True)
    supervisor = Supervisor(
        directory.resolve(),
        accounting=not options.no_accounting,
        docker=not options.no_docker,
        with_image=not options.no_image,
        settings=options.setting,
        slurm_release=options.slurm,
    )
    # A signal during the start must still end what has been started.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _raise_exit)
    started = time.monotonic()
    try:
        supervisor.start()
        description = {**supervisor.describe(), "seconds": round(time.monotonic() - started, 1)}
        with listen(supervisor.directory / "control") as listener:
            (supervisor.directory / "cluster.json").write_text(json.dumps(description))
            print(json.dumps(description), flush=True)
            serve(supervisor, listener, leash=options.leash)
    except ClusterError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        supervisor.end()
    return 0


def _raise_exit(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())

"""A private dockerd: own data, sockets and bridge, so that an engine the machine already has never notices."""

from __future__ import annotations

import hashlib
import itertools
import secrets
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.cluster.service import ClusterError, Service, call, succeeds


def engine(directory: Path, bridge: str, env: Mapping[str, str], *, driver: str | None = None) -> Service:
    """dockerd; `env` names its socket in DOCKER_HOST."""
    (directory / "dockerd.json").write_text("{}")  # or the machine's own /etc/docker/daemon.json would be read
    argv = [
        "dockerd", f"--host={env['DOCKER_HOST']}", f"--data-root={directory}/docker", f"--exec-root={directory}/dexec",
        f"--pidfile={directory}/dockerd.pid", f"--bridge={bridge}", "--iptables=false", "--ip6tables=false",
        "--ip-forward=false", "--ip-masq=false", "--userland-proxy=false", "--shutdown-timeout=3",
        f"--config-file={directory}/dockerd.json",
    ]  # fmt: skip
    if driver:
        argv.append(f"--storage-driver={driver}")
    return Service(
        name="dockerd",
        argv=argv,
        env=env,
        log=directory / "log" / "dockerd.log",
        ready=lambda: succeeds(["docker", "version"], env),
        timeout=60,
    )


def bridge_name(directory: Path) -> str:
    """The bridge of the cluster in `directory` (an interface's name has at most 15 characters)."""
    return f"orch{hashlib.sha256(str(directory).encode()).hexdigest()[:8]}"


def add_bridge(directory: Path, env: Mapping[str, str]) -> str:
    """Create a bridge for the private engine and return its name.

    With the default a second engine would share docker0 with the first; with `none` it deletes the first one's.
    """
    name = bridge_name(directory)
    call(["ip", "link", "add", "name", name, "type", "bridge"], env=env, timeout=60)
    # Any address will do (jobs use the host's network), but without one the engine searches for a subnet that is free.
    block = secrets.randbelow(200) + 20
    call(["ip", "address", "add", f"172.31.{block}.1/24", "dev", name], env=env, timeout=60)
    return name


def remove_bridge(name: str, env: Mapping[str, str]) -> None:
    """Delete the bridge; silent when it is already gone."""
    if Path("/sys/class/net", name).exists():
        call(["ip", "link", "delete", name], env=env, timeout=60)


def remove_containers(env: Mapping[str, str]) -> None:
    """Kill and remove every container; without it each one delays the end of dockerd by its stop timeout.

    An engine that is down or does not answer has nothing to be asked: its processes are ended by pid afterwards.
    """
    try:
        ids = call(["docker", "ps", "--all", "--quiet"], env=env, timeout=60).stdout.split()
        if ids:
            call(["docker", "rm", "--force", *ids], env=env, timeout=120)
    except ClusterError as error:
        print(f"[test cluster] containers could not be removed: {error}", file=sys.stderr)


def shim_sockets(pids: Iterable[int]) -> list[Path]:
    """Sockets that containerd's shims among `pids` hold in the one directory that all engines of a machine share.

    A shim that is killed, because its engine was, leaves its socket there.
    """
    found = []
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # ended meanwhile
        if Path(words[0]).name.startswith("containerd-shim") and "-id" in words and "-address" in words:
            # containerd names the socket by the hash of its own socket's path, the namespace and the container's id.
            value = dict(itertools.pairwise(words))
            name = "/".join((value["-address"], value["-namespace"], value["-id"]))
            found.append(Path("/run/containerd/s", hashlib.sha256(name.encode()).hexdigest()))
    return found

"""A private podman: own store, own network, so that what the machine has of its own never notices.

There is no daemon: what is private is named by files, and those by the environment (containers.conf(5),
containers-storage.conf(5), containers-registries.conf(5)).
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.cluster import engine
from tests.cluster.cache import cache_directory, locked
from tests.cluster.image import archive, image_key
from tests.cluster.service import call

_PID_MAX = Path("/proc/sys/kernel/pid_max")


def variables(directory: Path) -> dict[str, str]:
    """What names the files of the podman in `directory`."""
    own = directory / "podman"
    return {
        "CONTAINERS_CONF": f"{own}/containers.conf",
        "CONTAINERS_STORAGE_CONF": f"{own}/storage.conf",
        "CONTAINERS_REGISTRIES_CONF": f"{own}/registries.conf",
    }


def configure(directory: Path) -> None:
    """Write these files; before, `share_image` gives it the image."""
    own = directory / "podman"
    networks = own / "networks"
    networks.mkdir(parents=True)
    store = [f'driver = "overlay"\ngraphroot = "{own}/store"\nrunroot = "{own}/run"']
    if _shared_store().exists():
        store.append(f'[storage.options]\nadditionalimagestores = ["{_shared_store()}"]')
    files, processes = resource.getrlimit(resource.RLIMIT_NOFILE)[1], _PID_MAX.read_text().strip()
    texts = {
        "storage.conf": "[storage]\n" + "\n".join(store),
        # podman's own defaults are more than a root without CAP_SYS_RESOURCE may give.
        "containers.conf": f'[containers]\ndefault_ulimits = ["nofile={files}", "nproc={processes}"]\n'
        f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        f'[network]\nnetwork_backend = "cni"\ndefault_network = "orch"\nnetwork_config_dir = "{networks}"',
        "registries.conf": '[[registry]]\nlocation = "127.0.0.1"\ninsecure = true',
    }
    for name, text in texts.items():
        (own / name).write_text(text + "\n")
    # Neither firewall nor port mapping: nothing of the machine's iptables is touched.
    bridged = {
        "type": "bridge",
        "bridge": bridge_name(directory),
        "isGateway": True,
        "ipam": {"type": "host-local", "subnet": f"10.{secrets.randbelow(56) + 200}.{secrets.randbelow(256)}.0/24",
                 "dataDir": f"{own}/addresses"},
    }  # fmt: skip
    network = {"cniVersion": "0.4.0", "name": "orch", "plugins": [bridged]}
    (networks / "orch.conflist").write_text(json.dumps(network))


def bridge_name(directory: Path) -> str:
    """The bridge of its containers."""
    return f"{engine.bridge_name(directory)}p"


def share_image() -> None:
    """Keep the image where every podman of these tests finds it, read-only: a load takes a minute, once."""
    store = _shared_store()
    with locked(cache_directory()):
        if store.exists():
            return
        partial = Path(tempfile.mkdtemp(prefix="tmp-podman-", dir=store.parent))
        with tempfile.TemporaryDirectory() as run:
            options = [f"--root={partial}", f"--runroot={run}", "--storage-driver=overlay", "--events-backend=file"]
            call(["podman", *options, "load", "--quiet", f"--input={archive()}"], env=os.environ, timeout=600)
        partial.chmod(0o755)
        partial.rename(store)


def end(directory: Path, env: Mapping[str, str]) -> None:
    """Remove every container, the network and what the store keeps mounted."""
    call(["podman", "rm", "--all", "--force", "--time=0"], env=env, timeout=60)
    engine.remove_bridge(bridge_name(directory), env)


def _shared_store() -> Path:
    return cache_directory() / f"podman-{image_key()}"

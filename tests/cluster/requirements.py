"""What the private cluster needs from the machine, told in one line when it is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_PATH = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
_COMMANDS = (
    "slurmctld", "slurmd", "slurmdbd", "srun", "munged", "mariadbd", "mariadb-install-db", "dockerd", "docker", "runc",
    "podman", "docker-registry", "debootstrap", "setpriv", "ip",
)  # fmt: skip


def why_not() -> str | None:
    """Why the cluster cannot run here, or None when it can."""
    if os.geteuid() != 0:
        return "the test cluster needs root (it starts slurmd and dockerd)"
    if not Path("/etc/debian_version").exists():
        return "the test cluster needs Debian or Ubuntu (its packages and base image come from apt)"
    missing = [name for name in _COMMANDS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"the test cluster misses {', '.join(missing)}: run tests/setup_system.sh"
    return None

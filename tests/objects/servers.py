"""Two kinds of S3 there are in the world, started in the foreground on ports of their own (FACTS 5).

moto's server enforces If-None-Match and If-Match; `rclone serve s3` takes no notice of them.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.service import Service, accepts, free_port

KEY, SECRET = "orch-test-key", "orch-test-secret"
KINDS = ("moto", "rclone")


@dataclass(frozen=True)
class Server:
    """A running server and how to reach it."""

    kind: str
    endpoint: str

    @property
    def storage_options(self) -> dict[str, Any]:
        """What a spec would say in checkpoint.storage_options."""
        return {"key": KEY, "secret": SECRET, "client_kwargs": {"endpoint_url": self.endpoint}}

    def files(self) -> Any:
        """A client of its own: what somebody else does there."""
        import s3fs

        return s3fs.S3FileSystem(**self.storage_options, skip_instance_cache=True, use_listings_cache=False)

    def new_bucket(self) -> str:
        """Name of a bucket that nobody else uses."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.files().mkdir(name)
        return name


def _command(kind: str, port: int, directory: Path) -> list[str]:
    if kind == "moto":
        return [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    rclone = Path(sysconfig.get_path("scripts")) / "rclone"
    data = directory / "data"
    data.mkdir()
    return [
        str(rclone), "serve", "s3", "--config", "/dev/null", "--addr", f"127.0.0.1:{port}",
        "--auth-key", f"{KEY},{SECRET}", str(data),
    ]  # fmt: skip


@contextmanager
def serving(kind: str, directory: Path) -> Iterator[Server]:
    """A server of this kind, with its files below `directory`; ended by pid."""
    port = free_port()
    service = Service(
        name=kind,
        argv=_command(kind, port, directory),
        env={"PATH": os.environ["PATH"], "HOME": str(directory)},
        log=directory / f"{kind}.log",
        ready=lambda: accepts(port),
        timeout=60,
    )
    service.start()
    try:
        service.wait_ready()
        yield Server(kind, f"http://127.0.0.1:{port}")
    finally:
        service.stop()

"""What engines say, and what people read."""

from __future__ import annotations

import pytest

from orchestrator.containers.failures import pull_error, start_error
from tests.unit.containers.test_docker import request


@pytest.mark.parametrize(
    ("engine", "words", "message", "hint"),
    [
        ("docker", "could not select device driver", "docker of node n7 cannot pass GPUs on", "container toolkit"),
        (
            "podman",
            "unresolvable CDI devices nvidia.com/gpu=0",
            "podman of node n7 cannot pass GPUs on",
            "cdi generate",
        ),
        ("docker", 'exec: "python3": executable file not found in $PATH', "has no python3", "Any image works"),
        ("podman", "runc: executable file `python3` not found in $PATH", "has no python3", "Any image works"),
        ("docker", "bind source path does not exist: /gone", "source is missing on node n7", "on every node"),
        ("podman", "statfs /gone: no such file or directory", "source is missing on node n7", "on every node"),
        (
            "docker",
            "failed to copy: no space left on device",
            "a disk that docker needs on node",
            "docker system prune",
        ),
        ("podman", "writing blob: no space left on device", "a disk that podman needs on node", "podman system prune"),
        ("podman", "crun: exec /bin/python3: Exec format error", "built for another processor", "Build it for"),
        ("docker", "something else", "docker could not start sha256:", ""),
    ],
)
def test_why_a_container_does_not_start(engine: str, words: str, message: str, hint: str) -> None:
    error = start_error(engine, request(), words)
    assert message in error.message
    assert hint in (error.hint or "")


def test_why_an_image_does_not_come() -> None:
    error = pull_error("podman", "ghcr.io/lab/train@sha256:0", "unauthorized")
    assert "cannot pull ghcr.io/lab/train@sha256:0 on node" in error.message
    assert "podman login" in (error.hint or "")
    assert "is full" in pull_error("docker", "x", "write /var: no space left on device").message

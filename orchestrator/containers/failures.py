"""What an engine says when it cannot do something, as one message with the fix; both engines say much the same."""

from __future__ import annotations

import os
import re

import tenacity

from orchestrator.containers.payload import PayloadRequest
from orchestrator.errors import ContainerError

OTHER_PROCESSOR = "exec format error"
_GPU_HINTS = {
    "docker": "Install the NVIDIA container toolkit there, or set `resources.gpus_per_node: 0`.",
    "podman": "Generate the CDI specification there (nvidia-ctk cdi generate), or set `resources.gpus_per_node: 0`.",
}


_LOGINS = {
    "docker": "`docker login`",
    "podman": "`podman login`",
    "apptainer": "`apptainer registry login`",
    "enroot": "ENROOT_CONFIG_PATH/.credentials",
}
_ROOM = {
    "docker": "`docker system prune`",
    "podman": "`podman system prune`",
    "apptainer": "`orch image prune`, or another APPTAINER_TMPDIR",
    "enroot": "`orch image prune`, or another ENROOT_TEMP_PATH or ENROOT_DATA_PATH",
}


def start_error(engine: str, request: PayloadRequest, words: str) -> ContainerError:
    """Why a container could not be created or started."""
    lower = words.lower()
    if "could not select device driver" in lower or "nvidia.com/gpu" in lower:
        return ContainerError(f"{engine} of node {request.node} cannot pass GPUs on: {words}", hint=_GPU_HINTS[engine])
    if "executable file" in lower and "not found" in lower:
        return ContainerError(
            f"image {request.image} has no {request.argv[0]}",
            hint="Any image works that has python3 (>= 3.9) and torch.",
        )
    if "bind source path does not exist" in lower or ("statfs" in lower and "no such file" in lower):
        return ContainerError(
            f"a mount's source is missing on node {request.node}: {words}", hint="Mounts must exist on every node."
        )
    if OTHER_PROCESSOR in lower:
        return ContainerError(other_processor(request.image or ""), hint="Build it for the processors of the nodes.")
    return full_store(engine, words) or ContainerError(f"{engine} could not start {request.image}: {words}")


class PullFailed(ContainerError):
    """An image could not be fetched; `words` are the engine's own."""

    def __init__(self, message: str, *, words: str, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.words = words


def pull_error(engine: str, image: str, words: str) -> ContainerError:
    """Why an image could not be fetched by this node."""
    return full_store(engine, words) or PullFailed(
        f"cannot pull {image} on node {os.uname().nodename}: {words}",
        words=words,
        hint=f"Check the name, {_LOGINS[engine]} and the way to the registry on that node.",
    )


# What a registry, or the way to it, says when the next try may well succeed.
_PASSING = re.compile(
    r"timed out|timeout|connection (reset|refused)|temporary failure|too ?many ?requests|tls handshake|unexpected eof"
    r"|server error|service unavailable|bad gateway|\b(429|50[0234])\b",
    re.IGNORECASE,
)


def _passes(error: BaseException) -> bool:
    return isinstance(error, PullFailed) and _PASSING.search(error.words) is not None


retried = tenacity.retry(
    retry=tenacity.retry_if_exception(_passes),
    stop=tenacity.stop_after_attempt(5) | tenacity.stop_after_delay(120),
    wait=tenacity.wait_exponential_jitter(initial=1, max=15),
    reraise=True,
)
"""Decorates what fetches from a registry: a failure that may pass is tried again, unless it came after 2 minutes."""


def require_registry(image: str) -> None:
    """Raises ContainerError for an image that no registry has: the id of one engine."""
    if image.startswith("sha256:"):
        raise ContainerError(
            f"image {image} is not on node {os.uname().nodename}, and a local image id cannot be pulled",
            hint="Push it to a registry and pin `repository@sha256:…`, or load it on every node.",
        )


def full_store(engine: str, words: str) -> ContainerError | None:
    """None unless the engine's disk is full."""
    if "no space left on device" not in words.lower():
        return None
    return ContainerError(
        f"a disk that {engine} needs on node {os.uname().nodename} is full: {words}",
        hint=f"Free room: {_ROOM[engine]}.",
    )


def other_processor(image: str) -> str:
    """In words: what the kernel calls an exec format error."""
    return f"image {image} was built for another processor than this node's ({os.uname().machine})"

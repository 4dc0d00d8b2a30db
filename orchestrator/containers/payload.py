"""What the agent needs of a runtime, and the choice of one by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Mount:
    """A host path seen at `target` inside the container."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class PayloadRequest:
    """Everything a runtime needs to start PID 1 on this node."""

    argv: tuple[str, ...]  # python3 launch.py config.json
    cwd: str
    run_id: str
    run_dir: str
    attempt: int
    node: str
    image: str | None
    mounts: tuple[Mount, ...]
    mem_bytes: int | None
    cpus: int | None
    host_network: bool
    gpus: tuple[str, ...]  # indices or UUIDs that the scheduler gave to this step
    log: Path  # where PID 1's own output goes if it fails before it opens its log
    environ: Mapping[str, str] = field(default_factory=dict)  # nothing secret: visible in `inspect` and /proc


class Payload(Protocol):
    """A started PID 1."""

    def poll(self) -> int | None:
        """Exit code once it has ended, else None. Never blocks; raises ContainerError when the engine is lost."""

    def kill(self) -> None:
        """End it and everything in it; returns once it is known dead or raises ContainerError."""

    def close(self) -> None:
        """Remove what the engine keeps of it."""

    def early_output(self) -> str:
        """What PID 1 said before it opened its own log, where that did not go to the log anyway."""

    def out_of_memory(self) -> bool:
        """True when the engine says that the kernel has killed in it for lack of memory; raises ContainerError."""

    def describe(self) -> dict[str, object]:
        """What to record about it: runtime, id, pid."""


class Runtime(Protocol):
    """Starts payloads on this node."""

    name: str

    def remove_leftovers(self, run_dir: str, node: str, before_attempt: int) -> Sequence[str]:
        """End payloads of older attempts of this run on this node; return their ids. Never touches a newer one."""

    def start(self, request: PayloadRequest) -> Payload:
        """Start PID 1; raises ContainerError with the engine's words and the fix."""


def open_runtime(name: str) -> Runtime:
    """The runtime of that name (`docker` or `none`); imports its client only now."""
    if name == "docker":
        from orchestrator.containers.docker import DockerRuntime

        return DockerRuntime()
    if name == "none":
        from orchestrator.containers.process import ProcessRuntime

        return ProcessRuntime()
    raise ValueError(f"unknown container runtime {name!r}")

"""What the agent needs of a runtime, and the choice of one by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

LABEL_RUN, LABEL_ATTEMPT, LABEL_NODE = "orch.run_id", "orch.attempt", "orch.node"
LABEL_DIRECTORY = "orch.run_dir"  # the same spec under two roots is two runs of one name
ENGINES = ("docker", "podman")  # containers outside the step's process tree, with control groups of their own
PullReport = Callable[[int, int], None]
"""Told how many bytes more have come, and of how many in all as far as is known."""
SIGKILLED = 137  # exit code of a container whose end nobody has recorded


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
    cpuset: str  # the only ones to run on, as cpuset(7) lists them; "" = all of the machine
    host_network: bool
    verify_image: bool  # read an image file whole: one node of an attempt does
    images: Path  # where image files are that were imported from a registry, on the shared disk
    devices: tuple[str, ...]  # of InfiniBand
    gpus: tuple[str, ...]  # indices or UUIDs that the scheduler gave to this step
    scratch: Path  # node-local, this attempt's alone: for what a runtime leaves beside a container
    log: Path  # where PID 1's own output goes if it fails before it opens its log
    environ: Mapping[str, str] = field(default_factory=dict)  # nothing secret: visible in `inspect` and /proc
    limits: Mapping[str, int] = field(default_factory=dict)  # of setrlimit(2), by ulimit's names; -1 = none


class Payload(Protocol):
    """A started PID 1."""

    def poll(self) -> int | None:
        """Exit code once it has ended, else None. Does not block while it runs; ContainerError: the engine is lost."""

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


@dataclass(frozen=True)
class About:
    """An engine that can be used: its version, and the directory in which it keeps images."""

    version: str
    store: str


@dataclass(frozen=True)
class Labelled:
    """A container of a run, running or not."""

    id: str
    run_id: str
    run_dir: str
    node: str
    attempt: int
    running: bool

    @classmethod
    def of(cls, identifier: str, labels: Mapping[str, str], *, running: bool) -> Labelled | None:
        """From what an engine says of it; None for somebody else's that only looks like one."""
        try:
            attempt = int(labels[LABEL_ATTEMPT])
            return cls(identifier, labels[LABEL_RUN], labels[LABEL_DIRECTORY], labels[LABEL_NODE], attempt, running)
        except (KeyError, ValueError):
            return None


class Runtime(Protocol):
    """Starts payloads on this node."""

    name: str

    def remove_leftovers(self, run_dir: str, node: str, before_attempt: int) -> Sequence[str]:
        """End payloads of older attempts of this run on this node; return their ids. Never touches a newer one."""

    def prepare(self, request: PayloadRequest) -> None:
        """Have the image on this node, which may take an hour. Raises ContainerError.

        A signal handler may raise out of it at any moment; then `remove_leftovers` of this very attempt removes what
        may be left.
        """

    def start(self, request: PayloadRequest) -> Payload:
        """Start PID 1, once `prepare` has returned; raises ContainerError with the engine's words and the fix."""


class Engine(Runtime, Protocol):
    """A runtime with images."""

    def about(self) -> About:
        """What there is to say of the engine. Raises ContainerError where none can be used."""

    def labelled(self) -> Sequence[Labelled]:
        """All containers of runs in the engine's store on this node. Raises ContainerError."""

    def has_image(self, image: str) -> bool:
        """Whether this node has an image. Raises ContainerError."""

    def ensure_image(self, image: str, report: PullReport | None = None) -> None:
        """Fetch an image that this node does not have yet. Raises ContainerError."""


def open_engine(name: str, environ: Mapping[str, str] = os.environ) -> Engine:
    """The engine of that name; imports its client only now. Raises ContainerError where none answers."""
    if name == "docker":
        from orchestrator.containers.docker import DockerRuntime, connect

        return DockerRuntime(connect(environ))
    if name == "podman":
        from orchestrator.containers.podman import PodmanRuntime

        return PodmanRuntime(environ)
    raise ValueError(f"unknown container engine {name!r}")


def open_runtime(name: str) -> Runtime:
    """What container.runtime names. Raises ContainerError where an engine does not answer."""
    if name == "none":
        from orchestrator.containers.process import ProcessRuntime

        return ProcessRuntime()
    if name == "apptainer":
        from orchestrator.containers.apptainer import ApptainerRuntime

        return ApptainerRuntime()
    if name == "pyxis":
        from orchestrator.containers.pyxis import PyxisRuntime

        return PyxisRuntime()
    return open_engine(name)

"""The container engine of this machine, and whether an ordinary container can write to a directory as this user."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.containers.payload import Mount, PayloadRequest
from orchestrator.errors import ContainerError

if TYPE_CHECKING:
    import docker

_ANSWER_S = 10
_CONTAINER_S = 60
_PROGRAM = "import pathlib, sys; [pathlib.Path(place, 'from-container').write_text('x') for place in sys.argv[1:]]"


@dataclass(frozen=True)
class EngineFacts:
    """`error`: why no engine can be used. `image_here` and `container` are None where they were not asked about."""

    error: str = ""
    version: str = ""
    store: str = ""
    store_free_bytes: int | None = None
    image_here: bool | None = None
    container: str | None = None  # "" = it started and wrote as this user; else what went wrong


def probe_engine(image: str | None) -> EngineFacts:
    """Version, store, and whether the image is here. Pulls nothing; raises nothing."""
    try:
        with contextlib.closing(_connect()) as client:
            return _ask(client, image)
    except ContainerError as error:
        return EngineFacts(error=error.message)


def probe_container(image: str, directories: list[Path]) -> EngineFacts:
    """As `probe_engine`; then let a container write a file into each of the directories (skipped without the image)."""
    try:
        with contextlib.closing(_connect()) as client:
            facts = _ask(client, image)
            return (
                replace(facts, container=_write_from_inside(client, image, directories)) if facts.image_here else facts
            )
    except ContainerError as error:
        return EngineFacts(error=error.message)


def _connect() -> docker.DockerClient:
    from orchestrator.containers.docker import connect

    return connect(timeout_s=_ANSWER_S)


def _ask(client: Any, image: str | None) -> EngineFacts:
    import docker.errors
    import requests

    try:
        about = client.info()
        here = None
        if image is not None:
            try:
                client.images.get(image)
                here = True
            except docker.errors.ImageNotFound:
                here = False
    except (docker.errors.DockerException, requests.RequestException, OSError) as error:
        return EngineFacts(error=f"the container engine answers with an error: {_words(error)}")
    store = str(about.get("DockerRootDir", ""))
    return EngineFacts("", str(about.get("ServerVersion", "")), store, _free_bytes(store), here)


def _free_bytes(store: str) -> int | None:
    """None where the engine runs on another machine, or its store is not ours to look at."""
    try:
        space = os.statvfs(store)
    except OSError:
        return None
    return space.f_bavail * space.f_frsize


def _write_from_inside(client: Any, image: str, directories: list[Path]) -> str:
    """What went wrong, "" if nothing: with the options of a real attempt, so rootless and root_squash show."""
    import docker.errors
    import requests

    from orchestrator.containers.docker import container_options

    places = tuple(str(directory) for directory in directories)
    request = PayloadRequest(
        argv=("python3", "-c", _PROGRAM, *places), cwd="/", run_id="orch-doctor",
        run_dir="", attempt=0, node=os.uname().nodename,
        image=image, mounts=tuple(Mount(place, place) for place in places), mem_bytes=256 * 1024**2, cpus=1,
        host_network=False, gpus=(), log=Path(os.devnull),
    )  # fmt: skip
    container = None
    try:
        container = client.containers.create(**container_options(request))
        container.start()
        code = container.wait(timeout=_CONTAINER_S)["StatusCode"]
        said = container.logs(tail=5).decode(errors="replace").strip().splitlines()
    except (docker.errors.DockerException, requests.RequestException, OSError) as error:
        return _words(error)
    finally:
        if container is not None:
            with contextlib.suppress(docker.errors.DockerException, requests.RequestException):
                container.remove(force=True)
    if code != 0:
        return said[-1] if said else f"it ended with exit code {code}"
    return _owner_fault(directories)


def _owner_fault(directories: list[Path]) -> str:
    for directory in directories:
        try:
            owner = (directory / "from-container").stat().st_uid
        except OSError as error:
            return f"what it wrote to {directory} is not there: {error.strerror}"
        if owner != os.getuid():
            return f"what it writes to {directory} belongs to user id {owner}, not to yours ({os.getuid()})"
    return ""


def _words(error: BaseException) -> str:
    return " ".join(str(getattr(error, "explanation", None) or error).split())[:300]

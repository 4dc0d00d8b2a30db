"""The container engine of this machine, and whether an ordinary container can write to a directory as this user.

Of a runtime without an engine, whether the program that it calls is here.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.containers.payload import ENGINES, Engine, Mount, PayloadRequest, open_engine
from orchestrator.containers.process import run_client, words_of
from orchestrator.errors import ContainerError
from orchestrator.worker.node import attempt_lives, node_root

_CONTAINER_S = 60
_CLIENT_S = 10.0
_CLIENTS = {"apptainer": ("apptainer", "--version"), "pyxis": ("enroot", "version")}
_PROGRAM = "import pathlib, sys; [pathlib.Path(place, 'from-container').write_text('x') for place in sys.argv[1:]]"


@dataclass(frozen=True)
class EngineFacts:
    """`error`: why no engine can be used. `image_here` and `container` are None where they were not asked about."""

    error: str = ""
    version: str = ""
    store: str = ""
    store_free_bytes: int | None = None
    image_here: bool | None = None
    leftovers: tuple[str, ...] = ()  # of attempts that have ended
    container: str | None = None  # "" = it started and wrote as this user; else what went wrong


def probe_engine(name: str, image: str | None) -> EngineFacts:
    """Version, store, and whether the image is here. Pulls nothing; raises nothing."""
    try:
        return _ask(open_engine(name), image) if name in ENGINES else _ask_client(name)
    except ContainerError as error:
        return EngineFacts(error=error.message)


def probe_container(name: str, image: str, directories: list[Path]) -> EngineFacts:
    """As `probe_engine`; then let a container write a file into each of the directories (skipped without the image)."""
    if name not in ENGINES:
        return probe_engine(name, None)
    try:
        engine = open_engine(name)
        facts = _ask(engine, image)
        return replace(facts, container=_write_from_inside(engine, image, directories)) if facts.image_here else facts
    except ContainerError as error:
        return EngineFacts(error=error.message)


def _ask(engine: Engine, image: str | None) -> EngineFacts:
    about = engine.about()
    here = None if image is None else engine.has_image(image)
    return EngineFacts("", about.version, about.store, _free_bytes(about.store), here, _leftovers(engine))


def _ask_client(name: str) -> EngineFacts:
    """Its version only: what it runs is a file, and what it unpacks has no container's labels."""
    argv = _CLIENTS[name]
    done = run_client(argv, environ=os.environ, timeout_s=_CLIENT_S, hint="")
    if done.returncode != 0:
        return EngineFacts(error=f"{' '.join(argv)} ended with {done.returncode}: {words_of(done.stderr)}")
    return EngineFacts(version=f"{argv[0]} {done.stdout.split()[-1] if done.stdout.split() else ''}".strip())


def _leftovers(engine: Engine) -> tuple[str, ...]:
    """Our ended containers without an agent: one that dies badly leaves its own to the run's next attempt there."""
    root = node_root(os.environ)
    return tuple(
        f"{found.id[:12]} ({found.run_id}, attempt {found.attempt})"
        for found in engine.labelled()
        if not found.running and _is_ours(found.run_dir) and not attempt_lives(root, found.run_id, found.attempt)
    )


def _is_ours(run_dir: str) -> bool:
    if not run_dir:  # a doctor's own
        return False
    try:
        return Path(run_dir).stat().st_uid == os.getuid()
    except OSError:  # removed, or somebody else's
        return False


def _free_bytes(store: str) -> int | None:
    """None where the engine runs on another machine, or its store is not ours to look at."""
    try:
        space = os.statvfs(store)
    except OSError:
        return None
    return space.f_bavail * space.f_frsize


def _write_from_inside(engine: Engine, image: str, directories: list[Path]) -> str:
    """What went wrong, "" if nothing: with the options of a real attempt, so rootless and root_squash show."""
    with tempfile.TemporaryDirectory(prefix="orch-doctor-") as scratch:
        return _run_container(engine, image, directories, Path(scratch))


def _run_container(engine: Engine, image: str, directories: list[Path], scratch: Path) -> str:
    places = tuple(str(directory) for directory in directories)
    request = PayloadRequest(
        argv=("python3", "-c", _PROGRAM, *places), cwd="/", run_id="orch-doctor",
        run_dir="", attempt=0, node=os.uname().nodename,
        image=image, mounts=tuple(Mount(place, place) for place in places), mem_bytes=256 * 1024**2, cpus=1,
        cpuset="", host_network=False, verify_image=False, images=scratch, devices=(), gpus=(), scratch=scratch,
        log=Path(os.devnull),
    )  # fmt: skip
    try:
        payload = engine.start(request)
        try:
            until = time.monotonic() + _CONTAINER_S
            while (code := payload.poll()) is None and time.monotonic() < until:
                time.sleep(0.05)
            said = payload.early_output().strip().splitlines()
        finally:
            payload.close()
    except (ContainerError, OSError) as error:
        return error.message if isinstance(error, ContainerError) else str(error)
    if code is None:
        return f"it has not ended after {_CONTAINER_S} s"
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

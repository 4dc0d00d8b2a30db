"""From what the container engine said to findings."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.operations.checkup.findings import Family, Finding, Level
from orchestrator.operations.checkup.target import Target
from orchestrator.words import size
from orchestrator.worker.probe.engine import EngineFacts

_SMALL_STORE_BYTES = 20 * 10**9


def engine_findings(target: Target, facts: EngineFacts) -> Iterator[Finding]:
    """The engine of this machine. On a cluster the nodes' engines count, which only `--node` asks."""
    if facts.error:
        yield _absent(target, facts.error)
        return
    yield _version("", target, facts)
    yield from _leftovers("", target, facts)
    if not _has_engine(target):
        return  # an image file is looked at before submission
    if target.image is not None and not facts.image_here:
        yield _image_missing(target)
    elif target.image is not None:
        yield Finding("image", Level.OK, f"{target.image} is on this machine", None, Family.CONTAINER)


def _has_engine(target: Target) -> bool:
    """apptainer and enroot have none; without a spec it is docker that is asked."""
    return not target.contained or target.engine is not None


def _version(where: str, target: Target, facts: EngineFacts) -> Finding:
    engine = "container engine " if _has_engine(target) else ""
    message = f"{where}{engine}{facts.version} answers"
    if facts.store_free_bytes is None:
        return Finding("engine", Level.OK, message, None, Family.CONTAINER)
    message += f"; its store {facts.store} has {size(facts.store_free_bytes)} free"
    if facts.store_free_bytes < _SMALL_STORE_BYTES:
        return Finding(
            "engine", Level.WARN, message, "remove images that nobody needs; they take gigabytes", Family.CONTAINER
        )
    return Finding("engine", Level.OK, message, None, Family.CONTAINER)


def _leftovers(where: str, target: Target, facts: EngineFacts) -> Iterator[Finding]:
    if facts.leftovers:
        message = f"{where}containers of attempts that have ended are still there: {', '.join(facts.leftovers)}"
        fix = (
            f"the next attempt of the run on that node removes its own; else: {target.engine or 'docker'} rm --force ID"
        )
        yield Finding("engine", Level.WARN, message, fix, Family.CONTAINER)


def _absent(target: Target, error: str) -> Finding:
    if target.contained and target.backend == "local":
        ready = "start docker, set DOCKER_HOST" if target.engine == "docker" else "install it"
        fix = f"{ready}, or use container.runtime: none"
        return Finding("engine", Level.BAD, error, fix, Family.CONTAINER)
    if target.contained:
        message = f"{error} (this machine; the nodes are what counts)"
        return Finding("engine", Level.WARN, message, "`orch doctor --node` asks a compute node", Family.CONTAINER)
    message = "no container engine on this machine; jobs with container.runtime: none need none"
    return Finding("engine", Level.OK, message, None, Family.CONTAINER)


def _image_missing(target: Target) -> Finding:
    message = f"{target.image} is not on this machine"
    if not str(target.image).startswith("sha256:"):
        message += "; a node that does not have it pulls it when the run starts"
        return Finding(
            "image", Level.WARN, message, f"pull it beforehand: {target.engine or 'docker'} pull", Family.CONTAINER
        )
    message += ", and an image id cannot be pulled"
    level = Level.BAD if target.backend == "local" else Level.WARN
    fix = "push it to a registry and pin repository@sha256:… (orch image lock TAG), or load it on every node"
    return Finding("image", level, message, fix, Family.CONTAINER)


def node_engine_findings(target: Target, facts: EngineFacts, where: str) -> Iterator[Finding]:
    """The engine of a compute node, and what a container there may write."""
    if facts.error and not _has_engine(target):
        fix = "what `slurm.setup` loads was not asked; else install it there, or use container.runtime: none"
        yield Finding("engine", Level.WARN, f"{where}{facts.error}", fix, Family.CONTAINER)
        return
    if facts.error:
        fix = "use nodes with an engine that you may use (constraint, partition), or container.runtime: none"
        yield Finding("engine", Level.BAD, f"{where}{facts.error}", fix, Family.CONTAINER)
        return
    yield _version(where, target, facts)
    yield from _leftovers(where, target, facts)
    if target.image is None or not _has_engine(target):
        return
    if not facts.image_here:
        yield _not_on_node(target, where)
    elif facts.container:
        message = f"{where}an ordinary container cannot do what a run's would: {facts.container}"
        fix = (
            "rootless engines and root_squash map users: the root must be writable for your user id in a container, or "
            "use container.runtime: none"
        )
        yield Finding("engine", Level.BAD, message, fix, Family.CONTAINER)
    else:
        message = f"{where}a container of the image starts, and writes below the root as you"
        yield Finding("engine", Level.OK, message, None, Family.CONTAINER)


def _not_on_node(target: Target, where: str) -> Finding:
    message = f"{where}{target.image} is not on this node"
    if str(target.image).startswith("sha256:"):
        fix = "load it on every node, or push it to a registry and pin repository@sha256:…"
        return Finding("image", Level.BAD, f"{message}, and an image id cannot be pulled", fix, Family.CONTAINER)
    fix = f"{target.engine} pull on the nodes beforehand; no container was started to try mounts"
    return Finding("image", Level.WARN, f"{message}; the first run there pulls it", fix, Family.CONTAINER)

"""What is examined: the values of a spec, or those that a spec without a word of its own would get."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.containers.payload import ENGINES
from orchestrator.paths import is_object_store

if TYPE_CHECKING:
    from orchestrator.spec import JobSpec, SiteProfile

CACHES = ("XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME")
# Options that decide where a job may run; the job of `--node` must land where the run would.
_PLACING = ("partition", "account", "qos", "constraint", "exclude", "reservation", "wckey")


@dataclass(frozen=True)
class Target:
    """None where nobody has said anything and Slurm decides. Times in seconds."""

    from_spec: bool
    backend: str
    runtime: str | None  # None: no spec, and the site profile does not say
    image: str | None
    root: Path
    checkpoints: Path | None  # when elsewhere than below the root
    object_store: Mapping[str, Any] | None  # uri, storage_options and fence, when checkpoints go there
    lead_time_s: int
    signal: str
    time_s: int | None
    gpus_per_node: int
    partitions: tuple[str, ...]
    account: str | None
    qos: str | None
    python: str
    own_python: bool  # `slurm.python` or the site profile names one
    caches: Mapping[str, str]
    home: str
    placing: Mapping[str, str]

    @property
    def contained(self) -> bool:
        return self.runtime not in (None, "none")

    @property
    def engine(self) -> str | None:
        """The engine that the run needs; None where it needs none, or nothing is known."""
        return self.runtime if self.runtime in ENGINES else None


def target_of_spec(spec: JobSpec, root: Path, partition: str | None, environ: Mapping[str, str]) -> Target:
    """What this spec would get."""
    remote = is_object_store(spec.checkpoint.uri)
    uri = None if remote or spec.checkpoint.uri is None else Path(spec.checkpoint.uri)
    chosen = partition or spec.slurm.partition
    # A local agent without a container hands its own environment on; Slurm jobs and containers do not get the login's.
    inherits = spec.backend == "local" and spec.container.runtime == "none"
    found = {**environ, **spec.env} if inherits else spec.env
    options = {key: value for key, value in spec.slurm.options().items() if key in _PLACING and value is not None}
    return Target(
        from_spec=True,
        backend=spec.backend,
        runtime=spec.container.runtime,
        image=spec.container.image,
        root=root,
        checkpoints=None if uri is None or uri.is_relative_to(root) else uri,
        object_store=spec.checkpoint.model_dump(include={"uri", "storage_options", "fence"}) if remote else None,
        lead_time_s=int(spec.preemption.lead_time),
        signal=spec.preemption.signal,
        time_s=None if spec.resources.time is None else int(spec.resources.time),
        gpus_per_node=spec.resources.gpus_per_node,
        partitions=_names(chosen),
        account=spec.slurm.account,
        qos=spec.slurm.qos,
        python=spec.slurm.python or sys.executable,
        own_python=spec.slurm.python is not None,
        caches={name: found[name] for name in CACHES if found.get(name)},
        home=environ.get("HOME", "/"),
        placing={**options, **({"partition": chosen} if chosen else {})},
    )


def target_of_site(site: SiteProfile, root: Path, partition: str | None, environ: Mapping[str, str]) -> Target:
    """What a spec that says nothing would get, beneath this site profile."""
    from orchestrator.spec import Preemption, Resources

    defaults, resources = Preemption(), Resources()
    beneath = {path: str(value) for path, value, _ in site.beneath()}
    chosen = partition or site.partition
    placing = {"partition": chosen, "account": site.account}
    return Target(
        from_spec=False,
        backend="slurm",
        runtime=site.runtime,
        image=None,
        root=root,
        checkpoints=None,
        object_store=None,
        lead_time_s=int(defaults.lead_time),
        signal=defaults.signal,
        time_s=None,
        gpus_per_node=resources.gpus_per_node,
        partitions=_names(chosen),
        account=site.account,
        qos=None,
        python=site.python or sys.executable,
        own_python=site.python is not None,
        caches={name: beneath[("env", name)] for name in CACHES if ("env", name) in beneath},
        home=environ.get("HOME", "/"),
        placing={key: value for key, value in placing.items() if value},
    )


def _names(partitions: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (partitions or "").split(",") if name.strip())

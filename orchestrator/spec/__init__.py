"""What the user asked for: models, YAML loading with places, site profile, JSON Schema.

Names are loaded on first use: reading the site profile needs no pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.spec.arguments import parse_argument, program_args, render_argument
    from orchestrator.spec.load import dump_spec, json_schema, load_spec, parse_spec
    from orchestrator.spec.models import (
        Checkpoint,
        Container,
        Job,
        JobSpec,
        Mount,
        Notify,
        Preemption,
        Resources,
        Retry,
        Slurm,
        Torchrun,
        Workspace,
    )
    from orchestrator.spec.site import SiteProfile, load_site, resolve_root
    from orchestrator.spec.units import Duration, Memory, WallTime

_HOMES = {
    "arguments": ("parse_argument", "program_args", "render_argument"),
    "load": ("dump_spec", "json_schema", "load_spec", "parse_spec"),
    "models": (
        "Checkpoint",
        "Container",
        "Job",
        "JobSpec",
        "Mount",
        "Notify",
        "Preemption",
        "Resources",
        "Retry",
        "Slurm",
        "Torchrun",
        "Workspace",
    ),
    "site": ("SiteProfile", "load_site", "resolve_root"),
    "units": ("Duration", "Memory", "WallTime"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Checkpoint",
    "Container",
    "Duration",
    "Job",
    "JobSpec",
    "Memory",
    "Mount",
    "Notify",
    "Preemption",
    "Resources",
    "Retry",
    "SiteProfile",
    "Slurm",
    "Torchrun",
    "WallTime",
    "Workspace",
    "dump_spec",
    "json_schema",
    "load_site",
    "load_spec",
    "parse_argument",
    "parse_spec",
    "program_args",
    "render_argument",
    "resolve_root",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

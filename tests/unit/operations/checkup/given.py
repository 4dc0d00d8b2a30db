"""Captured answers of two real clusters, and a target to examine with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.operations.checkup.findings import Finding
from orchestrator.operations.checkup.slurm_text import ClusterAnswers, parse_config, parse_partitions
from orchestrator.operations.checkup.target import Target

_CAPTURED = Path(__file__).parent / "captured"
TARGET = Target(
    from_spec=True,
    backend="slurm",
    runtime="none",
    image=None,
    root=Path("/shared/orch"),
    checkpoints=None,
    object_store=None,
    lead_time_s=120,
    signal="USR1",
    time_s=None,
    gpus_per_node=0,
    partitions=(),
    account=None,
    qos=None,
    python="/opt/orch/bin/python",
    own_python=True,
    caches={},
    home="/home/me",
    placing={},
)


def target(**changes: Any) -> Target:
    return replace(TARGET, **changes)


def cluster(version: str, config: dict[str, str] | None = None, **partition_changes: dict[str, str]) -> ClusterAnswers:
    """What `scontrol` of that version printed (22.05 or 24.11), with some values changed."""
    values = parse_config((_CAPTURED / f"config-{version}.txt").read_text())
    partitions = parse_partitions((_CAPTURED / f"partitions-{version}.txt").read_text())
    for name, changes in partition_changes.items():
        partitions[name] = {**partitions[name], **changes}
    return ClusterAnswers({**values, **(config or {})}, partitions, frozenset({"n1", "n2"}))


def words(findings: Any, topic: str) -> list[tuple[str, str]]:
    """(level, message) of one topic, in order."""
    found: list[Finding] = list(findings)
    return [(finding.level.value, finding.message) for finding in found if finding.topic == topic]

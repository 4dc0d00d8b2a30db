"""Which checkpoints stay. Pure: no file is touched here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint.manifest import CheckpointName, Manifest

MINIMUM_KEPT = 2  # the newest may turn out to be unreadable tomorrow


@dataclass(frozen=True)
class Best:
    """The `k` checkpoints with the smallest (`min`) or largest (`max`) value of a metric."""

    metric: str
    mode: str
    k: int = 1


@dataclass(frozen=True)
class Retention:
    """A checkpoint stays when one of these wants it: newest `keep_last`, one per `keep_every` steps, the best."""

    keep_last: int = 3
    keep_every: int | None = None
    keep_best: Best | None = None

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any]) -> Retention:
        """From the `checkpoint` part of plan/agent.json; keys it lacks have their defaults."""
        best = plan.get("keep_best")
        return cls(
            keep_last=int(plan.get("keep_last", cls.keep_last)),
            keep_every=plan.get("keep_every"),
            keep_best=None if best is None else Best(best["metric"], best["mode"], best["k"]),
        )


def kept(manifests: Sequence[Manifest], retention: Retention) -> set[CheckpointName]:
    """Names of those that stay; of any manifests, never fewer than the newest two."""
    newest = sorted(manifests, key=lambda m: m.rank, reverse=True)
    wanted = newest[: max(retention.keep_last, MINIMUM_KEPT)]
    if retention.keep_every is not None:
        wanted += milestones(newest, retention.keep_every)
    if retention.keep_best is not None:
        wanted += best(newest, retention.keep_best)
    return {manifest.name for manifest in wanted}


def milestones(manifests: Sequence[Manifest], every: int) -> list[Manifest]:
    """The first checkpoint at or after each multiple of `every`: saves need not fall on the multiples."""
    first: dict[int, Manifest] = {}
    for manifest in sorted(manifests, key=lambda m: m.rank, reverse=True):
        number = manifest.step // every
        if number and (number not in first or manifest.step < first[number].step):
            first[number] = manifest
    return list(first.values())


def best(manifests: Sequence[Manifest], wanted: Best) -> list[Manifest]:
    """The best by their metric, best first; of equal ones the earlier. Those without a number for it do not compete."""
    sign = 1 if wanted.mode == "min" else -1
    rivals = [m for m in manifests if math.isfinite(m.metrics.get(wanted.metric, math.nan))]
    return sorted(rivals, key=lambda m: (sign * m.metrics[wanted.metric], m.rank))[: wanted.k]

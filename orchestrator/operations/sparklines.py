"""A run's metrics in one glance: the newest rows of metrics.csv as bars."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.errors import RegistryError
from orchestrator.paths import RunPaths

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 16
_READ_BYTES = 4 << 20
_SHOWN = 3


@dataclass(frozen=True)
class Trend:
    """One metric: its course as bars, and its newest value."""

    name: str
    bars: str
    last: float


def trends(paths: RunPaths) -> list[Trend]:
    """Up to three metrics, losses first. Reads at most the last 4 MiB; no file gives an empty list."""
    series = _series(paths)
    names = sorted(series, key=lambda name: ("loss" not in name, name))
    return [Trend(name, bars(series[name]), series[name][-1]) for name in names[:_SHOWN] if series[name]]


def _series(paths: RunPaths) -> dict[str, list[float]]:
    try:
        with paths.metrics.open("rb") as stream:
            end = stream.seek(0, 2)
            stream.seek(max(0, end - _READ_BYTES))
            text = stream.read().decode(errors="replace")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RegistryError(f"cannot read {paths.metrics}: {error}") from error
    found: dict[str, list[float]] = {}
    for line in text.splitlines()[1:]:
        fields = line.split(",")
        if len(fields) == 4 and (value := _number(fields[3])) is not None:
            found.setdefault(fields[2], []).append(value)
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def bars(values: list[float]) -> str:
    """Values in order as at most 16 bars, each the mean of its share."""
    buckets = min(_WIDTH, len(values))
    means = []
    for index in range(buckets):
        share = values[index * len(values) // buckets : (index + 1) * len(values) // buckets]
        means.append(math.fsum(share) / len(share))
    low, high = min(means), max(means)
    if high == low:
        return _BARS[0] * buckets
    return "".join(_BARS[round((mean - low) / (high - low) * (len(_BARS) - 1))] for mean in means)

"""Reading what scontrol, sacctmgr and sinfo print (22.05 to 24.11): text → values, pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from orchestrator.worker.scheduler import parse_fields

Fields: TypeAlias = Mapping[str, str]
_NOTHING = ("", "(null)", "N/A", "none", "None", "NONE", "UNLIMITED", "infinite", "INFINITE", "Unknown")
_UNKNOWN_EXPIRY_S = 120  # slurm.conf(5): cred_expire, the default


@dataclass(frozen=True)
class ClusterAnswers:
    """What the cluster said about itself. `accounting`: None where there is no database, or it kept silent."""

    config: Fields
    partitions: Mapping[str, Fields]
    hosts: frozenset[str] = frozenset()  # host names of the nodes of the partitions in question
    accounting: Accounting | None = None
    accounting_error: str = ""


@dataclass(frozen=True)
class Accounting:
    """The user's associations and the QOS of the cluster, as rows of sacctmgr."""

    associations: tuple[Fields, ...] = ()
    qos: Mapping[str, Fields] = field(default_factory=dict)


def parse_config(text: str) -> dict[str, str]:
    """`Key = value` lines of `scontrol show config`."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def parse_partitions(text: str) -> dict[str, dict[str, str]]:
    """Lines of `scontrol show partition --oneliner`, by name."""
    rows = [parse_fields(line) for line in text.splitlines()]
    return {row["PartitionName"]: row for row in rows if "PartitionName" in row}


def parse_table(text: str) -> tuple[dict[str, str], ...]:
    """Rows of `sacctmgr --parsable2 show …`, whose first line names the columns."""
    lines = text.splitlines()
    if not lines:
        return ()
    columns = lines[0].split("|")
    return tuple(dict(zip(columns, line.split("|"), strict=False)) for line in lines[1:])


def seconds(text: str | None) -> int | None:
    """`30 sec`, `20`, `1-00:00:00`, `01:00:00` → seconds; None for unlimited, none, unknown."""
    word = (text or "").split()[0] if (text or "").split() else ""
    if word in _NOTHING:
        return None
    if word.isdigit():
        return int(word)
    from orchestrator.spec.units import WallTime

    try:
        return int(WallTime.parse(word))
    except ValueError:
        return None


def number(text: str | None) -> int | None:
    """A count; None for unlimited and what is no count."""
    return int(text) if text and text.isdigit() else None


def words(text: str | None) -> list[str]:
    """A comma-separated value; empty for Slurm's several words for nothing."""
    return [] if text is None or text in _NOTHING else [word.strip() for word in text.split(",") if word.strip()]


def requeue_delay_s(config: Fields) -> int:
    """Seconds a requeued job waits before it may start: the lifetime of its old credential (FACTS 2)."""
    expiry = next((word for word in words(config.get("AuthInfo")) if word.startswith("cred_expire=")), None)
    value = number(expiry.partition("=")[2]) if expiry else None
    return _UNKNOWN_EXPIRY_S if value is None else value


def clock(total_s: int) -> str:
    """Seconds as Slurm writes them: `04:00:00`, `1-00:00:00`."""
    from orchestrator.spec.units import WallTime

    return str(WallTime(total_s))

"""What would be different when a run goes on: named, refused unless it is meant, written down."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.errors import RefusedError
from orchestrator.words import count

if TYPE_CHECKING:
    from orchestrator.spec import JobSpec

_SHOWN = 60


@dataclass(frozen=True)
class Change:
    """One thing a result depends on; None where it was (is) not set. `key` is what `--allow-drift` takes."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.key, self.old)} → {_shown(self.key, self.new)}"

    def as_json(self) -> dict[str, Any]:
        return {"key": self.key, "old": self.old, "new": self.new}


def changes(old: JobSpec, old_code: str, new: JobSpec, new_code: str) -> tuple[Change, ...]:
    """What a run is made of that differs (pure): `job.…`, `env.…`, `image`, `code`, `name`."""
    before, now = _fields(old, old_code), _fields(new, new_code)
    keys = dict.fromkeys((*before, *now))
    return tuple(
        Change(key, before.get(key), now.get(key))
        for key in keys
        if (key in before) != (key in now) or before.get(key) != now.get(key)
    )


def _fields(spec: JobSpec, code: str) -> dict[str, Any]:
    from orchestrator.identity import identity_fields

    fields = identity_fields(spec, code)
    job = fields["job"]
    args = job.pop("args", None) or {}
    return {
        "name": fields["name"],
        **{f"job.{key}": value for key, value in job.items()},
        **{f"job.args.{key}": value for key, value in args.items()},
        **{f"env.{key}": value for key, value in fields["env"].items()},
        "image": fields["image"],
        "code": fields["code"],
    }


def refuse_drift(run_id: str, found: Collection[Change], allowed: Iterable[str], *, step: int | None) -> None:
    """Raises RefusedError with everything that changed, unless each of it is allowed."""
    permitted = set(allowed)
    missing = [change.key for change in found if change.key not in permitted]
    if not missing:
        return
    since = "since it was last submitted" + ("" if step is None else f" (its checkpoint is of step {count(step)})")
    lines = "\n".join(f"  {change}" for change in found)
    options = " ".join(f"--allow-drift {key}" for key in missing)
    raise RefusedError(
        f"{run_id} would go on with something else; changed {since}:\n{lines}",
        hint=f"if that is meant, add {options}; as a run of its own: orch submit",
    )


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "not set"
    if key == "code":
        return str(value)[:12]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"

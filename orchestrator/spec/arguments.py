"""`job.args` as command-line words, and back: nothing is lost, and nobody needs quotes for plain text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.spec.models import Job


def render_argument(value: Any) -> str:
    """A JSON value as the text behind `--key=`: text verbatim unless it would parse as JSON, all else as JSON."""
    if isinstance(value, str) and not _is_json(value):
        return value
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def parse_argument(text: str) -> Any:
    """The reverse: JSON where it is JSON, otherwise the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _is_json(text: str) -> bool:
    """True also for what a JSON reader chokes on (thousands of digits, endless brackets): quotes make it text."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        return True
    return True


def program_args(job: Job) -> list[str]:
    """The words after the module, script or command: `args` rendered in the order given, then `argv` as it is."""
    return [f"--{key}={render_argument(value)}" for key, value in job.args.items()] + list(job.argv)

"""`--key=value` words to settings values: JSON where the value is JSON, else text (the spec's `job.args` rule)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from orchestrator.errors import SpecError

USAGE = """usage: python -m jobs.pretrain --data=PATH [--key=value …]

A value is read as JSON where it is JSON, else as text:
  --epochs=4   --optim_args={"lr":0.1}   --model=orch/resnet9   --data=["a","b"]   --seed=null
Settings, ranges and defaults: docs/training.md"""


def parse_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """Raises SpecError for a word that is not `--key=value`, or a key given twice."""
    values: dict[str, Any] = {}
    for word in argv:
        key, separator, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not separator:
            raise SpecError(f"cannot read the argument {word!r}", hint="write --key=value, for example --epochs=4")
        if key in values:
            raise SpecError(f"--{key} is given twice", hint="leave one of the two out")
        values[key] = parse_value(text)
    return values


def parse_value(text: str) -> Any:
    """The value of one argument. NaN and Infinity are not JSON: they stay text."""
    try:
        return json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return text


def _not_json(name: str) -> Any:
    raise ValueError(name)

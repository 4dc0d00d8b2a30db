"""The commented specs that `orch init` writes; each one is valid as it is."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from orchestrator.errors import SpecError
from orchestrator.spec.problems import did_you_mean

TEMPLATES = ("digits", "module", "script", "command")
_FOLDER = Path(__file__).with_name("starters")


def render_template(name: str, run_name: str, *, file: str = "spec.yaml", directory: Path | None = None) -> str:
    """The text of a first spec. `file`: its name, for its comments; `directory`: of its data. Raises SpecError."""
    if name not in TEMPLATES:
        raise SpecError(f"--from {name}: one of {', '.join(TEMPLATES)}.{did_you_mean(name, TEMPLATES)}")
    data = (directory or Path.cwd()).absolute() / "data" / "digits"
    values = {
        "@NAME@": json.dumps(run_name, ensure_ascii=False),
        "@FILE@": "".join(char if char.isprintable() else "?" for char in file),
        "@DATA@": json.dumps(str(data), ensure_ascii=False),
        "@WRITE@": f"python -m jobs.data.digits --out {shlex.quote(str(data))}",
    }
    text = (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    return re.sub("|".join(values), lambda match: values[match[0]], text)


def suggest_name(file: str) -> str:
    """A run name from a file name: `my spec.yaml` gives `my-spec`."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(file).stem).strip("-._")
    return stem[:64] or "run"

"""What is wrong with a spec, where, and what to write instead; many problems become one `SpecError`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from orchestrator.errors import SpecError

KeyPath: TypeAlias = tuple[str | int, ...]  # keys and list positions, from the top of the document

_SHOWN = 60  # characters of a given value that a message repeats


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written: a file position, or `--set` (no line), or a Python mapping (no source)."""

    source: str = ""
    line: int | None = None  # from 1
    column: int | None = None  # from 1, in characters

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `str()` is what people read."""

    what: str
    path: KeyPath = ()
    place: Place = Place()

    @property
    def field(self) -> str:
        """The dotted path, as `--set` takes it."""
        return ".".join(str(part) for part in self.path)

    def __str__(self) -> str:
        head = f"{self.field}: {self.what}" if self.path else self.what
        place = str(self.place)
        if not place:
            return head
        return f"{place}  {head}"

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "file": self.place.source or None,
            "line": self.place.line,
            "column": self.place.column,
            "field": self.field or None,
            "message": self.what,
        }


class Refusal(ValueError):
    """Raised by validators of the models: several findings, each with a path relative to the validated field."""

    def __init__(self, *findings: tuple[KeyPath, str], keys: Iterable[tuple[KeyPath, str]] = ()) -> None:
        self.findings = findings
        self.key_findings = tuple(keys)  # the mistake is the key, not the value: point there
        super().__init__("; ".join(what for _, what in (*self.findings, *self.key_findings)))


def error_of(problems: Sequence[Problem], *, hint: str | None = None) -> SpecError:
    """All problems as the one error that is raised, in the order of their positions."""
    ordered = sorted(problems, key=lambda p: (p.place.source, p.place.line or 0, p.place.column or 0))
    unique = list(dict.fromkeys(ordered))
    return SpecError(
        "\n".join(str(problem) for problem in unique),
        hint=hint,
        problems=tuple(problem.as_dict() for problem in unique),
    )


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """` Did you mean \\`x\\`?`, or an empty string when nothing is close."""
    names = list(known)
    folded = given.lower().replace("-", "_")
    close = [name for name in names if name == folded] or difflib.get_close_matches(folded, names, n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else ""


def shown(value: object) -> str:
    """A given value, short and on one line, for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        text = repr(type(value).__name__)
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def kind_of(value: object) -> str:
    """The YAML name of a value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a mapping" if isinstance(value, dict) else "a list"

"""Patterns as in .gitignore, for `workspace.exclude`: https://git-scm.com/docs/gitignore#_pattern_format. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Rule:
    pattern: re.Pattern[str]
    negated: bool
    directories_only: bool


class IgnorePatterns:
    """The last pattern that matches decides; what lies in an excluded directory stays excluded."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """Raises ValueError on a pattern that cannot be read."""
        self._rules = [rule for rule in map(_parse, patterns) if rule is not None]

    def excludes(self, path: str, *, directory: bool = False) -> bool:
        """True when a POSIX path relative to the workspace, or a directory above it, is excluded."""
        parts = path.split("/")
        return any(
            self._matches("/".join(parts[:length]), directory or length < len(parts))
            for length in range(1, len(parts) + 1)
        )

    def _matches(self, path: str, directory: bool) -> bool:
        for rule in reversed(self._rules):
            if (directory or not rule.directories_only) and rule.pattern.fullmatch(path):
                return not rule.negated
        return False


def _parse(text: str) -> _Rule | None:
    body = text.rstrip("\r\n")
    if not body.strip() or body.startswith("#"):
        return None
    negated = body.startswith("!")
    body = body[1:] if negated else body
    directories_only = body.endswith("/")
    body = body.removesuffix("/")
    anchored = "/" in body
    try:
        pattern = re.compile(("" if anchored else "(?:.*/)?") + _translated(body.removeprefix("/")), re.DOTALL)
    except re.error as error:
        raise ValueError(f"{text!r} is not a pattern: {error}") from None
    return _Rule(pattern, negated, directories_only)


def _translated(body: str) -> str:
    segments = body.split("/")
    result = ""
    for index, segment in enumerate(segments):
        last = index == len(segments) - 1
        if segment == "**":
            result += ".*" if last else "(?:.*/)?"
        else:
            result += _segment(segment) + ("" if last else "/")
    return result


def _segment(segment: str) -> str:
    result, position = "", 0
    while position < len(segment):
        char = segment[position]
        position += 1
        if char == "*":
            result += "[^/]*"
        elif char == "?":
            result += "[^/]"
        elif char == "[" and (end := segment.find("]", position + 1)) > 0:
            inside = segment[position:end].replace("\\", "\\\\").replace("[", "\\[")
            result += f"[{'^' + inside[1:] if inside[0] in '!^' else inside}]"
            position = end + 1
        elif char == "\\" and position < len(segment):
            result += re.escape(segment[position])
            position += 1
        else:
            result += re.escape(char)
    return result

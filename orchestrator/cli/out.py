"""Printing: Rich on a terminal, plain text elsewhere (and with NO_COLOR), JSON as one document."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

Segment: TypeAlias = tuple[str, str]  # text, style ("" = none)
Line: TypeAlias = Sequence[Segment]

STATE_STYLES = {
    "queued": "yellow",
    "running": "bold green",
    "preempted": "yellow",
    "needs_resume": "bold yellow",
    "completed": "green",
    "failed": "bold red",
    "cancelled": "dim",
    "lost": "bold red",
}


def lines(content: Iterable[Line]) -> None:
    """Print lines of styled segments to stdout."""
    if not _fancy():
        for line in content:
            print("".join(text for text, _ in line))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in content:
        console.print(Text.assemble(*((text, style) for text, style in line)))


def live() -> bool:
    """True where a picture can be painted over."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def repainted(pictures: Iterable[Sequence[Line]]) -> None:
    """Show one picture over the other on the terminal until there are no more."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(highlight=False), auto_refresh=False) as display:
        for picture in pictures:
            rows = (Text.assemble(*((text, style) for text, style in line)) for line in picture)
            display.update(Text("\n").join(rows), refresh=True)


def line(*segments: Segment | str) -> None:
    """Print one line."""
    lines([[(part, "") if isinstance(part, str) else part for part in segments]])


def json_document(document: Any) -> None:
    """Print the one document of `--json`; ASCII only, so that no locale can break it."""
    print(json.dumps(document, indent=2, default=str))


def error(message: str, hint: str | None) -> None:
    """Message and hint on stderr; stdout stays clean for programs."""
    print(message, file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def progress(text: str) -> None:
    """A line on stderr for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def warnings(texts: Iterable[str]) -> None:
    """Things to know that are no failure."""
    for text in texts:
        print(f"warning: {text}", file=sys.stderr)


def _fancy() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def marks() -> tuple[str, str, str]:
    """Good, to be known, wrong: signs where the encoding of stdout has them, else words in ASCII."""
    signs = ("✔", "!", "✘")
    try:
        "".join(signs).encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ("ok", "!", "x")
    return signs


def tolerate_any_text() -> None:
    """A run id or path that this terminal's encoding lacks is shown with a replacement, not a crash."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def table(heading: Sequence[str], rows: Sequence[Sequence[Segment]], *, width: int | None = None) -> list[Line]:
    """Left-aligned columns, as wide as their content; the last one is not padded, and is cut to `width` if given."""
    widths = [max([len(title), *(len(row[column][0]) for row in rows)]) for column, title in enumerate(heading[:-1])]
    room = None if width is None else max(10, width - sum(widths) - 2 * len(widths))
    lines: list[Line] = [_row([(title, "bold") for title in heading], widths, room)]
    lines += [_row(row, widths, room) for row in rows]
    return lines


def _row(cells: Sequence[Segment], widths: Sequence[int], room: int | None) -> Line:
    *padded, (last, style) = cells
    shown = last if room is None or len(last) <= room else last[: room - 1] + "…"
    line = [(text.ljust(width) + "  ", look) for (text, look), width in zip(padded, widths, strict=True)]
    return [*line, (shown, style)]


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None for a file or a pipe, which get everything."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


class Bar:
    """A progress bar on stderr, for work of a known size; silent where stderr is no terminal."""

    def __init__(self, label: str, *, width: int = 30) -> None:
        self._label, self._width = label, width
        self._done, self._shown = 0, -1

    def __call__(self, count: int, total: int) -> None:
        """`count` more of `total` is done."""
        self._done += count
        percent = 100 if total <= 0 else min(100, 100 * self._done // total)
        if not sys.stderr.isatty() or percent == self._shown:
            return
        self._shown = percent
        full = self._width * percent // 100
        end = "\n" if percent == 100 else ""
        bar = "#" * full + "." * (self._width - full)
        print(f"\r{self._label}  [{bar}] {percent:3d} %", end=end, file=sys.stderr, flush=True)

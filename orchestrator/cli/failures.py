"""From exceptions to exit codes: message and hint on stderr, one JSON document on stdout, never a traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.cli import out
from orchestrator.errors import OrchError

INTERRUPTED = 130
BROKEN_PIPE = 141
USAGE = 2
CRASHED = 70  # EX_SOFTWARE: a bug of ours


def guarded(run: Callable[[], int], *, json: bool) -> int:
    """Run a command and turn whatever it raises into an exit code."""
    import typer

    out.tolerate_any_text()
    try:
        code = run()
        sys.stdout.flush()
        return code
    except OrchError as error:
        _report(error.message, error.hint, error.exit_code, json, problems=getattr(error, "problems", ()), error=error)
        return error.exit_code
    except typer.Exit as leave:
        return int(leave.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 - the last resort: a report file instead of a traceback
        return _foreign(error, json)


def _foreign(error: Exception, json: bool) -> int:
    """Typer's own usage errors carry an exit code and a message; anything else is a bug."""
    words = getattr(error, "format_message", None)
    if callable(words) and hasattr(error, "exit_code"):
        context = getattr(error, "ctx", None)
        if context is not None and type(error).__name__ == "NoArgsIsHelpError":
            print(context.get_help(), file=sys.stderr)
            return USAGE
        hint = f"`{context.command_path} --help` lists what it takes" if context is not None else None
        _report(str(words()), hint, USAGE, json)
        return USAGE
    if isinstance(error, OSError) and error.errno == 32:
        return BROKEN_PIPE
    return _crash(error, json)


def _report(
    message: str, hint: str | None, code: int, json: bool, *, problems: Any = (), error: OrchError | None = None
) -> None:
    out.error(message, hint)
    if json:
        kind = type(error).__name__ if error is not None else "UsageError"
        document: dict[str, Any] = {"type": kind, "message": message, "hint": hint, "exit_code": code}
        if problems:
            document["problems"] = [dict(problem) for problem in problems]
        out.json_document({"error": document})


def _crash(error: Exception, json: bool) -> int:
    import traceback

    text = "".join(traceback.format_exception(error))
    if os.environ.get("ORCH_DEBUG") == "1":
        print(text, file=sys.stderr)
    where = _write_report(text)
    hint = f"the details are in {where}" if where else "ORCH_DEBUG=1 shows the details"
    _report(f"orch has a bug: {type(error).__name__}: {error}", hint, CRASHED, json)
    return CRASHED


def _write_report(text: str) -> Path | None:
    from orchestrator.operations.roots import state_dir

    try:
        folder = state_dir() / "crashes"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.txt"
        path.write_text(f"{sys.argv}\n{text}", encoding="utf-8")
    except OSError:
        return None  # then the message names ORCH_DEBUG instead
    return path


def close_quietly() -> None:
    """Flush now; if the reader of our pipe is gone, let the interpreter's own flush at exit write to nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)

"""Command line of `jobs.pretrain`: `--key=value`, one for each field of the settings."""

from __future__ import annotations

import sys

from jobs.pretrain.arguments import USAGE, parse_arguments
from jobs.pretrain.settings import parse_settings
from orchestrator.errors import OrchError


def main(argv: list[str]) -> int:
    """0 when done, 2 for wrong settings. After a stop the process ends inside `run` (docs/exact-resume.md)."""
    if argv in (["--help"], ["-h"]):
        print(USAGE)
        return 0
    try:
        settings = parse_settings(parse_arguments(argv))
        from jobs.pretrain.run import run

        result = run(settings)
    except OrchError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    if result is not None and result.is_chief:
        print(result.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""jobs.pretrain, held back: while the file `unbound` is missing, an attempt makes a few steps at full speed, then one a
second. A slow machine takes long to stop an attempt, and must not find the run finished before the last stop."""

import sys
import time
from typing import Any

from jobs.pretrain.__main__ import main
from orchestrator.worker.session import Session

AT_FULL_SPEED = 6
_report = Session.report
_made = 0


def _held_back(session: Session, *progress: Any, **more: Any) -> None:
    """Report a step; rank 0 then takes its time, and its peers wait for it in the next step's collectives."""
    global _made
    _report(session, *progress, **more)
    _made += 1
    over = time.monotonic() + (1.0 if session.is_chief and _made > AT_FULL_SPEED else 0.0)
    while time.monotonic() < over and not (session.run_dir / "unbound").exists() and not session.stop_requested:
        time.sleep(0.01)


if __name__ == "__main__":
    Session.report = _held_back  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))

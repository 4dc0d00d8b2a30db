"""One save that runs beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable

from orchestrator.checkpoint import Manifest


class BackgroundSave:
    """Commits in a thread, then tidies up there. What goes wrong is kept for whoever trains to raise.

    Not a daemon: a program that simply ends does not cut its last save off.
    """

    def __init__(self, commit: Callable[[], Manifest], tidy_up: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self._commit = commit
        self._tidy_up = tidy_up
        self._decided = threading.Event()
        self._thread = threading.Thread(target=self._run, name="orch-save")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._commit()
            self._decided.set()
            self._tidy_up()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the thread that trains raises it
            self.error = error
        finally:
            self._decided.set()

    def wait_for_commit(self) -> None:
        """Until the checkpoint is committed or has failed; tidying up may go on."""
        self._decided.wait()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until nothing of it is left to do, or the time is up."""
        self._thread.join(timeout_s)

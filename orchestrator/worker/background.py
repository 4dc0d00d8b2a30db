"""Saves that run beside the training, one at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from orchestrator.checkpoint import Manifest
from orchestrator.errors import Fenced

log = logging.getLogger("orchestrator.worker")


class BackgroundSave:
    """Commits in a thread, then tidies up there. What goes wrong is kept for whoever trains to raise.

    Not a daemon: a program that simply ends does not cut its last save off.
    """

    def __init__(self, commit: Callable[[], Manifest], tidy_up: Callable[[], object]) -> None:
        self.error: BaseException | None = None
        self._commit = commit
        self._tidy_up = tidy_up
        self._decided = threading.Event()
        self._ended = threading.Event()
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
            self._ended.set()

    def wait_for_commit(self) -> None:
        """Until the checkpoint is committed or has failed; tidying up may go on."""
        self._decided.wait()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until nothing of it is left to do, or the time is up."""
        # Not `join`: when Ctrl-C interrupts that, Python 3.11 takes the thread for ended ever after, and the next save
        # would overwrite the copy that this one is still writing.
        self._ended.wait(timeout_s)


class InFlight:
    """The save beside the training, while there is one, and what went wrong with it: that is raised once."""

    def __init__(self) -> None:
        self._save: BackgroundSave | None = None

    @property
    def flying(self) -> bool:
        """Whether there is one that nobody has finished."""
        return self._save is not None

    def begin(self, commit: Callable[[], Manifest], tidy_up: Callable[[], object]) -> None:
        """Let one begin, when the one before has been finished."""
        self._save = BackgroundSave(commit, tidy_up)

    def wait(self, timeout_s: float | None = None) -> BaseException | None:
        """Until nothing of it is left to do, or the time is up; what has gone wrong with it."""
        if self._save is None:
            return None
        self._save.wait(timeout_s)
        return self._save.error

    def finish(self) -> None:
        """Wait for it, and raise what went wrong with it."""
        self.wait()
        self.raise_failure()
        self._save = None

    def finish_commit(self) -> None:
        """As `finish`, but does not wait for old checkpoints to be removed."""
        if self._save is not None:
            self._save.wait_for_commit()
            self.raise_failure()

    def raise_failure(self, kind: type[BaseException] = BaseException) -> None:
        """Raise what has gone wrong with it so far, if it is of that kind."""
        if self._save is not None and isinstance(error := self._save.error, kind):
            self._save = None
            raise error

    def drop(self) -> None:
        """Let it end with the process; what it has not published does not exist. Raises Fenced."""
        error = None if self._save is None else self._save.error
        self._save = None
        if isinstance(error, Fenced):
            raise error
        if error is not None:  # no reason to lose what the disk can take
            log.warning("the save before the last one had failed: %s", error)

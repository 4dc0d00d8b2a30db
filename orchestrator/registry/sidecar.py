"""`sidecar.json`: the state of a run as its owner, the agent of node 0, last wrote it (PROTOCOLS 2)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from orchestrator.errors import RegistryError
from orchestrator.files import read_json, write_json
from orchestrator.paths import RunPaths

_log = logging.getLogger(__name__)

SIDECAR_VERSION = 1


def _new_sidecar() -> dict[str, Any]:
    return {
        "version": SIDECAR_VERSION,
        "run_id": None,
        "name": None,
        "backend": None,
        "job_id": None,
        "status": None,
        "exit_reason": None,
        "message": None,
        "attempts": [],
        "requeues": {},
        "hparams": {},
        "summary": {},
        "best_checkpoint": None,
    }


def _new_attempt(attempt: int) -> dict[str, Any]:
    return {
        "attempt": attempt,
        "job_id": None,
        "nodes": [],
        "started": None,
        "ended": None,
        "outcome": None,
        "exit_reason": None,
        "message": None,
        "step_start": None,
        "step_end": None,
        "saved_in_s": None,
        "resumed_from": None,
        "exit_code": None,
    }


def load_sidecar(paths: RunPaths) -> dict[str, Any] | None:
    """The sidecar with every key present, or None before the first attempt. Raises RegistryError when it is damaged."""
    try:
        stored = read_json(paths.sidecar)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RegistryError(f"cannot read {paths.sidecar}: {error.strerror or error}") from error
    if not isinstance(stored, dict):
        raise RegistryError(f"{paths.sidecar} is not a sidecar: expected an object")
    # A newer orch may have added keys and an older one may lack some: yesterday's run must still load.
    sidecar = _new_sidecar() | stored
    sidecar["attempts"] = [_new_attempt(a.get("attempt", n)) | a for n, a in enumerate(sidecar["attempts"])]
    return sidecar


class SidecarWriter:
    """Changes the sidecar. One owner at a time: the agent of node 0 (and submit, before anything runs).

    Every method writes the file (atomically, durably) before it returns and raises RegistryError if it cannot.
    """

    def __init__(self, paths: RunPaths, *, clock: Callable[[], float] = time.time) -> None:
        self._path = paths.sidecar
        self._clock = clock
        self._held = False
        self.data = self._load(paths)

    def _load(self, paths: RunPaths) -> dict[str, Any]:
        try:
            return load_sidecar(paths) or _new_sidecar()
        except RegistryError as error:
            # The file is only ever replaced whole, so this is a hand edit or a bad disk. A run must not be stuck for
            # ever because of its history; the damaged file is kept for people.
            aside = self._path.with_name(self._path.name + ".corrupt")
            _log.warning("%s; kept as %s, starting a new one", error.message, aside.name)
            try:
                self._path.replace(aside)
            except OSError as failure:
                raise RegistryError(f"cannot replace the damaged {self._path}: {failure}") from failure
            return _new_sidecar()

    @contextmanager
    def one_write(self) -> Iterator[None]:
        """Changes inside become visible together, when it is left without an error."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self._write()

    def update(self, **fields: Any) -> None:
        """Set top-level fields. Raises TypeError for a field a sidecar does not have."""
        self._check(fields, _new_sidecar())
        self.data.update(fields)
        self._write()

    def begin_attempt(self, attempt: int, *, job_id: str | None = None, nodes: Sequence[str] = ()) -> None:
        """Record that `attempt` has started; its entry is made anew if there was one."""
        entry = _new_attempt(attempt) | {"job_id": job_id, "nodes": list(nodes), "started": self._clock()}
        others = [a for a in self.data["attempts"] if a["attempt"] != attempt]
        self.data["attempts"] = sorted([*others, entry], key=lambda a: int(a["attempt"]))
        self._write()

    def update_attempt(self, attempt: int, **fields: Any) -> None:
        """Set fields of an attempt, making its entry if there is none. Raises TypeError for an unknown field."""
        self._check(fields, _new_attempt(attempt))
        self._entry(attempt).update(fields)
        self._write()

    def end_attempt(self, attempt: int, **fields: Any) -> None:
        """`update_attempt` with `ended` set to now."""
        self.update_attempt(attempt, **({"ended": self._clock()} | fields))

    def count_requeue(self, cause: str) -> int:
        """Add one to the requeues for `cause` (an ExitReason) and return how many there are now."""
        count = int(self.data["requeues"].get(cause, 0)) + 1
        self.data["requeues"][cause] = count
        self._write()
        return count

    def _entry(self, attempt: int) -> dict[str, Any]:
        attempts: list[dict[str, Any]] = self.data["attempts"]
        for entry in attempts:
            if entry["attempt"] == attempt:
                return entry
        attempts.append(_new_attempt(attempt))
        attempts.sort(key=lambda a: int(a["attempt"]))
        return self._entry(attempt)

    @staticmethod
    def _check(fields: dict[str, Any], known: dict[str, Any]) -> None:
        if unknown := sorted(set(fields) - set(known)):
            raise TypeError(f"a sidecar has no field {', '.join(unknown)}")

    def _write(self) -> None:
        if self._held:
            return
        try:
            write_json(self._path, self.data)
        except OSError as error:
            raise RegistryError(
                f"cannot write {self._path}: {error.strerror or error}",
                hint="check free space, quota and permissions of the run directory",
            ) from error

"""Ends that no agent could tell (`lost`, cancelled in the queue): the first command that sees one sends the messages.

A process of its own sends them, so that the answer does not wait for a mail server; the marker file in the run
directory keeps a second command from sending them again.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.backends.base import JobStatus
from orchestrator.errors import OrchError, RegistryError
from orchestrator.operations.record import Record, agent_plan, is_ours, load_record
from orchestrator.operations.state import Standing, resolve
from orchestrator.registry.submissions import SHOWN_LATE_S

_log = logging.getLogger(__name__)

_ANSWER_WAITS_S = 3.0
# Senders outlive the command. Kept here: a Popen that is forgotten while its process runs warns when collected.
_started: list[subprocess.Popen[bytes]] = []


def announce(ends: Iterable[tuple[Record, Standing, JobStatus | None]], *, now: float | None = None) -> None:
    """Have the unsaid ones among these told; waits a few seconds at most. Never fails the command that looks."""
    now = time.time() if now is None else now
    unsaid = [end for record, standing, job in ends if (end := _unsaid(record, standing, job, now)) is not None]
    if unsaid:
        _send(unsaid)


def _unsaid(record: Record, standing: Standing, job: JobStatus | None, now: float) -> dict[str, Any] | None:
    """What to tell about this run, None when there is nothing, or its agent has said it."""
    if not nobody_said(record, standing) or record.handle is None:
        return None
    if job is None or record.elsewhere is not None:  # without an answer of its scheduler it may well be running
        return None
    if job.end is not None and now - job.end < SHOWN_LATE_S:
        return None
    paths, job_id = record.paths, record.handle.job_id
    wanted = _wanted(record)
    if standing.state.value not in wanted or paths.notified(job_id, standing.state.value).exists():
        return None
    if not is_ours(paths) or not os.access(paths.run_dir, os.W_OK):
        return None
    try:  # it may have ended, with a word, between the look at its files and the question to the scheduler
        again = load_record(paths)
        if again.handle != record.handle or not nobody_said(again, resolve(again, job)):
            return None
    except OrchError:
        return None
    return {
        "run_dir": str(paths.run_dir),
        "job_id": job_id,
        "state": standing.state.value,
        "exit_reason": None if standing.exit_reason is None else standing.exit_reason.value,
        "message": standing.message,
        "attempt": record.last_attempt,
    }


def nobody_said(record: Record, standing: Standing) -> bool:
    """True for a run that has ended while its files say something else, or nothing."""
    return standing.state.terminal and not standing.alive and record.stated is not standing.state


def _wanted(record: Record) -> list[str]:
    try:
        notify = agent_plan(record.paths).get("notify")
    except RegistryError:  # no plan, no wish
        return []
    return list(notify["on"]) if isinstance(notify, Mapping) else []


def _send(ends: list[dict[str, Any]]) -> None:
    try:
        sender = subprocess.Popen(
            # -P: a program of the directory we are in, such as email.py, must not stand in for the library's.
            [sys.executable, "-P", "-m", "orchestrator.worker.notify"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C ends the command, not the message
        )
    except OSError as error:
        _log.warning("nobody was told of %d ended runs: %s", len(ends), error.strerror)
        return
    _started.append(sender)
    assert sender.stdin is not None
    try:
        with sender.stdin as stream:
            stream.write(json.dumps(ends).encode())
        sender.wait(_ANSWER_WAITS_S)
    except (BrokenPipeError, subprocess.TimeoutExpired):
        return  # it goes on alone, or has left its word in the events

"""Forks attempts that save checkpoints until they are killed, stopped or fenced. Run by test_posix_commit.py.

One JSON order per line on stdin; per order the lines `pid N`, then `saved STEP` for every commit that returned,
`stopped` when the attempt stopped itself, and `exited STATUS` (negative: killed by that signal). Attempts are forked
from this small process because importing Python anew for every kill would be most of the test's time.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.checkpoint import CheckpointStore, PosixStore, take_over
from orchestrator.errors import CheckpointError, Fenced

FENCED, FAILED = 93, 5
PIECE_BYTES = 1 << 14


def content(step: int, attempt: int, size: int) -> bytes:
    """A checkpoint that proves itself: hash of the rest, then text that names the step, then filling."""
    body = f"{step}:{attempt}:".encode()
    body += hashlib.sha256(body).digest() * (size // 32)
    return hashlib.sha256(body).digest() + body


def parse_content(data: bytes) -> tuple[int, int]:
    """(step, attempt) of a whole checkpoint. Raises ValueError for any other bytes."""
    if len(data) < 64 or hashlib.sha256(data[32:]).digest() != data[:32]:
        raise ValueError(f"{len(data)} bytes that are not a whole checkpoint")
    step, attempt, _ = data[32:].split(b":", 2)
    return int(step), int(attempt)


def open_store(order: dict[str, Any]) -> CheckpointStore:
    """In a directory, or, if the order says so, in a bucket; opened anew in every process."""
    if bucket := order.get("bucket"):
        from orchestrator.checkpoint.objects import ObjectStore

        return ObjectStore(bucket["url"], storage_options=bucket["options"], scratch=Path(bucket["scratch"]))
    return PosixStore(order["directory"])


def attempt_main(order: dict[str, Any], saved_fd: int) -> int:
    """One attempt: take over, then save every step until told otherwise."""
    if limit := order.get("file_size_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    attempt, size = order["attempt"], order["size"]
    occurrences = 0

    def trace(operation: str) -> None:
        nonlocal occurrences
        if operation == order.get("at"):
            occurrences += 1
            if occurrences == order.get("nth", 1):
                os.kill(os.getpid(), getattr(signal, order["signal"]))

    def write(file: BinaryIO) -> None:
        data = content(step, attempt, size)
        for start in range(0, len(data), PIECE_BYTES):
            file.write(data[start : start + PIECE_BYTES])
            trace("data-piece")

    store = open_store(order)
    # take_over() traces nothing: what it does is the store's own affair.
    store.open_epoch = functools.partial(store.open_epoch, trace=trace)  # type: ignore[method-assign]
    try:
        trace("start")
        found, fence = take_over(store, attempt=attempt)
        first = found.manifest.step + 1 if found else 1
        trace("started")
        for step in range(first, first + order["steps"]):
            store.commit(fence, write, step=step, epoch=0, world_size=1, trace=trace)
            os.write(saved_fd, b"saved %d\n" % step)
            trace("saved")
            store.collect_garbage(fence, keep_last=2, trace=trace)
            trace("collected")
    except Fenced:
        return FENCED
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return FAILED
    return 0


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if "bucket" in order:
            importlib.import_module("s3fs")  # here, once, instead of in every attempt; it starts no thread yet
        pid = os.fork()
        if pid == 0:
            os._exit(attempt_main(order, sys.stdout.fileno()))
        print("pid", pid, flush=True)
        while True:
            _, status = os.waitpid(pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                break
            print("stopped", flush=True)
        print("exited", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()

"""Forks attempts that save checkpoints until they are killed, stopped or fenced. Run by nursery.py.

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
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from orchestrator.checkpoint import CheckpointStore, Fence, PosixStore, Refuge, take_over
from orchestrator.checkpoint.coverage import Chunk, Index, Tensor, shard_part
from orchestrator.checkpoint.manifest import INDEX_PART
from orchestrator.errors import CheckpointError, Fenced

FENCED, FAILED = 93, 5
PIECE_BYTES = 1 << 14
LARGE_EVERY = 3  # steps
SHARDS = 2

Trace = Callable[[str], None]


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


class Interruption:
    """Sends this process a signal when the ordered operation is about to be done, be it in whichever thread."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._at, self._left, self._signal = order.get("at"), order.get("nth", 1), order.get("signal")
        self._after = order.get("after")  # until then nothing counts
        self._lock = threading.Lock()

    def __call__(self, operation: str) -> None:
        with self._lock:
            if operation == self._after:
                self._after = None
            counts = self._after is None and operation == self._at
            self._left -= counts
            due = counts and self._left == 0
        if due:
            assert self._signal is not None
            # To this thread: the process as a whole would stop a little later, when this one has gone on.
            signal.pthread_kill(threading.get_ident(), getattr(signal, self._signal))


class Attempt:
    """One process of a run: takes over, then saves every step until told otherwise."""

    def __init__(self, order: dict[str, Any], saved_fd: int) -> None:
        self.order, self.number = order, int(order["attempt"])
        self.trace = Interruption(order)
        self.store = traced(open_store(order), self.trace)
        self._saved_fd = saved_fd

    def steps(self, first: int) -> range:
        return range(first, first + self.order["steps"])

    def data(self, step: int) -> bytes:
        large = self.order.get("large") if step % LARGE_EVERY == 0 else None
        return content(step, self.number, large or self.order["size"])

    def writing(self, data: bytes) -> Callable[[BinaryIO], None]:
        def write(file: BinaryIO) -> None:
            for start in range(0, len(data), PIECE_BYTES):
                file.write(data[start : start + PIECE_BYTES])
                self.trace("data-piece")

        return write

    def acknowledge(self, step: int) -> None:
        os.write(self._saved_fd, b"saved %d\n" % step)
        self.trace("saved")

    def save_in_turn(self, save: Callable[[Fence, int], object]) -> None:
        found, fence = take_over(self.store, attempt=self.number)
        self.trace("started")
        for step in self.steps(found.manifest.step + 1 if found else 1):
            save(fence, step)
            self.acknowledge(step)
            self.store.collect_garbage(fence, keep_last=2)
            self.trace("collected")

    def save_one_file(self, fence: Fence, step: int) -> None:
        self.store.commit(fence, self.writing(self.data(step)), step=step, epoch=0, world_size=1)

    def save_shards(self, fence: Fence, step: int) -> None:
        """In the order in which the ranks of a sharded run do it."""
        name = self.store.begin(fence, step=step)
        shards = [
            self.store.write_part(name, self.writing(self.data(step)), part=shard_part(rank)) for rank in range(SHARDS)
        ]
        chunks = tuple(Chunk((rank,), (1,), rank) for rank in range(SHARDS))
        index = Index(tuple(shard_part(rank) for rank in range(SHARDS)), {"w": Tensor((SHARDS,), "float32", chunks)})
        files = [
            self.store.write_part(name, self.writing(self.data(step))),
            self.store.write_part(name, lambda file: file.write(index.render()), part=INDEX_PART),
            *shards,
        ]
        self.trace("publish")
        self.store.publish(fence, name, files, epoch=0, world_size=SHARDS)

    def train(self) -> None:
        """Saves beside a loop that goes on to change its state; with a refuge, the last save goes there."""
        from orchestrator.worker.session import CheckpointSettings, Identity, Session
        from orchestrator.worker.stop import StopRequest

        run_dir = Path(self.order["run_dir"])
        run_dir.mkdir(exist_ok=True)
        session = Session(
            Identity("chaos", run_dir, self.number, 0, 1, managed=True),
            settings=CheckpointSettings(keep_last=2, asynchronous=True),
            store=self._telling(self.store),
            stop=StopRequest(),
            refuge=self._refuge() if self.order.get("refuge") else None,
            exit_process=self.end,
        )
        found = session.resume()
        self.trace("started")
        steps = self.steps(found.manifest.step + 1 if found else 1)
        state = bytearray()
        for step in steps:
            state[:] = self.data(step)
            session.commit_async(lambda: self.writing(bytes(state)), step=step, epoch=0)
            self.trace("training")
            session.report(step, 0, None)
        if self.order.get("leaves"):  # without waiting for the save in flight
            step = steps.stop
            session.commit_before_leaving(self.writing(self.data(step)), step=step, epoch=0)
            session.leave(0)
        session.finish_save()

    def _telling(self, store: CheckpointStore) -> CheckpointStore:
        commit = store.commit

        def committed(fence: Fence, write: Callable[[BinaryIO], object], *, step: int, **about: Any) -> Any:
            manifest = commit(fence, write, step=step, **about)
            self.acknowledge(step)
            return manifest

        store.commit = committed  # type: ignore[method-assign]
        return store

    def _refuge(self) -> Refuge:
        refuge = Refuge(Path(self.order["run_dir"]) / "checkpoints")
        trace: Trace = lambda operation: self.trace(f"refuge-{operation}")  # noqa: E731
        medium = refuge.store.medium
        remove = medium.remove

        def remove_one_by_one(names: Iterable[str]) -> list[str]:
            def removed() -> Iterator[str]:
                for name in names:
                    trace("remove")
                    yield from remove([name])

            return list(removed())

        medium.remove = remove_one_by_one  # type: ignore[method-assign]
        refuge.store = self._telling(traced(refuge.store, trace))  # type: ignore[assignment]
        return refuge

    def end(self, code: int) -> NoReturn:
        if self.order.get("stays"):  # for a kill that may come late
            signal.pause()
        os._exit(code)

    def main(self) -> int:
        saving: dict[str, Callable[[], None]] = {
            "one file": lambda: self.save_in_turn(self.save_one_file),
            "shards": lambda: self.save_in_turn(self.save_shards),
            "beside the training": self.train,
        }
        try:
            self.trace("start")
            saving[self.order.get("saving", "one file")]()
        except Fenced:
            return FENCED
        except CheckpointError as error:
            print(error, file=sys.stderr)
            return FAILED
        return 0


def open_store(order: dict[str, Any]) -> CheckpointStore:
    """In a directory, or, if the order says so, in a bucket; opened anew in every process."""
    if bucket := order.get("bucket"):
        from orchestrator.checkpoint.objects import PATIENCE_S, ObjectStore

        disk = bucket.get("shared_disk")
        return ObjectStore(
            bucket["url"],
            storage_options=bucket["options"],
            scratch=Path(bucket["scratch"]),
            shared_disk=Path(disk) if disk else None,
            claim_on_disk=bucket.get("claim_on_disk", False),
            patience_s=lambda: bucket.get("patience_s", PATIENCE_S),
        )
    return PosixStore(order["directory"])


def traced(store: CheckpointStore, trace: Trace) -> CheckpointStore:
    """A store that tells `trace` of all that it does, whoever has it done, down to single requests."""
    for name in ("open_epoch", "commit", "begin", "write_part", "publish"):
        setattr(store, name, functools.partial(getattr(store, name), trace=trace))
    collect, adopt = store.collect_garbage, store.adopt

    def collect_garbage(*args: Any, **rules: Any) -> list[str]:
        asked: Trace = rules.pop("trace", None) or (lambda operation: None)

        def note(operation: str) -> None:
            trace(operation)
            asked(operation)

        return collect(*args, trace=note, **rules)

    def traced_adopt(*args: Any, **kwargs: Any) -> bool:
        trace("adopt")
        adopted = adopt(*args, **kwargs)
        trace("adopted")
        return adopted

    store.collect_garbage = collect_garbage  # type: ignore[method-assign]
    store.adopt = traced_adopt  # type: ignore[method-assign]
    if ask := getattr(store.medium, "_ask", None):  # type: ignore[attr-defined]

        def traced_ask(operation: str, *args: Any, **kwargs: Any) -> Any:
            trace("request")
            trace(f"request {args[0] if operation == 'call_s3' else operation}")
            return ask(operation, *args, **kwargs)

        store.medium._ask = traced_ask  # type: ignore[attr-defined]
    return store


def attempt_main(order: dict[str, Any], saved_fd: int) -> NoReturn:
    status = 1
    try:
        if limit := order.get("file_size_limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        attempt = Attempt(order, saved_fd)
        status = attempt.main()
        attempt.end(status)
    finally:
        os._exit(status)  # an attempt must never go on as its parent


def import_once(order: dict[str, Any]) -> None:
    """Here instead of in every attempt; nothing of it starts a thread."""
    if "bucket" in order:
        importlib.import_module("s3fs")
    if order.get("saving") == "beside the training":
        importlib.import_module("orchestrator.worker.session")


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        import_once(order)
        pid = os.fork()
        if pid == 0:
            attempt_main(order, sys.stdout.fileno())
        print("pid", pid, flush=True)
        while True:
            _, status = os.waitpid(pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                break
            print("stopped", flush=True)
        print("exited", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()

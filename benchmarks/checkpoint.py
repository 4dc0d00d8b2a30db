"""What checkpoints cost, on a state of 400 MB: how long training stands still, how long a save and a load take, memory.

    python benchmarks/checkpoint.py [--json] [--rounds 7] [--directory DIR]

Every figure is a ratio of medians of one run, in which what is compared takes turns. Loads are cold: the file is
dropped from the page cache before each, as after a restart on another node. DIR must be on a real disk; the default is
where temporary files go. Memory is the peak above what a process of its own had before, over the size of the state.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests.objects: the S3 server

from orchestrator.checkpoint import PosixStore, take_over
from orchestrator.checkpoint.objects import ObjectStore
from orchestrator.integrations.saving import StateSaver
from orchestrator.worker.session import CheckpointSettings, Session
from tests.objects.servers import serving

STATE_BYTES = 400_000_000
TENSORS = 100

TARGETS = {  # figure: (what is measured, over what, bound)
    "async_stall_over_torch_save_fsync": ("async stall", "torch.save + fsync", 0.25),
    "async_stall_over_dcp_async_save": ("async stall", "dcp.async_save stall", 0.6),
    "durable_save_over_raw_write_fsync": ("durable save", "raw write + fsync", 1.25),
    "verified_load_over_torch_load": ("verified load", "torch.load", 1.3),
}
UPLOAD_TARGET = 0.95
MEMORY_TARGETS = {"async": 1.1, "sync": 0.1}


def make_state() -> dict[str, Any]:
    """Large tensors, as weights and moments are, and a few small things."""
    side = STATE_BYTES // 4 // TENSORS
    tensors = {f"layer.{number}": torch.randn(side) for number in range(TENSORS)}
    return {"tensors": tensors, "counts": [torch.tensor(float(number)) for number in range(TENSORS)], "step": 1}


class Disk:
    """The measured operations that end on the disk.

    Each that writes removes what it wrote last time just before: pages that were freed a moment ago cost less than
    those that a virtual machine has to ask its host for, and each shall find the same.
    """

    def __init__(self, directory: Path, state: dict[str, Any]) -> None:
        self.directory = directory
        self.state = state
        self.step = 0
        self.session = Session.start(
            environ={}, default_dir=directory / "run", settings=CheckpointSettings(keep_last=2, asynchronous=True)
        )
        self.session.resume()
        self.saver = StateSaver(self.session)
        self._save_with_torch()
        self.bytes = (directory / "plain.pt").read_bytes()

    def close(self) -> None:
        self.session.close()

    def _next(self) -> int:
        self.step += 1
        return self.step

    def _save_with_torch(self) -> None:
        with (self.directory / "plain.pt").open("wb") as file:
            torch.save(self.state, file)
            file.flush()
            os.fsync(file.fileno())

    def torch_save_fsync(self) -> float:
        (self.directory / "plain.pt").unlink()
        return timed(self._save_with_torch)

    def raw_write_fsync(self) -> float:
        path = self.directory / "raw"

        def write() -> None:
            with path.open("wb") as file:
                file.write(self.bytes)
                file.flush()
                os.fsync(file.fileno())

        path.unlink(missing_ok=True)
        return timed(write)

    def async_stall(self) -> float:
        seconds = timed(lambda: self.saver.save(self.state, step=self._next(), epoch=0))
        self.session.finish_save()
        return seconds

    def dcp_stall(self) -> float:
        pending: list[Any] = []
        target = self.directory / "dcp"
        seconds = timed(lambda: pending.append(dcp.async_save(self.state, checkpoint_id=str(target))))
        pending[0].result()
        return seconds

    def durable_save(self) -> float:
        shutil.rmtree(self.directory / "store", ignore_errors=True)
        store = PosixStore(self.directory / "store")
        _, fence = take_over(store, attempt=0)
        return timed(lambda: store.commit(fence, partial(torch.save, self.state), step=1, epoch=0, world_size=1))

    def hash(self) -> float:
        """What no durable save and no verified load can be faster than."""
        return timed(lambda: hashlib.sha256(self.bytes).digest())

    def torch_load(self) -> float:
        path = self.directory / "plain.pt"
        make_cold(path)
        return timed(lambda: torch.load(path, weights_only=True))

    def verified_load(self) -> float:
        for path in (self.directory / "store").glob("*.ckpt"):
            make_cold(path)

        def load() -> None:
            found = PosixStore(self.directory / "store").find(load=partial(torch.load, weights_only=True))
            assert found is not None
            assert found.loaded.keys() == self.state.keys()

        return timed(load)


def make_cold(path: Path) -> None:
    """Drop a file from the page cache, once it was in it: the load finds pages that were freed a moment ago."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(operation: Callable[[], object]) -> float:
    os.sync()  # what was written before is not this one's burden
    begin = time.perf_counter()
    operation()
    return time.perf_counter() - begin


def measure_disk(directory: Path, rounds: int) -> dict[str, list[float]]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # dcp wants one
    disk = Disk(directory, make_state())
    operations = {
        "torch.save + fsync": disk.torch_save_fsync,
        "async stall": disk.async_stall,
        "dcp.async_save stall": disk.dcp_stall,
        "raw write + fsync": disk.raw_write_fsync,
        "durable save": disk.durable_save,
        "SHA-256 from memory": disk.hash,
        "torch.load": disk.torch_load,
        "verified load": disk.verified_load,
    }
    seconds = take_turns(operations, rounds)
    disk.close()
    dist.destroy_process_group()
    return seconds


def take_turns(operations: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each operation, without its first time."""
    seconds = defaultdict(list)
    for number in range(rounds + 1):
        for name, operation in operations.items():
            took = operation()
            if number:
                seconds[name].append(took)
    return seconds


def measure_uploads(directory: Path, rounds: int) -> dict[str, list[float]]:
    """The upload within a commit, and what s3fs alone takes for the same bytes on the same server."""
    state = make_state()
    plain = directory / "plain.pt"
    torch.save(state, plain)
    with serving("rclone", directory) as server:
        bucket = server.new_bucket()
        store = ObjectStore(f"s3://{bucket}/run", storage_options=server.storage_options, scratch=directory / "scratch")
        _, fence = take_over(store, attempt=0)
        files = server.files()
        steps = iter(range(1, rounds + 2))

        def upload() -> float:
            at: dict[str, float] = {}

            def note(operation: str) -> None:
                if operation == "data-upload":
                    os.sync()
                at[operation] = time.perf_counter()

            write = partial(torch.save, state)
            manifest = store.commit(fence, write, step=next(steps), epoch=0, world_size=1, trace=note)
            files.rm_file(f"{bucket}/run/{manifest.files[0].name}")
            return at["manifest-put"] - at["data-upload"]

        def put_file() -> float:
            seconds = timed(lambda: files.put_file(str(plain), f"{bucket}/plain"))
            files.rm_file(f"{bucket}/plain")
            return seconds

        return take_turns({"upload": upload, "s3fs put_file": put_file}, rounds)


def extra_memory(kind: str, directory: Path) -> float:
    """Of one save, in a process of its own."""
    command = [sys.executable, __file__, "--memory", kind, "--directory", str(directory)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def save_and_tell_memory(kind: str, directory: Path) -> float:
    session = Session.start(
        environ={}, default_dir=directory / kind, settings=CheckpointSettings(asynchronous=kind == "async")
    )
    session.resume()
    saver = StateSaver(session)
    saver.save({"warm": torch.ones(1)}, step=1, epoch=0)  # what is imported or started once
    session.finish_save()
    state = make_state()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _memory("VmRSS")
    for step in (2, 3):
        saver.save(state, step=step, epoch=0)
    session.finish_save()
    peak = _memory("VmHWM")
    session.close()
    return (peak - before) / STATE_BYTES


def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}")


def figure(value: float, target: float, *, least: bool = False) -> dict[str, Any]:
    return {"value": round(value, 3), "target": target, "ok": value >= target if least else value <= target}


def main(argv: list[str]) -> int:
    """Print a table, or with --json one object of figures; exit code 1 when a figure misses its target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, help="where to write; on a real disk")
    parser.add_argument("--memory", choices=MEMORY_TARGETS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.memory:
        print(save_and_tell_memory(options.memory, options.directory))
        return 0
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        for part in ("disk", "objects", "memory"):
            (directory / part).mkdir()
        memory = {kind: extra_memory(kind, directory / "memory") for kind in MEMORY_TARGETS}
        seconds = measure_disk(directory / "disk", options.rounds)
        seconds |= measure_uploads(directory / "objects", options.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    figures = {name: figure(medians[ours] / medians[other], bound) for name, (ours, other, bound) in TARGETS.items()}
    figures["upload_speed_over_s3fs_put_file"] = figure(
        medians["s3fs put_file"] / medians["upload"], UPLOAD_TARGET, least=True
    )
    for kind, bound in MEMORY_TARGETS.items():
        figures[f"extra_memory_{kind}_over_state"] = figure(memory[kind], bound)
    if options.json:
        print(json.dumps(figures))
    else:
        show(seconds, figures)
    return 0 if all(entry["ok"] for entry in figures.values()) else 1


def show(seconds: dict[str, list[float]], figures: dict[str, dict[str, Any]]) -> None:
    print(f"{'':<24} {'median':>9} {'fastest':>9} {'slowest':>9}")
    for name, values in seconds.items():
        print(f"{name:<24} {statistics.median(values):>7.3f} s {min(values):>7.3f} s {max(values):>7.3f} s")
    print()
    for name, entry in figures.items():
        sign = "≥" if "speed" in name else "≤"
        print(f"{name:<36} {entry['value']:<7} target {sign} {entry['target']:<5} {'ok' if entry['ok'] else 'MISSED'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the ranks of a run use on this node, as JSON lines (`orch top`). Reads /proc and nvidia-smi, changes nothing.

    python -m orchestrator.worker.observe RUN_DIR --interval SECONDS

One line per rank, then one that ends the sample; each short enough to reach srun in one piece. It ends with the run's
agent, with SIGTERM, and when standard input ends or falls silent: a step is not told when its srun was killed (22.05).
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.worker.node import node_name
from orchestrator.worker.ranks import Process, by_rank, environ_of, processes_of
from orchestrator.worker.scheduler import run_command

LEASE_S = 20.0
"""How long standard input may be silent; whoever looks writes a byte at least twice in that time."""

_FIRST_S = 0.5  # between the two looks that the first CPU figure needs
_COMING_UP_S = 30.0  # an agent that is not there yet may still come up
_SMI_S = 5.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


# --- GPUs (pure but for `ask_gpus`) -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Gpu:
    """One GPU of the node and who computes on it: pid → bytes (None where the driver does not say)."""

    index: int
    utilization: int | None
    processes: Mapping[int, int | None] = field(default_factory=dict)


def parse_gpus(gpus: str, apps: str) -> list[Gpu]:
    """From nvidia-smi's answers to the two queries of `ask_gpus` (MiB). Lines of any other shape are left out."""
    users: dict[str, dict[int, int | None]] = {}
    for pid, uuid, memory in _rows(apps, 3):
        if pid.isdigit():
            users.setdefault(uuid, {})[int(pid)] = int(memory) * 2**20 if memory.isdigit() else None
    return [
        Gpu(int(index), int(used) if used.isdigit() else None, users.get(uuid, {}))
        for index, uuid, used in _rows(gpus, 3)
        if index.isdigit()
    ]


def _rows(text: str, columns: int) -> Iterable[list[str]]:
    rows = ([cell.strip() for cell in line.split(",")] for line in text.splitlines())
    return (row for row in rows if len(row) == columns)


def ask_gpus() -> list[Gpu]:
    """The GPUs of this node; none without nvidia-smi, or when it does not answer in time."""
    answers = []
    for query in ("--query-gpu=index,uuid,utilization.gpu", "--query-compute-apps=pid,gpu_uuid,used_memory"):
        code, output = run_command(["nvidia-smi", query, "--format=csv,noheader,nounits"], _SMI_S)
        if code != 0:
            return []
        answers.append(output)
    return parse_gpus(*answers)


# --- processes --------------------------------------------------------------------------------------------------------
def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


class Meter:
    """CPU of groups of processes between two looks."""

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        self._at = time.monotonic()

    def look(self, pids: Iterable[int]) -> dict[int, float]:
        """Percent of one CPU per pid since the last look; 0 for one not seen before."""
        now, seen = time.monotonic(), {pid: _cpu_seconds(pid) for pid in pids}
        passed = max(now - self._at, 1e-3)
        used = {pid: max(0.0, cpu - self._seen.get(pid, cpu)) * 100 / passed for pid, cpu in seen.items()}
        self._seen, self._at = seen, now
        return used


def rank_line(node: str, rank: int | None, members: list[Process], cpu: Mapping[int, float], gpus: list[Gpu]) -> Any:
    """What one rank uses, with everything it has started (data loaders)."""
    pids = [process.pid for process in members]
    mine = [(gpu, [gpu.processes[pid] for pid in pids if pid in gpu.processes]) for gpu in gpus]
    return {
        "kind": "rank",
        "node": node,
        "rank": rank,
        "pid": pids[0],
        "processes": len(pids),
        "cpu_percent": round(sum(cpu.get(pid, 0.0) for pid in pids), 1),
        "rss_bytes": sum(_resident_bytes(pid) for pid in pids),
        "gpus": [
            {"index": gpu.index, "percent": gpu.utilization, "bytes": sum(used or 0 for used in memory)}
            for gpu, memory in mine
            if memory
        ],
    }


def agent_of(run_dir: Path, node: str) -> int | None:
    """pid of the run's agent on this node (srun carries the same words on its command line, but not in that place)."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if words[1:3] != [b"-m", b"orchestrator.worker.agent"] or words[4:5] != [os.fsencode(run_dir)]:
            continue
        pid = int(entry.name)
        if words[3] == b"local" or (words[3] == b"node" and environ_of(pid).get("SLURMD_NODENAME") == node):
            return pid
    return None


# --- the stream -------------------------------------------------------------------------------------------------------
class Observer:
    """Samples until its end has come."""

    def __init__(self, run_dir: Path, node: str, interval_s: float) -> None:
        self.run_dir, self.node, self.interval_s = run_dir, node, interval_s
        self.heard_at = self.began_at = time.monotonic()
        self.agent_seen = False
        self.meter = Meter()

    def run(self) -> None:
        """Block until the agent, the reader or the listener is gone."""
        self.meter.look(process.pid for process in processes_of(str(self.run_dir), self.node))
        pause_s = min(_FIRST_S, self.interval_s)
        while self._listen(pause_s) and self._agent_lives():
            for line in self.sample():
                print(json.dumps(line, separators=(",", ":")), flush=True)
            pause_s = self.interval_s

    def sample(self) -> list[dict[str, Any]]:
        """One line per rank, and the end of the sample."""
        ranks = by_rank(processes_of(str(self.run_dir), self.node))
        cpu = self.meter.look(process.pid for members in ranks.values() for process in members)
        gpus = ask_gpus()
        lines = [rank_line(self.node, rank, ranks[rank], cpu, gpus) for rank in sorted(ranks, key=lambda r: r or 0)]
        return [*lines, {"kind": "end", "node": self.node, "ranks": len(lines), "time": time.time()}]

    def _listen(self, seconds: float) -> bool:
        """Pass the time; False once standard input has ended, or has been silent for too long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            ready, _, _ = select.select([0], [], [], left)
            if ready:
                if os.read(0, 4096) == b"":
                    return False
                self.heard_at = time.monotonic()
        return time.monotonic() - self.heard_at < LEASE_S + self.interval_s

    def _agent_lives(self) -> bool:
        alive = agent_of(self.run_dir, self.node) is not None
        self.agent_seen = self.agent_seen or alive
        return alive or (not self.agent_seen and time.monotonic() - self.began_at < _COMING_UP_S)


def main(argv: list[str] | None = None) -> int:
    """See the module's docstring."""
    # A drill signals all steps of a job, this one, too: it is not meant.
    for signum in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    parser = argparse.ArgumentParser(prog="orch-observe")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--interval", type=float, default=2.0)
    arguments = parser.parse_args(argv)
    try:
        Observer(arguments.run_dir, node_name(os.environ), arguments.interval).run()
    except BrokenPipeError:  # nobody reads any more
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())

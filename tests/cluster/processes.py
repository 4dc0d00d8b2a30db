"""Processes of a run on this machine, which is all of the test cluster's nodes at once."""

from __future__ import annotations

from pathlib import Path


def pythons(marker: str) -> list[int]:
    """pids of the Python processes whose command line contains `marker` (srun carries the agent's, too)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
            if "python" in words[0] and marker in " ".join(words):
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return found


def of_run(run: str, program: str = "") -> list[int]:
    """PID 1, torchrun and the ranks of a run, in a container or not; only ranks that run `program` if it is given."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes().split(b"\0")
            words = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has just ended, or is not ours
            continue
        ours = f"ORCH_RUN_ID={run}".encode() in environment or any(f"/{run}." in word for word in words)
        is_rank = program in words[1:] and any(entry.startswith(b"RANK=") for entry in environment)
        if ours and (is_rank or not program):
            found.append(int(directory.name))
    return found


def commands(*words: str) -> list[int]:
    """Processes with exactly this command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if tuple(path.read_text().split("\0")[:-1]) == words:
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return found


def agents(run_dir: Path) -> list[int]:
    """The agents of a run, one on each of its nodes."""
    found = pythons(f"orchestrator.worker.agent node {run_dir}")
    return [pid for pid in found if not _is_child_of(pid, found)]  # until it execs, a child looks like its agent


def _is_child_of(pid: int, others: list[int]) -> bool:
    try:
        return parent(pid) in others
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return True


def parent(pid: int) -> int:
    """pid of the process that started `pid`."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

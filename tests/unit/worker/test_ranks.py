"""Whose processes are whose, and a command beside a rank. Real processes: /proc is the interface."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.worker import ranks
from orchestrator.worker.ranks import Process, by_rank, own_process, processes_of
from tests.polling import poll

CHILD = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"


@pytest.fixture
def run_dir() -> str:
    return f"/runs/test-{uuid.uuid4().hex[:10]}"


@pytest.fixture
def rank(run_dir: str) -> Iterator[subprocess.Popen[bytes]]:
    """Rank 3 of a run on node `a`, with a child as a data loader is one."""
    environ = {**os.environ, "ORCH_RUN_DIR": run_dir, "ORCH_NODE": "a", "RANK": "3", "SECRET": "x=y z"}
    process = subprocess.Popen([sys.executable, "-c", CHILD], env=environ, start_new_session=True)
    poll(lambda: len(processes_of(run_dir, "a")) == 2, "both processes")
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_each_rank_has_its_own_process_first_and_torchrun_is_none_of_them() -> None:
    torchrun, one, two, loader = Process(10, 1, None), Process(11, 10, 1), Process(12, 10, 0), Process(9, 11, 1)
    assert by_rank([loader, torchrun, one, two]) == {1: [one, loader], 0: [two]}
    assert by_rank([torchrun, Process(13, 10, None)]) == {None: [torchrun, Process(13, 10, None)]}
    assert by_rank([]) == {}


def test_processes_are_found_by_directory_and_node(run_dir: str, rank: subprocess.Popen[bytes]) -> None:
    members = by_rank(processes_of(run_dir, "a"))[3]
    assert members[0].pid == rank.pid == own_process(run_dir, "a", 3)
    assert own_process(run_dir, "b", 3) is None
    assert own_process(run_dir, "a", 0) is None


def beside(run_dir: str, *command: str, leash: str = "-", rank: str = "3") -> list[str]:
    return [sys.executable, ranks.__file__, run_dir, "a", rank, "/", leash, *command]


def test_a_command_has_the_ranks_environment_and_is_not_taken_for_it(
    run_dir: str, rank: subprocess.Popen[bytes]
) -> None:
    program = "import os, sys; print(os.getcwd(), os.environ['SECRET'], os.environ['RANK']); input(); sys.exit(9)"
    argv = beside(run_dir, sys.executable, "-uc", program)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "/ x=y z 3\n"
        assert len(processes_of(run_dir, "a")) == 2
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(60) == 9


@pytest.mark.parametrize(
    "program",
    [
        "trap '' HUP; sleep 60 >/dev/null & echo $!",
        # Without its environment: as it looks for a moment while it becomes another program.
        "env -i sleep 60 >/dev/null & echo $!",
        "trap '' HUP; setsid sh -c 'env -i sleep 60 >/dev/null & echo $!' & wait",
    ],
)
def test_what_a_command_leaves_running_is_ended_with_it(
    run_dir: str, rank: subprocess.Popen[bytes], program: str
) -> None:
    done = subprocess.run(
        beside(run_dir, "sh", "-c", program),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert not Path(f"/proc/{int(done.stdout)}").exists()


@pytest.mark.parametrize("end", ["leash", "SIGTERM", "SIGHUP"])
def test_it_ends_with_its_leash_and_when_it_is_told_to_but_not_with_a_drill(
    run_dir: str, rank: subprocess.Popen[bytes], tmp_path: Path, end: str
) -> None:
    leash = tmp_path / "leash"
    os.mkfifo(leash)
    held = os.open(leash, os.O_RDWR)
    argv = beside(run_dir, "sh", "-c", "echo up; sleep 60", leash=str(leash))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGUSR1)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        if end == "leash":
            os.close(held)
        else:
            process.send_signal(signal.Signals[end])
        assert process.wait(60) > 128
    if end != "leash":
        os.close(held)
    assert not leash.exists()


@pytest.mark.parametrize(("rank", "command", "code"), [("7", "true", 3), ("3", "/nonexistent", 127), ("3", "/", 126)])
def test_what_cannot_be_started_is_told(
    run_dir: str, rank: str, command: str, code: int, request: pytest.FixtureRequest
) -> None:
    environ = {**os.environ, "ORCH_RUN_DIR": run_dir, "ORCH_NODE": "a", "RANK": "3"}
    with subprocess.Popen(["sleep", "60"], env=environ) as sleeper:
        poll(lambda: own_process(run_dir, "a", 3) is not None, "the rank")
        done = subprocess.run(beside(run_dir, command, rank=rank), capture_output=True, timeout=120, check=False)
        sleeper.kill()
    assert done.returncode == code
    assert done.stderr.startswith(b"orch: ")

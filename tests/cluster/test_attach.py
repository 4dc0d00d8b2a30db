"""`orch shell` and `orch top`: beside a running job, which must not notice, and nothing of them may stay behind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.handle import Cluster
from tests.cluster.orch import Orch
from tests.cluster.programs import said, script_spec
from tests.cluster.service import ClusterError

SECRET = "s3cret-of-the-job"
RUNTIMES = ["none", "docker"]


def spec_for(orch: Orch, runtime: str, **changes: Any) -> dict[str, Any]:
    container = {"runtime": "docker", "image": orch.cluster.image} if runtime == "docker" else {"runtime": "none"}
    # A run id of its own: the same run may run in another cluster of this machine.
    return script_spec(orch, container=container, env={"WHERE": str(orch.directory)}, **changes)


def finish(orch: Orch, run: str, *, attempts: int = 1) -> None:
    """End the run: every step was made exactly once, by as many attempts as told."""
    orch.wait_for_step(run, orch.step(run) + 3, attempt=attempts - 1)
    (orch.run_dir(run) / "enough").touch()
    orch.wait_for_state(run, "completed", timeout=60)
    steps = [int(step) for _, step, _ in said(orch, run)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(orch.attempts(run)) == attempts
    assert orch.cluster.containers() == []


def processes(*markers: str) -> list[str]:
    """Command lines that contain one of the markers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            line = path.read_text().replace("\0", " ")
            if int(path.parent.name) != os.getpid() and any(marker in line for marker in markers):
                found.append(line)
    return found


def assert_nothing_left(orch: Orch, run: str, *markers: str) -> None:
    programs = ("worker.observe", "worker.enter", "worker/ranks.py")
    ours = (*(f"{program} {orch.run_dir(run)}" for program in programs), *markers)
    try:
        orch.cluster.wait("all of it to be gone", lambda: not processes(*ours), timeout=120)
    except ClusterError:
        pytest.fail(f"left behind: {processes(*ours)}")
    assert not list(Path(f"/dev/shm/orch-{os.getuid()}").glob(f"{run}.*/shell-*"))


def sleep_of_this_test() -> str:
    """A command that no other process of this machine has."""
    return f"sleep 30{time.time_ns() % 10**9}"


@pytest.fixture
def running(orch: Orch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A running job of (runtime, backend), without torchrun: its start would take longer than all the rest."""
    runtime, backend = request.param
    job = {"command": ["python3" if runtime == "docker" else sys.executable, "train.py"]}
    spec = spec_for(orch, runtime, backend=backend, job=job, secrets=["TOKEN"])
    run = orch.submit(spec, env={"TOKEN": SECRET})["run_id"]
    orch.wait_for_step(run, 3)
    yield run
    if orch.status(run)["alive"]:
        orch.call("cancel", run)


everywhere = pytest.mark.parametrize(
    "running", [(runtime, backend) for runtime in RUNTIMES for backend in ("slurm", "local")], indirect=True, ids=str
)


@everywhere
def test_a_command_and_a_look_beside_a_running_job(orch: Orch, running: str) -> None:
    program = "echo $ORCH_RUN_ID $TOKEN; pwd; id -u; cat; exit 7"
    done = orch.call("shell", running, "--", "sh", "-c", program)
    assert done.returncode == 7, done.stderr
    code = json.loads((orch.run_dir(running) / "plan" / "agent.json").read_text())["code_dir"]
    assert done.stdout.splitlines() == [f"{running} {SECRET}", code, str(os.getuid())]
    # None of the machines between splits or expands a word.
    assert orch.call("shell", running, "--", "printf", "%s|", "a b", "$HOME", "*", "").stdout == "a b|$HOME|*||"

    usage = orch.json("top", running, "--once")
    (rank,) = usage["ranks"]
    assert (usage["run_id"], usage["attempt"], usage["silent"]) == (running, 0, [])
    assert usage["limit_bytes"] == 500 * 2**20
    assert (rank["rank"], rank["processes"]) == (0, 1)
    assert rank["rss_bytes"] > 5_000_000
    assert "train.py" in Path(f"/proc/{rank['pid']}/cmdline").read_text()

    assert_nothing_left(orch, running)
    finish(orch, running)
    for path in orch.run_dir(running).rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("running", [("docker", "slurm")], indirect=True, ids=str)
def test_the_files_are_the_containers_and_input_reaches_the_command(orch: Orch, running: str) -> None:
    state = {"XDG_STATE_HOME": str(orch.directory / "state")}
    argv = [sys.executable, "-m", "orchestrator", "shell", running, "--", "sh", "-c", "cat; ls -d /.dockerenv"]
    done = orch.cluster.run(*argv, env=state, cwd=orch.directory, stdin="some input\n", check=False)
    assert (done.returncode, done.stdout) == (0, "some input\n/.dockerenv\n"), done.stderr
    table = orch.call("top", running).stdout
    assert table.splitlines()[1].split() == ["RANK", "NODE", "PID", "PROCESSES", "CPU", "MEMORY", "OF", "LIMIT", "GPU"]
    finish(orch, running)


class Terminal:
    """`orch` on a terminal of its own, as a person sees it."""

    def __init__(self, orch: Orch, *arguments: str) -> None:
        self.text = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(orch.directory)
            environ = {**orch.cluster.env, "XDG_STATE_HOME": str(orch.directory / "state"), "TERM": "xterm"}
            os.execve(sys.executable, [sys.executable, "-m", "orchestrator", *arguments], environ)

    def until(self, words: str, timeout: float = 120) -> str:
        end = time.monotonic() + timeout
        while words not in self.text:
            assert time.monotonic() < end, f"no {words!r} in {self.text!r}"
            if select.select([self.fd], [], [], 0.5)[0]:
                try:
                    data = os.read(self.fd, 65536)
                except OSError:  # the other side has ended
                    data = b""
                assert data, f"it ended without {words!r}: {self.text!r}"
                self.text += data.decode(errors="replace")
        return self.text

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self, timeout: float = 120) -> int:
        """Exit code, once it has ended."""
        until = time.monotonic() + timeout
        while True:
            if select.select([self.fd], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    self.text += os.read(self.fd, 65536).decode(errors="replace")
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < until, f"it does not end: {self.text!r}"


@pytest.mark.parametrize(
    "running", [("none", "slurm"), ("docker", "slurm"), ("docker", "local")], indirect=True, ids=str
)
def test_a_shell_on_a_terminal(orch: Orch, running: str) -> None:
    terminal = Terminal(orch, "shell", running)
    terminal.until("the job goes on")
    terminal.type("echo run=$ORCH_RUN_ID tty=$(tty | cut -c1-5)\n")
    terminal.until(f"run={running} tty=/dev/")
    sleeping = sleep_of_this_test()
    terminal.type(f"{sleeping} &\n")
    terminal.type("exit 5\n")
    assert terminal.end() == 5, terminal.text
    assert_nothing_left(orch, running, sleeping)
    finish(orch, running)


@pytest.mark.parametrize("running", [(runtime, "slurm") for runtime in RUNTIMES], indirect=True, ids=str)
@pytest.mark.parametrize("name", ["SIGHUP", "SIGKILL"])
def test_a_shell_whose_terminal_dies_leaves_nothing_behind(orch: Orch, running: str, name: str) -> None:
    terminal = Terminal(orch, "shell", running)
    sleeping = sleep_of_this_test()
    terminal.type(f"{sleeping}; true\n")
    orch.cluster.wait("the command to run", lambda: processes(sleeping))
    os.close(terminal.fd)  # a window that is closed: SIGHUP to all that runs in it
    os.kill(terminal.pid, signal.Signals[name])
    os.waitpid(terminal.pid, 0)
    assert_nothing_left(orch, running, sleeping)
    finish(orch, running)


@pytest.mark.parametrize("running", [(runtime, "slurm") for runtime in RUNTIMES], indirect=True, ids=str)
def test_a_drill_spares_the_shell_and_is_not_delayed_by_it(orch: Orch, running: str) -> None:
    terminal = Terminal(orch, "shell", running)
    terminal.until("the job goes on")
    terminal.type("echo up=$((40 + 2))\n")
    terminal.until("up=42")
    done = orch.call("preempt", running, "--verify", "--json", timeout=120)
    shown = json.loads(done.stdout)
    assert (done.returncode, shown["reasons"]) == (0, []), shown
    assert shown["grace_used_s"] < shown["grace_s"] / 2
    terminal.end()  # its job has ended
    assert_nothing_left(orch, running)
    finish(orch, running, attempts=2)


# Every rank keeps a CPU busy in a child of its own, as a data loader does.
BUSY = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
open(os.environ["ORCH_RUN_DIR"] + "/up-" + os.environ["RANK"], "w").close()
child.wait()
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_two_nodes_with_two_ranks_each(orch: Orch, cluster: Cluster, runtime: str) -> None:
    spec = spec_for(
        orch,
        runtime,
        resources={"nodes": 2, "mem": "1G", "time": "00:10:00"},
        torchrun={"nproc_per_node": 2},
    )
    (orch.directory / "code" / "train.py").write_text(BUSY)
    run = orch.submit(spec)["run_id"]
    cluster.wait("four ranks", lambda: len(list(orch.run_dir(run).glob("up-*"))) == 4, timeout=200)
    usage = orch.json("top", run, "--once")
    assert [use["rank"] for use in usage["ranks"]] == [0, 1, 2, 3]
    by_node: dict[str, list[int]] = {}
    for use in usage["ranks"]:
        by_node.setdefault(use["node"], []).append(use["rank"])
        assert use["processes"] == 2
        assert use["cpu_percent"] > 5  # of the two there are, with four that want one
    assert sorted(by_node) == sorted(orch.attempts(run)[0]["nodes"])
    assert [len(ranks) for ranks in by_node.values()] == [2, 2]
    far = usage["ranks"][3]
    done = orch.call("shell", run, "--rank", "3", "--", "sh", "-c", "echo $RANK $ORCH_RUN_ID $ORCH_NODE")
    assert done.stdout == f"3 {run} {far['node']}\n", done.stderr
    missing = orch.call("shell", run, "--rank", "9", "--", "true")
    assert missing.returncode == 3
    assert "has no rank 9" in missing.stderr
    assert_nothing_left(orch, run)
    orch.json("cancel", run)
    orch.wait_for_state(run, "cancelled", timeout=60)


@pytest.mark.parametrize("running", [("docker", "slurm"), ("none", "local")], indirect=True, ids=str)
def test_top_on_a_terminal_lives_through_a_drill_of_its_job_and_ends_with_the_attempt(orch: Orch, running: str) -> None:
    terminal = Terminal(orch, "top", running, "--interval", "0.5s")
    terminal.until("PROCESSES")
    done = orch.call("preempt", running, "--verify", "--json", timeout=120)
    shown = json.loads(done.stdout)
    assert (done.returncode, shown["reasons"]) == (0, []), shown
    if "." in orch.status(running)["job_id"]:  # local
        terminal.until("attempt 1")  # the same agent starts again, and is looked at on
        terminal.type("\x03")
    assert terminal.end() == 0, terminal.text
    assert_nothing_left(orch, running)
    finish(orch, running, attempts=2)


@pytest.mark.parametrize("running", [("docker", "slurm")], indirect=True, ids=str)
def test_ctrl_c_ends_top_and_nothing_else(orch: Orch, running: str) -> None:
    terminal = Terminal(orch, "top", running)
    terminal.until("PROCESSES")
    terminal.type("\x03")
    assert terminal.end() == 0, terminal.text
    assert_nothing_left(orch, running)
    finish(orch, running)


@pytest.mark.parametrize("victim", ["orch", "srun"])
@pytest.mark.parametrize("running", [("none", "slurm")], indirect=True, ids=str)
def test_a_killed_top_leaves_no_observer_on_the_nodes(orch: Orch, running: str, victim: str) -> None:
    terminal = Terminal(orch, "top", running)
    terminal.until("PROCESSES")
    if victim == "orch":
        os.kill(terminal.pid, signal.SIGKILL)
    else:
        children = Path(f"/proc/{terminal.pid}/task/{terminal.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
    terminal.end()
    assert_nothing_left(orch, running)
    finish(orch, running)


def test_a_run_that_is_not_running_has_no_inside(orch: Orch) -> None:
    run = orch.submit(script_spec(orch, slurm={"partition": "low", "extra_sbatch": {"hold": True}}))["run_id"]
    for arguments in (["shell", run, "--", "true"], ["top", run, "--once"]):
        done = orch.call(*arguments)
        assert done.returncode == 3
        assert "needs a running job" in done.stderr
    orch.json("cancel", run)

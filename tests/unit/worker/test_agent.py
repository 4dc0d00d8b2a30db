"""The host side of an attempt with a payload that is no process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.containers.payload import Payload, PayloadRequest
from orchestrator.errors import ContainerError
from orchestrator.files import write_json
from orchestrator.operations.submission import start_files
from orchestrator.paths import RunPaths
from orchestrator.plan import render_plan
from orchestrator.registry import read_events
from orchestrator.spec import parse_spec
from orchestrator.states import ExitReason
from orchestrator.worker import agent as agent_module
from orchestrator.worker import node_agent
from orchestrator.worker.decision import UNUSED
from orchestrator.worker.node import NodeDirectory
from orchestrator.worker.node_agent import NodeAgent, Place, hold_stop_signals, run_node, step_cpus
from orchestrator.worker.scheduler import LocalScheduler, Notice


class EndedPayload:
    """A program that has ended, in an engine that fails afterwards."""

    def __init__(self, code: int, early: str = "") -> None:
        self.code, self.early = code, early

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None: ...

    def close(self) -> None:
        raise ContainerError("cannot remove container 0123")

    def early_output(self) -> str:
        return self.early

    def out_of_memory(self) -> bool:
        return False

    def describe(self) -> dict[str, object]:
        return {}


class EndedRuntime:
    name = "none"

    def __init__(self, code: int, early: str = "") -> None:
        self.code, self.early = code, early

    def remove_leftovers(self, run_dir: str, node: str, before_attempt: int) -> Sequence[str]:
        return ()

    def prepare(self, request: PayloadRequest) -> None: ...

    def start(self, request: PayloadRequest) -> Payload:
        return EndedPayload(self.code, self.early)


def make_agent(directory: Path, code: int = 0, early: str = "") -> NodeAgent:
    spec = parse_spec({"name": "run", "backend": "local", "job": {"command": ["true"]}}, base_dir=directory)
    plan = render_plan(spec, run_id="run-1", root=directory, code_hash="c", library_hash="d", python="python3")
    plan.run_dir.mkdir(parents=True)
    environ: dict[str, Any] = {"ORCH_NODE_DIR": str(directory / "node")}
    (directory / "node").mkdir()
    scheduler = LocalScheduler("1.2", RunPaths(plan.run_dir).tombstone)
    return NodeAgent(plan.agent, Place(0, 0, "n1", 1, "127.0.0.1", None), scheduler, EndedRuntime(code, early), environ)


@pytest.mark.parametrize("code", [0, 75])
def test_an_engine_that_fails_after_the_end_does_not_change_the_end(tmp_path: Path, code: int) -> None:
    agent = make_agent(tmp_path, code)
    assert run_node(agent) == code
    actions = [event["message"] for event in read_events(agent.paths) if event["event"] == "action"]
    assert actions == ["cannot remove container 0123"]


def test_an_image_for_another_processor_is_no_failure_of_the_program(tmp_path: Path) -> None:
    agent = make_agent(tmp_path, 1, "exec /usr/bin/python3: exec format error\n")
    assert run_node(agent) == 1
    verdict = json.loads(agent.paths.node_verdict(0, 0).read_text())
    assert verdict["reason"] == "launch_failure"
    assert "was built for another processor than this node's" in verdict["message"]
    assert "exec format error" in agent.paths.node_log(0, 0).read_text()


def test_a_fault_of_our_own_is_told_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = make_agent(tmp_path)

    def broken(request: PayloadRequest) -> Payload:
        raise KeyError("image_dir")

    agent.runtime.start = broken  # type: ignore[method-assign]
    assert run_node(agent) == 1
    verdict = json.loads(agent.paths.node_verdict(0, 0).read_text())
    assert verdict["message"] == "an error in orch itself: KeyError: 'image_dir'"
    assert "in broken" in capsys.readouterr().err, "where it was, for whoever mends it"


def test_downloads_go_below_the_root_and_where_the_spec_says(tmp_path: Path) -> None:
    agent = make_agent(tmp_path)
    below = {"XDG_CACHE_HOME": "caches", "HF_HOME": "caches/huggingface", "TORCH_HOME": "caches/torch"}
    assert agent._cache_places() == {name: f"{tmp_path}/{place}" for name, place in below.items()}
    agent.orders = {**agent.orders, "env": {"XDG_CACHE_HOME": "/fast"}}
    assert agent._cache_places()["HF_HOME"] == "/fast/huggingface"


def test_a_step_bound_to_some_processors_hands_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 2, 3})
    assert step_cpus() == "2,3,5"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert step_cpus() == ""


def test_a_program_s_last_words_command_no_terminal(tmp_path: Path) -> None:
    """They are quoted by `orch status` and in mails; the log keeps them as they were printed."""
    agent = make_agent(tmp_path, 3)
    log = agent.paths.node_log(0, 0)
    log.parent.mkdir(parents=True)
    log.write_text("\x1b]0;owned\x07\x1b[31mValueError: \x1b[0mno [1m\x1b]52;c;Y3VybA==\x1b\\ größe\x9b2J\x08\n")
    run_node(agent)
    (event,) = [event for event in read_events(agent.paths) if event["event"] == "verdict"]
    assert event["message"].endswith("ends with: ValueError: no [1m größe2J")


@pytest.fixture
def restored_signals() -> Iterator[None]:
    stops = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in stops}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)


def test_a_notice_before_the_agent_is_ready_is_kept(tmp_path: Path, restored_signals: None) -> None:
    hold_stop_signals()
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    agent = make_agent(tmp_path)
    agent.install_signal_handlers()
    assert [signum for signum, _ in agent._signals] == [signal.SIGTERM]


def test_a_notice_that_comes_while_the_scheduler_is_asked_is_passed_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent(tmp_path)
    directory = NodeDirectory(tmp_path / "private", "run.0.n0.1")
    asked: list[float | None] = []

    def why(lead_time_s: float, told: float | None = None) -> Notice:
        if not asked:
            agent.take_notice(signal.SIGTERM)
        asked.append(told)
        return Notice(ExitReason.PREEMPTED, time.time() + lead_time_s)

    monkeypatch.setattr(agent.scheduler, "why", why)
    came = time.time() - 1000
    agent._signals.append((signal.SIGUSR1, came))
    written: list[float] = []
    monkeypatch.setattr(directory, "write_deadline", lambda deadline, cause: written.append(deadline - time.time()))
    while agent._signals:
        agent._pass_on(directory)
    directory.close()
    told = [event["signals"] for event in read_events(agent.paths) if event["event"] == "signalled"]
    assert told == [["SIGUSR1"], ["SIGTERM"]]
    assert asked[0] == came
    assert min(written) > 0, "a deadline in the past would end the program before it can save"


class SlowRuntime(EndedRuntime):
    """Told to stop while it fetches an image."""

    def prepare(self, request: PayloadRequest) -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        threading.Event().wait(60)

    def start(self, request: PayloadRequest) -> Payload:
        raise AssertionError("nothing may start after a notice")


@pytest.mark.parametrize("early", [False, True])
def test_a_notice_while_the_image_is_fetched_ends_the_attempt(
    tmp_path: Path, restored_signals: None, early: bool
) -> None:
    agent = make_agent(tmp_path)
    agent.runtime = SlowRuntime(0)
    agent.install_signal_handlers()
    came = time.time() - 5
    if early:
        agent._signals.append((signal.SIGTERM, came))
    assert run_node(agent) == 75
    (told,) = [event for event in read_events(agent.paths) if event["event"] == "signalled"]
    assert (told["signals"], told["cause"]) == (["SIGTERM"], "preempted")
    assert (told["at"] == came) is early, "the grace begins when the signal comes, not when it is passed on"
    verdict = json.loads(agent.paths.node_verdict(0, 0).read_text())
    assert (verdict["outcome"], verdict["exit_code"]) == (UNUSED, 75)
    agent.take_notice(signal.SIGUSR1)  # a second one, later, raises nothing


@pytest.mark.parametrize("runs", ["command", "torchrun"])
def test_a_peer_without_a_program_cuts_no_command_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: str
) -> None:
    """torchrun cannot have begun without the peer; a command has, and may be saving."""
    agent = make_agent(tmp_path)
    agent.place = replace(agent.place, nodes=2)
    agent.orders = {**agent.orders, "torchrun": None if runs == "command" else {}}
    agent.paths.node_verdict(0, 1).parent.mkdir(parents=True, exist_ok=True)
    write_json(agent.paths.node_verdict(0, 1), {"outcome": UNUSED})
    monkeypatch.setattr(node_agent, "_PEER_GRACE_S", -1.0)
    assert agent._peers_have_failed() is (runs == "torchrun")


def test_two_notices_at_once_do_not_hang_the_agent(tmp_path: Path, restored_signals: None) -> None:
    """Slurm's TERM and the batch script's USR1 come microseconds apart; a lock in the handler would be taken twice."""
    agent = make_agent(tmp_path)
    agent.install_signal_handlers()
    here = threading.get_ident()

    def tell() -> None:
        for _ in range(2000):
            signal.pthread_kill(here, signal.SIGTERM)
            signal.pthread_kill(here, signal.SIGUSR1)

    teller = threading.Thread(target=tell)
    teller.start()
    polls = iter(range(10**9))
    ended = type("Ended", (EndedPayload,), {"poll": lambda self: None if teller.is_alive() or next(polls) < 3 else 0})
    agent._pass_on = lambda directory: agent._signals.clear()  # type: ignore[method-assign]
    assert agent._watch(ended(0), None) == 0  # type: ignore[arg-type]
    teller.join(60)


EAGER = """
import os, signal, sys
from orchestrator.worker import agent

class Book(agent.AttemptBook):
    def open(self, attempt, job_id, nodes):
        super().open(attempt, job_id, nodes)
        if attempt == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

agent.AttemptBook = Book
sys.exit(agent.main(["local", sys.argv[1]]))
"""


def test_a_notice_to_a_later_local_attempt_that_has_just_been_opened_is_kept(tmp_path: Path) -> None:
    """`orch preempt` signals whatever the sidecar calls running; the attempt before must not swallow that."""
    spec = {"name": "run", "backend": "local", "job": {"command": ["sh", "-c", "sleep 1; exit 75"]}}
    spec["preemption"] = {"max_requeues": 1}
    parsed = parse_spec(spec, base_dir=tmp_path)
    plan = render_plan(parsed, run_id="run-1", root=tmp_path, code_hash="c", library_hash="d", python=sys.executable)
    for code in (plan.agent["code_dir"], plan.agent["library_dir"]):
        Path(code).mkdir(parents=True)
    start_files(plan)
    argv = [sys.executable, "-c", EAGER, str(plan.run_dir)]
    (tmp_path / "node").mkdir()
    environ = {**os.environ, "ORCH_NODE_DIR": str(tmp_path / "node")}
    done = subprocess.run(argv, env=environ, timeout=60, capture_output=True, text=True, check=False)
    signalled = [event for event in read_events(RunPaths(plan.run_dir)) if event["event"] == "signalled"]
    assert [(event["attempt"], event["signals"]) for event in signalled] == [(1, ["SIGUSR1"])], done.stderr


@pytest.mark.parametrize(("code", "said"), [(0, b"done\n"), (75, b"done\n"), (1, b""), (137, b"")])
def test_the_script_is_told_of_a_good_end_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: bytes
) -> None:
    """After it other nodes may go on; after any other end, and none at all, srun is not waited for long."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    watcher = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert slurm_node(tmp_path, monkeypatch, code, str(pipe)) == code
    try:
        assert (os.read(watcher, 100) if said else b"") == said
    finally:
        os.close(watcher)


def test_a_pipe_that_is_not_ours_keeps_no_agent_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    real = os.open

    def refuse(path: str, *arguments: int) -> int:
        if path == str(pipe):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    assert slurm_node(tmp_path, monkeypatch, 0, str(pipe)) == 0


def slurm_node(run_dir: Path, monkeypatch: pytest.MonkeyPatch, code: int, pipe: str) -> int:
    """The agent of the first node, without its attempt."""
    monkeypatch.setattr(agent_module, "die_with_parent", lambda: None)
    monkeypatch.setattr(agent_module, "load_orders", lambda run_dir: {"attempt_base": 0})
    monkeypatch.setattr(agent_module.AttemptBook, "open", lambda *_: None)
    monkeypatch.setattr(agent_module, "_run_as", lambda *_: code)
    environ = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NODEID": "0",
        "SLURMD_NODENAME": "n1",
        "SLURM_STEP_NODELIST": "n1",
        "ORCH_ALIVE": pipe,
    }
    return agent_module.node_main(run_dir, environ)

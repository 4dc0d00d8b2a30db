"""PID 1 with real processes: signals, verdicts, leash and deadline. Stdlib programs, so that it takes milliseconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.files import write_json
from orchestrator.states import ExitCode
from orchestrator.worker import launch
from tests.polling import poll

PATIENT = """
import os, signal, sys, time
told = []
for name in ("USR1", "TERM"):
    signal.signal(getattr(signal, "SIG" + name), lambda signum, frame: told.append(signum))
print("ready", flush=True)
while not told:
    time.sleep(0.01)
with open(sys.argv[1] + ".tmp", "w") as out:
    out.write('{"outcome": "%s"}' % sys.argv[2])
os.replace(sys.argv[1] + ".tmp", sys.argv[1])
"""


def test_what_it_cannot_import_it_says_alike() -> None:
    """PID 1 has the standard library only, so the exit codes stand in its file a second time."""
    assert (launch.SAVED, launch.NEVER_RESTART) == (ExitCode.SAVED, ExitCode.NEVER_RESTART)


class Node:
    """The agent's side of PID 1."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.verdict = directory / "verdict.json"
        self.log = directory / "node.log"
        self.deadline = directory / "deadline.json"
        os.mkfifo(directory / "leash", 0o600)
        self.leash: int | None = os.open(directory / "leash", os.O_RDWR | os.O_CLOEXEC)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, program: list[str], **changes: Any) -> None:
        config = {
            "program": program,
            "python": sys.executable,
            "torchrun": None,
            "cwd": str(self.directory),
            "library": str(self.directory / "library"),
            "defaults": {},
            "env": {},
            "signal": "USR1",
            "leash": str(self.directory / "leash"),
            "up": str(self.directory / "up"),
            "deadline_file": str(self.deadline),
            "deadline_slack_s": 0.0,
            "memory_report": str(self.directory / "memory.json"),
            "contained": False,
            "py_spy": str(Path(sys.executable).with_name("py-spy")),
            "node": 0,
            "verdict": str(self.verdict),
            "log_dir": str(self.directory),
            "node_log": str(self.log),
            **changes,
        }
        path = self.directory / "config.json"
        path.write_text(json.dumps(config))
        self.process = subprocess.Popen([sys.executable, launch.__file__, path])

    def order(self, order: bytes) -> None:
        assert self.leash is not None
        os.write(self.leash, order)

    def let_go(self) -> None:
        if self.leash is not None:
            os.close(self.leash)
            self.leash = None

    def exit_code(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=60)

    def ready(self) -> None:
        poll(lambda: self.log.exists() and "ready" in self.log.read_text(), "the program is up")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.let_go()
    if node.process is not None:
        node.process.wait(timeout=60)


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


@pytest.mark.parametrize(("outcome", "code"), [("saved", 75), ("unsaved", 75), ("fenced", 93), ("failed", 1)])
def test_the_verdict_becomes_the_exit_code(node: Node, outcome: str, code: int) -> None:
    node.start(python(PATIENT, str(node.verdict), outcome))
    node.ready()
    node.order(b"U")
    assert node.exit_code() == code


def test_without_a_verdict_the_program_speaks_for_itself(node: Node) -> None:
    node.start(python("raise SystemExit(7)"))
    assert node.exit_code() == 7


def test_a_signalled_program_that_leaves_with_0_has_not_finished(node: Node) -> None:
    node.start(python(PATIENT + "\nos.unlink(sys.argv[1])", str(node.verdict), "saved"))
    node.ready()
    node.order(b"U")
    assert node.exit_code() == 75


def test_a_death_by_signal_is_128_plus_its_number(node: Node) -> None:
    node.start(python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))
    assert node.exit_code() == 128 + signal.SIGSEGV


def test_an_order_given_before_the_handler_is_delivered_later(node: Node) -> None:
    node.order(b"U")
    node.start(python("import time; time.sleep(0.5)\n" + PATIENT, str(node.verdict), "saved"))
    assert node.exit_code() == 75


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_pid_1_itself_is_passed_on(node: Node, signum: int) -> None:
    node.start(python(PATIENT, str(node.verdict), "saved"))
    node.ready()
    assert node.process is not None
    node.process.send_signal(signum)
    assert node.exit_code() == 75


def test_a_program_that_ignores_signals_is_left_to_the_deadline(node: Node) -> None:
    node.start(python("import time; print('ready', flush=True); time.sleep(60)"))
    node.ready()
    node.deadline.write_text(json.dumps({"deadline": time.time() + 0.3}))
    node.order(b"U")
    assert node.exit_code() == launch.KILLED


def test_a_save_whose_process_hangs_afterwards_still_counts(node: Node) -> None:
    node.start(python(PATIENT + "\ntime.sleep(60)", str(node.verdict), "saved"))
    node.ready()
    node.order(b"U")
    poll(node.verdict.exists, "the save")
    write_json(node.deadline, {"deadline": time.time()})  # whole: PID 1 is looking already
    assert node.exit_code() == 75


def grandchildren_program(directory: Path) -> list[str]:
    """A program with a child in a session of its own, as torchrun's workers are, that ignores SIGTERM."""
    stubborn = (
        "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    )
    return python(
        "import subprocess, sys, time\n"
        f"out = open({str(directory / 'pid')!r}, 'w')\n"
        f"subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True, stdout=out)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )


@pytest.mark.parametrize("end", ["leash", "kill order", "program ends"])
def test_nothing_survives_pid_1(node: Node, end: str) -> None:
    program = grandchildren_program(node.directory)
    if end == "program ends":
        wait = f"while not os.path.getsize({str(node.directory / 'pid')!r}): time.sleep(0.02)"
        program[-1] = "import os\n" + program[-1].removesuffix("time.sleep(60)") + wait
    node.start(program)
    node.ready()
    pid = int(poll(lambda: (node.directory / "pid").read_text(), "the grandchild is up"))
    if end == "leash":
        node.let_go()
    elif end == "kill order":
        node.order(b"K")
    assert node.exit_code() == (0 if end == "program ends" else launch.KILLED)
    assert not Path(f"/proc/{pid}").exists()


def test_nothing_survives_a_supervisor_that_fails(node: Node) -> None:
    node.start(grandchildren_program(node.directory))
    node.ready()
    pid = int(poll(lambda: (node.directory / "pid").read_text(), "the grandchild is up"))
    node.deadline.write_text("no JSON")
    node.order(b"U")
    assert node.exit_code() == 1
    assert not Path(f"/proc/{pid}").exists()


def test_a_missing_program_is_told_apart(node: Node) -> None:
    node.start(["/no/such/program"])
    assert node.exit_code() == 127
    assert "cannot start the program" in node.log.read_text()


def test_pid_1_needs_nothing_but_the_standard_library() -> None:
    # -I -S: neither site-packages nor the working directory can be imported from.
    code = f"import runpy; runpy.run_path({launch.__file__!r}, run_name='imported')"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def test_a_worker_writes_its_own_log(tmp_path: Path) -> None:
    argv = [sys.executable, launch.__file__, "--worker", str(tmp_path), sys.executable, "-c", "print('from rank 3')"]
    subprocess.run(argv, env={**os.environ, "RANK": "3"}, check=True)
    assert (tmp_path / "rank-3.log").read_text() == "from rank 3\n"


def test_a_dump_shows_where_the_program_stands_and_disturbs_nothing(node: Node) -> None:
    node.start(python("def standing_still():\n    input_never_comes.wait()\n" + STILL))
    node.ready()
    node.order(b"D")
    stack = node.directory / "stack-node-0.txt"
    poll(lambda: stack.exists() and "standing_still" in stack.read_text(), "the stack")
    assert node.process is not None
    assert node.process.poll() is None


STILL = """
import threading
input_never_comes = threading.Event()
print("ready", flush=True)
standing_still()
"""


def test_a_missing_py_spy_is_said_where_the_stack_would_be(node: Node) -> None:
    node.start(python("import time; print('ready', flush=True); time.sleep(60)"), py_spy="/nowhere/py-spy")
    node.ready()
    node.order(b"D")
    stack = node.directory / "stack-node-0.txt"
    poll(lambda: stack.exists() and "/nowhere/py-spy" in stack.read_text(), "the remark")


def test_a_stack_that_cannot_be_written_kills_nobody(node: Node) -> None:
    """On a full disk, say: a run that was only slow is still to save."""
    (node.directory / "stack-node-0.txt").mkdir()
    node.start(python(PATIENT, str(node.verdict), "saved"))
    node.ready()
    node.order(b"DU")
    assert node.exit_code() == 75
    assert "stack-node-0.txt" in node.log.read_text()


def test_a_memory_report_that_cannot_be_written_changes_no_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cgroup_files(tmp_path, **{"memory.events": "oom_kill 1\n"})
    pid_1 = launch.Launch.__new__(launch.Launch)
    pid_1.memory, pid_1.memory_kills = str(tmp_path), 0
    pid_1.config = {"memory_report": str(tmp_path / "nowhere" / "memory.json")}
    pid_1._run = lambda: launch.SAVED  # type: ignore[method-assign]
    assert pid_1.run() == launch.SAVED
    assert "nowhere" in capsys.readouterr().err


def test_a_machine_without_cgroups_and_odd_names_of_cgroups_keep_nobody_from_starting(tmp_path: Path) -> None:
    assert launch.memory_cgroup(False, str(tmp_path), str(tmp_path / "nowhere")) is None
    (tmp_path / "listing").write_bytes("0::/système/\udcff\n".encode(errors="surrogateescape"))
    assert launch.memory_cgroup(False, str(tmp_path), str(tmp_path / "listing")) is None


def cgroup_files(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(content)


def test_the_memory_cgroup_is_our_own_and_never_the_whole_machines(tmp_path: Path) -> None:
    two = "0::/slurm/job_7\n"
    one = "9:memory:/docker/abc\n4:cpu,cpuacct:/\n1:name=systemd:/x\n0::/\n"
    listing = tmp_path / "cgroup"

    def found(text: str, *, contained: bool) -> str | None:
        listing.write_text(text)
        return launch.memory_cgroup(contained, root=str(tmp_path), listing=str(listing))

    assert found(two, contained=False) is None
    cgroup_files(tmp_path / "slurm" / "job_7", **{"memory.events": "oom 3\noom_kill 2\n", "memory.max": "max\n"})
    assert found(two, contained=False) == str(tmp_path / "slurm" / "job_7")
    assert launch.memory_report(str(tmp_path / "slurm" / "job_7")) == {
        "kills": 2,
        "limit_bytes": None,
        "peak_bytes": None,
    }
    cgroup_files(
        tmp_path / "memory",
        **{
            "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
            "memory.limit_in_bytes": "1000\n",
            "memory.max_usage_in_bytes": "999\n",
        },
    )
    # Inside a container the path is the host's, and the mount itself is the container's.
    assert found(one, contained=True) == str(tmp_path / "memory")
    assert found(one, contained=False) is None
    assert launch.memory_report(str(tmp_path / "memory")) == {"kills": 1, "limit_bytes": 1000, "peak_bytes": 999}


def test_defaults_lie_beneath_what_the_image_says_and_that_beneath_the_spec(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image may hold weights, and say where."""
    monkeypatch.setenv("OF_IMAGE", "image")
    monkeypatch.setenv("OF_SPEC", "image")
    names = ("OF_NOBODY", "OF_IMAGE", "OF_SPEC")
    defaults = dict.fromkeys(names, "default")
    node.start(
        python(f"import os; print([os.environ[n] for n in {names!r}])"), defaults=defaults, env={"OF_SPEC": "spec"}
    )
    assert node.exit_code() == 0
    assert "['default', 'image', 'spec']" in node.log.read_text()


@pytest.mark.parametrize(("contained", "code"), [(False, 75), (True, 0)])
def test_who_leaves_with_0_on_the_schedulers_own_signal_has_stopped(node: Node, contained: bool, code: int) -> None:
    """Outside a container Slurm signals every process of the step: the program may be gone before PID 1 can tell it."""
    program = """
import os, signal, threading
gone = threading.Event()
def leave(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # PID 1 must not find somebody to tell before this one is gone
    os.kill(os.getppid(), signal.SIGTERM)
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
gone.wait()
"""
    node.start(python(program), contained=contained)
    node.ready()
    assert node.process is not None
    (pid,) = launch.descendants(node.process.pid)
    os.kill(pid, signal.SIGTERM)
    assert node.exit_code() == code

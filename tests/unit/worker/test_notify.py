"""Telling an end: real loopback servers and programs; what goes wrong is recorded, and nothing else happens."""

from __future__ import annotations

import email
import email.policy
import http.server
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.paths import RunPaths
from orchestrator.registry import EventLog, read_events
from orchestrator.states import ExitReason, JobState
from orchestrator.worker import notify
from orchestrator.worker.notify import Notifier, NotSent
from tests.polling import poll

SECRET = "/services/T0/never-shown"


class Server(http.server.ThreadingHTTPServer):
    """Answers with the given codes in turn, the last one for ever."""

    def __init__(self, *codes: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.codes = list(codes)
        self.bodies: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{SECRET}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        assert self.path == SECRET
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        code = self.server.codes.pop(0) if len(self.server.codes) > 1 else self.server.codes[0]
        self.send_response(code)
        if code == 302:
            self.send_header("Location", self.server.url)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(200) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    run = RunPaths(tmp_path / "runs" / "run-1")
    run.events_dir.mkdir(parents=True)
    EventLog(run, "rank0").append("checkpoint_committed", attempt=0, step=40)
    run.progress.write_text(json.dumps({"step": 41, "max_steps": 1000, "attempt": 0}))
    return run


def notifier(paths: RunPaths, environ: dict[str, str] | None = None, **wanted: Any) -> Notifier:
    orders = {
        "run_id": "run-1",
        "name": "run",
        "run_dir": str(paths.run_dir),
        "secrets": ["HOOK", "TOKEN"],
        "notify": {"on": ["failed", "needs_resume"], "mail": [], "webhook": None, "command": None, **wanted},
    }
    return Notifier(orders, {"PATH": os.environ["PATH"], **(environ or {})})


def tell(notifier: Notifier, message: str = "boom", state: JobState = JobState.FAILED, job_id: str = "7") -> None:
    notifier.tell(state, ExitReason.FAILURE, message, job_id=job_id, attempt=0)


def outcomes(paths: RunPaths) -> list[tuple[str, str, str | None]]:
    told = [event for event in read_events(paths) if event["writer"] == "notify"]
    return [(event["channel"], event["action"], event.get("message")) for event in told]


# --- once, and only what was asked for
def test_the_document_says_what_happened_whether_the_work_is_safe_and_what_to_do(
    paths: RunPaths, server: Server
) -> None:
    tell(notifier(paths, webhook=server.url))
    assert server.bodies == [
        {
            "run_id": "run-1",
            "name": "run",
            "state": "failed",
            "exit_reason": "failure",
            "message": "boom",
            "step": 41,
            "max_steps": 1000,
            "last_checkpoint_step": 40,
            "job_id": "7",
            "run_dir": str(paths.run_dir),
            "attempt": 0,
            "text": "run-1: failed (failure) at step 41 of 1 000.\nBoom\nYour work is safe up to step 40.\n"
            "What it printed:  orch logs run-1        Go on:  orch resume run-1",
        }
    ]
    assert outcomes(paths) == [("webhook", "notified", None)]


def test_each_end_of_a_submission_is_told_once(paths: RunPaths, server: Server) -> None:
    for job_id in ("7", "7", "8"):
        tell(notifier(paths, webhook=server.url), job_id=job_id)
    tell(notifier(paths, webhook=server.url), state=JobState.NEEDS_RESUME)
    assert [(body["job_id"], body["state"]) for body in server.bodies] == [
        ("7", "failed"),
        ("8", "failed"),
        ("7", "needs_resume"),
    ]


def test_a_state_nobody_asked_for_leaves_no_trace(paths: RunPaths, server: Server) -> None:
    tell(notifier(paths, webhook=server.url), state=JobState.COMPLETED)
    assert (server.bodies, outcomes(paths), list(paths.run_dir.glob("notified*"))) == ([], [], [])


def test_a_directory_that_cannot_be_written_harms_nothing(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    gone = notifier(paths, command=["true"])
    paths.run_dir.rename(paths.run_dir.with_name("moved"))
    tell(gone)
    assert "nobody was told" in capsys.readouterr().err


# --- the webhook
def test_the_url_of_a_secret_is_read_before_it_is_deleted_and_reaches_no_file(paths: RunPaths, server: Server) -> None:
    paths.secrets.write_text(json.dumps({"HOOK": server.url}))
    teller = notifier(paths, webhook="$HOOK")
    paths.secrets.unlink()
    tell(teller)
    assert len(server.bodies) == 1
    assert not [path for path in paths.run_dir.rglob("*") if path.is_file() and b"never-shown" in path.read_bytes()]


@pytest.mark.parametrize("value", [None, "not a URL", "file:///etc/passwd", "http://h/\r\nX: y"])
def test_a_secret_that_is_gone_or_no_url_is_recorded(paths: RunPaths, value: str | None) -> None:
    tell(notifier(paths, {} if value is None else {"HOOK": value}, webhook="$HOOK"))
    words = "no http:// or https:// URL is known: its secret is gone, or holds something else"
    assert outcomes(paths) == [("webhook", "notify_failed", words)]


def test_a_server_that_fails_twice_is_asked_three_times(paths: RunPaths, server: Server) -> None:
    server.codes = [500, 503, 200]
    tell(notifier(paths, webhook=server.url))
    assert len(server.bodies) == 3
    assert outcomes(paths) == [("webhook", "notified", None)]


@pytest.mark.parametrize(("code", "tries"), [(500, 3), (404, 1), (302, 1)])
def test_a_server_that_refuses_is_recorded_without_the_url(
    paths: RunPaths, server: Server, code: int, tries: int
) -> None:
    server.codes = [code]
    tell(notifier(paths, webhook=server.url))
    assert len(server.bodies) == tries
    assert outcomes(paths) == [("webhook", "notify_failed", f"the server answered {code}")]


def test_nobody_there_is_recorded(paths: RunPaths) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tell(notifier(paths, webhook=f"http://127.0.0.1:{port}{SECRET}"))
    assert outcomes(paths) == [("webhook", "notify_failed", "Connection refused")]


def test_a_host_that_is_not_known_is_not_named(paths: RunPaths) -> None:
    tell(notifier(paths, webhook=f"http://never-shown.invalid{SECRET}"))
    (channel, action, words), *more = outcomes(paths)
    assert (channel, action, more) == ("webhook", "notify_failed", [])
    assert "never-shown" not in str(words)


def test_a_server_that_hangs_costs_ten_seconds_and_no_more(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = (notify._TRIES - 1) * 0.5  # at most
    assert notify._TRIES * notify._TRY_S + pauses <= notify.WEBHOOK_S
    monkeypatch.setattr(notify, "_TRY_S", 0.5)
    monkeypatch.setattr(notify, "WEBHOOK_S", 50.0)  # on a busy machine too it is the tries that end, with their words
    with socket.create_server(("127.0.0.1", 0), backlog=8) as silent:  # connects, and never answers
        begin = time.monotonic()
        tell(notifier(paths, webhook=f"http://127.0.0.1:{silent.getsockname()[1]}{SECRET}"))
    assert 1.4 < time.monotonic() - begin < 40
    assert outcomes(paths) == [("webhook", "notify_failed", "the server gave no answer")]


def test_a_server_that_answers_drop_by_drop_is_left_behind(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "WEBHOOK_S", 1.0)
    stop = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not stop.wait(0.05):
                connection.sendall(b"X: y\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        tell(notifier(paths, webhook=f"http://127.0.0.1:{listener.getsockname()[1]}{SECRET}"))
        stop.set()
        thread.join()
    assert outcomes(paths) == [("webhook", "notify_failed", "not done after 1 s")]


# --- the command
DUMP = "import json,os,sys; json.dump([dict(os.environ), sys.argv[1:], json.load(sys.stdin)], open(sys.argv[1], 'w'))"


def test_the_command_gets_the_document_and_no_secret(paths: RunPaths, tmp_path: Path) -> None:
    said = tmp_path / "said.json"
    environ = {"TOKEN": "never-shown", "HOOK": "never-shown", "KEPT": "1"}
    tell(notifier(paths, environ, command=[sys.executable, "-c", DUMP, str(said), "$(id)"]), message="a\0b\nc")
    given, argv, document = json.loads(said.read_text())
    assert argv == [str(said), "$(id)"]
    assert document["message"] == "ab\nc"
    assert given["KEPT"] == "1"
    assert "never-shown" not in said.read_text()
    wanted = {"ORCH_RUN_ID": "run-1", "ORCH_STATE": "failed", "ORCH_EXIT_REASON": "failure", "ORCH_MESSAGE": "ab\nc"}
    wanted |= {"ORCH_RUN_DIR": str(paths.run_dir), "ORCH_STEP": "41"}
    assert {key: given[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sh", "-c", "echo never-shown; exit 3"], "sh ended with exit code 3"),
        (["/nowhere/at/all"], "/nowhere/at/all: No such file or directory"),
    ],
)
def test_a_command_that_fails_is_recorded_without_what_it_printed(paths: RunPaths, argv: list[str], words: str) -> None:
    tell(notifier(paths, command=argv))
    assert outcomes(paths) == [("command", "notify_failed", words)]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_command_that_hangs_is_killed_with_its_children(
    paths: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "COMMAND_S", 5.0)  # within which the shell must have come up
    pids = tmp_path / "pids"
    tell(notifier(paths, command=["sh", "-c", f"sleep 60 & echo $! $$ > {pids}; trap '' TERM; wait"]))
    assert outcomes(paths) == [("command", "notify_failed", "sh had not ended after 5 s and was killed")]
    for pid in map(int, pids.read_text().split()):
        poll(lambda pid=pid: not is_running(pid), "its end")  # the kernel ends the others of the group when it likes


def test_channels_work_side_by_side_and_one_failure_is_one(paths: RunPaths, server: Server, tmp_path: Path) -> None:
    tell(notifier(paths, webhook=server.url, command=["false"], mail=["me@x.org"], environ={"PATH": str(tmp_path)}))
    assert [(channel, action) for channel, action, _ in outcomes(paths)] == [
        ("webhook", "notified"),
        ("mail", "notify_failed"),
        ("command", "notify_failed"),
    ]
    assert len(server.bodies) == 1


# --- mail
def program(directory: Path, name: str) -> tuple[Path, Path]:
    """A mail program that keeps its arguments and its input."""
    kept = directory / "kept"
    path = directory / name
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {kept}.argv\nexec /bin/cat > {kept}\n')
    path.chmod(0o755)
    return kept, directory / "kept.argv"


@pytest.fixture
def _no_system_sendmail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_SENDMAIL", "/nowhere/sendmail")


HOSTILE = "x\r\nBcc: victim@example.org\n.\n~!touch pwned\né\n" + "long " * 400


@pytest.mark.usefixtures("_no_system_sendmail")
def test_mail_through_sendmail_cannot_be_injected_into(paths: RunPaths, tmp_path: Path) -> None:
    kept, argv = program(tmp_path, "sendmail")
    tell(notifier(paths, {"PATH": str(tmp_path)}, mail=["me@example.org", "you"]), message=HOSTILE)
    assert outcomes(paths) == [("mail", "notified", None)]
    assert argv.read_text().split() == ["-i", "-t"]
    mail = email.message_from_bytes(kept.read_bytes(), policy=email.policy.default)
    assert (mail["To"], mail["Subject"], mail["Bcc"]) == ("me@example.org, you", "orch: run-1 failed", None)
    body = mail.get_content()
    assert "Your work is safe up to step 40." in body
    assert f"run directory: {paths.run_dir}" in body
    assert max(map(len, kept.read_bytes().splitlines())) <= 998


@pytest.mark.usefixtures("_no_system_sendmail")
def test_mail_through_mail_obeys_no_escapes(paths: RunPaths, tmp_path: Path) -> None:
    kept, argv = program(tmp_path, "mail")
    tell(notifier(paths, {"PATH": str(tmp_path)}, mail=["me@example.org"]), message=HOSTILE)
    assert argv.read_text().splitlines() == ["-s", "orch: run-1 failed", "me@example.org"]
    assert not [line for line in kept.read_text().splitlines() if line.startswith("~")]
    assert " ~!touch pwned" in kept.read_text()


@pytest.mark.usefixtures("_no_system_sendmail")
def test_no_mail_program_is_recorded(paths: RunPaths, tmp_path: Path) -> None:
    tell(notifier(paths, {"PATH": str(tmp_path)}, mail=["me@example.org"]))
    words = "found neither /nowhere/sendmail nor sendmail nor mail on PATH"
    assert outcomes(paths) == [("mail", "notify_failed", words)]


@pytest.mark.usefixtures("_no_system_sendmail")
def test_what_a_failing_mail_program_says_is_recorded(paths: RunPaths, tmp_path: Path) -> None:
    (tmp_path / "sendmail").write_text("#!/bin/sh\necho 'no route to host' >&2\nexit 75\n")
    (tmp_path / "sendmail").chmod(0o755)
    tell(notifier(paths, {"PATH": str(tmp_path)}, mail=["me@example.org"]))
    (outcome,) = outcomes(paths)
    assert str(outcome[2]).endswith("sendmail ended with exit code 75: no route to host")


def test_a_failure_nobody_thought_of_is_named_by_its_kind_only() -> None:
    def fail() -> None:
        raise RuntimeError("never-shown")

    def refuse() -> None:
        raise NotSent("words")

    found = notify.side_by_side({"a": (5.0, fail), "b": (5.0, refuse)})
    assert found == [("a", "RuntimeError"), ("b", "words")]

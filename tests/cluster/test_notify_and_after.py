"""People are told of an end exactly once; a run that waits for another starts when that one is completed."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.handle import Cluster
from tests.cluster.orch import Orch
from tests.cluster.programs import said, script_spec

SECRET_PATH = "/services/T0/never-shown"

# The command channel: appends its document and what it was given to a file beside the run directories.
TELL = """
import json, os, sys
document = json.load(sys.stdin)
document["environ"] = {k: v for k, v in os.environ.items() if k.startswith("ORCH_") or "never-shown" in v}
with open(sys.argv[1], "a") as told:
    told.write(json.dumps(document) + "\\n")
"""


class Hook(http.server.ThreadingHTTPServer):
    """A webhook on loopback; the first request of each run is answered with 500."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.documents: list[dict[str, Any]] = []
        self.refused: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{SECRET_PATH}"

    def states(self, run: str) -> list[str]:
        return [document["state"] for document in self.documents if document["run_id"] == run]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first = document["run_id"] not in self.server.refused
        self.server.refused.add(document["run_id"])
        if not first:
            self.server.documents.append(document)
        self.send_response(500 if first else 200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Told:
    """A spec whose end is told by all means at hand, and what has been told."""

    def __init__(self, orch: Orch, hook: Hook) -> None:
        self.orch = orch
        self.hook = hook
        self.file = orch.directory / "told.jsonl"
        self.environ = {"HOOK_URL": hook.url, "no_proxy": "127.0.0.1"}
        script = orch.directory / "tell.py"
        script.write_text(TELL)
        self.notify = {
            "on": ["completed", "failed", "needs_resume", "lost", "cancelled"],
            "webhook": "$HOOK_URL",
            "command": [sys.executable, str(script), str(self.file)],
        }

    def submit(self, **changes: Any) -> str:
        spec = script_spec(self.orch, notify=self.notify, secrets=["HOOK_URL"], **changes)
        return str(self.orch.submit(spec, env=self.environ)["run_id"])

    def by_command(self, run: str) -> list[dict[str, Any]]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return [document for document in map(json.loads, lines) if document["run_id"] == run]

    def wait(self, run: str, state: str) -> dict[str, Any]:
        """Until both channels have told this end; the command's document. Fails on anything told besides."""
        self.orch.cluster.wait(f"{state} to be noted as told", lambda: len(self.noted(run)) >= 2, timeout=60)
        assert [document["state"] for document in self.by_command(run)] == [state], self.orch.story(run)
        assert self.hook.states(run) == [state], self.orch.story(run)
        assert self.noted(run) == [("notified", "command"), ("notified", "webhook")], self.orch.story(run)
        return self.by_command(run)[0]

    def noted(self, run: str) -> list[tuple[str, str]]:
        path = self.orch.run_dir(run) / "events" / "notify.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return sorted((event["action"], event["channel"]) for event in map(json.loads, lines))


@pytest.fixture
def told(orch: Orch, hook: Hook) -> Told:
    return Told(orch, hook)


def assert_no_secret_in_files(run_dir: Path) -> None:
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert [path for path in written if b"never-shown" in path.read_bytes()] == []


def end(orch: Orch, run: str, *, attempt: int = 0) -> None:
    orch.wait_for_step(run, orch.step(run) + 3 if orch.attempt(run) >= attempt else 1, attempt=attempt)
    (orch.run_dir(run) / "enough").touch()


def assert_begins_after(orch: Orch, run: str, other: str) -> None:
    """It begins once the other is completed, and its first attempt is attempt 0. Ends it."""
    orch.wait_for_step(run, 3)
    ended = orch.attempts(other)[-1]["ended"]  # before others see it as completed; the event comes after that
    assert orch.events(run, "attempt_started")[0]["time"] > ended
    end(orch, run)
    orch.wait_for_state(run, "completed", timeout=60)
    assert [record["attempt"] for record in orch.attempts(run)] == [0]


# --- notify
@pytest.mark.parametrize("backend", ["slurm", "local"])
def test_a_requeue_is_not_told_and_the_end_is_told_once(told: Told, orch: Orch, backend: str) -> None:
    run = told.submit(backend=backend)
    orch.wait_for_step(run, 5)
    orch.json("preempt", run, "--no-wait")
    orch.wait_for_step(run, orch.step(run) + 3, attempt=1)
    assert told.noted(run) == []
    end(orch, run, attempt=1)
    orch.wait_for_state(run, "completed", timeout=60)
    document = told.wait(run, "completed")
    assert "never-shown" not in str(document)
    given = {
        "ORCH_RUN_ID": run,
        "ORCH_STATE": "completed",
        "ORCH_EXIT_REASON": "completed",
        "ORCH_MESSAGE": "finished",
        "ORCH_RUN_DIR": str(orch.run_dir(run)),
        "ORCH_STEP": str(document["step"]),
    }
    assert {key: document["environ"].get(key) for key in given} == given
    assert (document["attempt"], document["job_id"]) == (1, orch.status(run)["job_id"])
    assert_no_secret_in_files(orch.run_dir(run))


def test_a_failure_is_told_once_with_what_to_do(told: Told, orch: Orch) -> None:
    run = told.submit(env={"PYTHONSTARTUP": "/dev/null"}, job={"command": ["sh", "-c", "exit 3"]})
    orch.wait_for_state(run, "failed", timeout=60)
    document = told.wait(run, "failed")
    assert document["exit_reason"] == "failure"
    assert document["text"].splitlines()[0] == f"{run}: failed (failure)."
    assert f"orch resume {run}" in document["text"]
    for line in document["text"].splitlines()[1:]:
        assert line in orch.call("status", run, "--root", str(orch.root)).stdout


def test_a_spent_cap_is_told_as_needs_resume(told: Told, orch: Orch) -> None:
    run = told.submit(preemption={"lead_time": "20s", "max_requeues": 0})
    orch.wait_for_step(run, 5)
    orch.json("preempt", run, "--no-wait")
    orch.wait_for_state(run, "needs_resume", timeout=90)
    document = told.wait(run, "needs_resume")
    assert document["last_checkpoint_step"] == document["step"]
    assert f"Your work is safe up to step {document['step']}." in document["text"]


def test_scancel_during_the_messages_changes_nothing_that_was_written(orch: Orch, cluster: Cluster) -> None:
    begun = orch.directory / "begun"
    notify = {"on": ["completed"], "command": ["sh", "-c", f"touch {begun}; sleep 25"]}
    run = orch.submit(script_spec(orch, notify=notify))["run_id"]
    end(orch, run)
    cluster.wait("the command to begin", begun.exists, timeout=60)
    assert orch.status(run)["state"] == "completed"
    cluster.run("scancel", orch.status(run)["job_id"])
    cluster.wait_end(orch.status(run)["job_id"])
    assert orch.status(run)["state"] == "completed"


def test_a_lost_run_is_told_once_by_whoever_looks_first(told: Told, orch: Orch, cluster: Cluster) -> None:
    run = told.submit(retry={"node_failure": 0})
    orch.wait_for_step(run, 5)
    job = orch.status(run)["job_id"]
    for signum in (signal.SIGSTOP, signal.SIGKILL):  # all at once: none of them may see another end
        for pid in _processes_of(job):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
    cluster.wait_end(job)

    def look(_: int) -> str:
        return str(orch.status(run)["state"])

    def noted() -> bool:
        with ThreadPoolExecutor(2) as both:
            assert set(both.map(look, range(2))) <= {"running", "lost"}, "it may have its say for a while"
        return len(told.noted(run)) >= 2

    cluster.wait("somebody to tell", noted, timeout=60)
    orch.json("ps", "--root", str(orch.root))
    assert orch.call("wait", run, "--root", str(orch.root)).returncode == 1
    told.wait(run, "lost")


def _processes_of(job: str) -> list[int]:
    """What a job has started: the batch script, which comes first, srun, the agents, their programs."""
    found = []
    for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            environ = (path / "environ").read_bytes().split(b"\0")
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if f"SLURM_JOB_ID={job}".encode() in environ and not command.startswith(b"slurmstepd"):
            found.append(int(path.name))
    return found


# --- after
def test_b_starts_when_a_is_completed_although_a_was_requeued_in_between(orch: Orch, cluster: Cluster) -> None:
    a = orch.submit(script_spec(orch))["run_id"]
    b = orch.submit(script_spec(orch, name="second", after=[a[:10]]))["run_id"]
    orch.wait_for_step(a, 5)
    waiting = orch.call("status", b, "--root", str(orch.root)).stdout
    assert f"Waiting for {a}" in waiting
    assert orch.status(b)["state"] == "queued"
    cluster.preempt(seconds=1)
    orch.wait_for_step(a, orch.step(a) + 3, attempt=1)
    assert said(orch, b) == []
    end(orch, a, attempt=1)
    assert_begins_after(orch, b, a)


# Ends with the code in the file `end` of its run directory.
ENDS = 'until [ -e "$ORCH_RUN_DIR/end" ]; do sleep 0.1; done; exit "$(cat "$ORCH_RUN_DIR/end")"'


@pytest.mark.parametrize(
    ("backend", "how"), [("slurm", "has failed"), ("slurm", "was cancelled"), ("local", "has failed")]
)
def test_b_does_not_start_after_a_has_ended_otherwise_and_both_go_on_after_a_resume(
    told: Told, orch: Orch, backend: str, how: str
) -> None:
    a = orch.submit(script_spec(orch, backend=backend, job={"command": ["sh", "-c", ENDS]}))["run_id"]
    b = told.submit(name="second", after=[a], backend=backend)
    orch.wait_for_state(a, "running", timeout=60)
    assert orch.status(b)["state"] == "queued"
    if how == "has failed":
        (orch.run_dir(a) / "end").write_text("3")
    else:
        orch.json("cancel", a)
    status = orch.wait_for_state(b, "needs_resume", timeout=90)
    assert status["exit_reason"] == "dependency_failed"
    assert (
        f"It waits for {a}, which {how}; first:  orch resume {a}"
        in orch.call("status", b, "--root", str(orch.root)).stdout
    )
    told.wait(b, "needs_resume")
    refused = orch.call("resume", b, env=told.environ)
    assert (refused.returncode, f"orch resume {a}" in refused.stderr) == (7, True)
    (orch.run_dir(a) / "end").unlink(missing_ok=True)
    orch.json("resume", a)
    assert orch.json("resume", b, env=told.environ)["action"] == "resumed"
    orch.wait_for_state(a, "running", timeout=60)
    assert orch.status(b)["state"] == "queued"
    (orch.run_dir(a) / "end").write_text("0")
    assert_begins_after(orch, b, a)


def test_a_waiting_local_run_can_be_cancelled(orch: Orch) -> None:
    a = orch.submit(script_spec(orch, backend="local"))["run_id"]
    b = orch.submit(script_spec(orch, backend="local", name="second", after=[a]))["run_id"]
    assert orch.status(b)["state"] == "queued"
    orch.json("cancel", b)
    orch.wait_for_state(b, "cancelled", timeout=60)
    assert not orch.status(b)["alive"]
    orch.json("cancel", a)
    orch.wait_for_state(a, "cancelled", timeout=60)
    assert said(orch, b) == []


def test_b_waits_again_for_an_a_that_was_resumed_under_another_job_id(orch: Orch, cluster: Cluster) -> None:
    """B's job is let go while A has a new one: it goes back into the queue, and its first attempt is attempt 0."""
    a = orch.submit(script_spec(orch))["run_id"]
    b = orch.submit(script_spec(orch, name="second", after=[a]))["run_id"]
    orch.wait_for_step(a, 3)
    job = orch.status(b)["job_id"]
    cluster.run("scontrol", "hold", job)
    orch.json("cancel", a)
    orch.wait_for_state(a, "cancelled", timeout=60)
    orch.json("resume", a)
    orch.wait_for_step(a, orch.step(a) + 1, attempt=1)
    cluster.run("scontrol", "release", job)
    waited = orch.run_dir(b) / "events" / "agent-n0.jsonl"
    cluster.wait("b to go back", lambda: waited.exists() and "back_to_wait" in waited.read_text(), timeout=60)
    cluster.wait("b to wait", lambda: orch.status(b)["state"] == "queued", timeout=60)
    dependency = f"afterany:{orch.status(a)['job_id']}("
    cluster.wait("b to wait for a", lambda: dependency in cluster.job(job).get("Dependency", ""))  # after the requeue
    end(orch, a, attempt=1)
    assert_begins_after(orch, b, a)


def test_resume_all_resumes_a_before_b(orch: Orch) -> None:
    # Names that would be resumed in the wrong order: run directories are listed in any.
    a = orch.submit(script_spec(orch, name="z", preemption={"lead_time": "20s", "max_requeues": 0}))["run_id"]
    b = orch.submit(script_spec(orch, name="a", after=[a]))["run_id"]
    orch.wait_for_step(a, 3)
    orch.json(
        "preempt", a, "--no-wait"
    )  # after a real preemption Slurm 24.11 requeues by itself what ends in its grace
    orch.wait_for_state(a, "needs_resume", timeout=90)
    orch.wait_for_state(b, "needs_resume", timeout=90)
    done = orch.json("resume", "--all", "--root", str(orch.root))
    assert [result["run_id"] for result in done["resumed"]] == [a, b]
    assert done["errors"] == {}
    end(orch, a, attempt=1)
    end(orch, b)
    orch.wait_for_state(b, "completed", timeout=90)

"""Every command: exit code, one JSON document, words for people, a hint with every error."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import operations
from orchestrator.backends.base import SchedulerState
from orchestrator.checkpoint import Manifest, Refuge, take_over
from orchestrator.cli import failures, out
from orchestrator.cli.main import main
from orchestrator.files import write_json
from orchestrator.operations import checkpoints, describe, image_build
from orchestrator.operations.checkpoints import open_run_store
from orchestrator.operations.checkup.findings import Examined, Family, Finding, Level, SaveSeconds
from orchestrator.operations.image_results import BuiltImage
from orchestrator.registry import EventLog
from orchestrator.words import duration, size
from tests.unit.cli.conftest import Cli, World

COMMANDS = [
    "init",
    "validate",
    "schema",
    "site",
    "doctor",
    "submit",
    "status",
    "ps",
    "logs",
    "wait",
    "cancel",
    "preempt",
    "shell",
    "top",
    "resume",
    "image",
    "ckpt",
]
CKPT = ["ls", "verify", "pull", "push", "gc", "rollback"]


def test_help_lists_every_command(cli: Cli) -> None:
    said = cli("--help")
    assert said.code == 0
    assert all(f"  {command} " in said.out for command in COMMANDS)


@pytest.mark.parametrize("command", [*COMMANDS, "image lock", "image build", *(f"ckpt {name}" for name in CKPT)])
def test_each_command_has_help(cli: Cli, command: str) -> None:
    said = cli(*command.split(), "--help")
    assert said.code == 0
    assert f"orch {command}" in said.out


def test_no_command_shows_the_help_and_is_a_usage_error(cli: Cli) -> None:
    said = cli()
    assert (said.code, said.out) == (2, "")
    assert "Usage" in said.err


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("orch 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sumbit", "x"], "No such command"),
        (["status"], "Missing argument"),
        (["status", "x", "--jsn"], "No such option"),
        (["logs", "x", "--rank", "one"], "not a valid int"),
        (["wait", "x", "--timeout", "soon"], "expected seconds"),
        (["resume"], "name one run, or give --all"),
        (["resume", "x", "--all"], "name one run, or give --all"),
        (["resume", "--all", "--set", "a=b"], "go with one run"),
        (["ps", "--state", "asleep"], "one of queued"),
    ],
)
def test_usage_errors(cli: Cli, arguments: list[str], message: str) -> None:
    said = cli(*arguments)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert "hint:" in said.err


def test_a_usage_error_is_a_document_too(cli: Cli) -> None:
    said = cli("status", "--json")
    assert said.code == 2
    assert said.document["error"]["exit_code"] == 2


# --- init, validate, schema, site


def test_init_writes_a_spec_that_validates(cli: Cli) -> None:
    assert cli("init", "first.yaml", "--from", "command").code == 0
    assert cli("validate", "first.yaml").code == 0
    again = cli("init", "first.yaml")
    assert again.code == 7
    assert "exists already" in again.err


def test_init_from_nothing_known(cli: Cli) -> None:
    said = cli("init", "x.yaml", "--from", "digit")
    assert said.code == 2
    assert "digits" in said.err
    assert not Path("x.yaml").exists()


def test_validate_lists_every_problem_with_its_place(cli: Cli, world: World) -> None:
    Path("bad.yaml").write_text("name: bad\njob: {script: train.py}\nresources: {tme: 1, nodes: none}\n")
    said = cli("validate", "bad.yaml")
    assert (said.code, said.out) == (2, "")
    assert "bad.yaml:3:13" in said.err
    assert "Did you mean `time`?" in said.err
    assert "2 problems. Nothing was submitted." in said.err
    document = cli("validate", "bad.yaml", "--json").document
    assert document["valid"] is False
    assert {problem["field"] for problem in document["problems"]} == {"resources.tme", "resources.nodes"}


def test_validate_of_a_good_spec(cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    said = cli("validate", world.spec, "--json")
    assert said.document["valid"] is True
    assert said.document["run_id"].startswith("job-")
    assert "1 file of code (" in cli("validate", world.spec).out
    monkeypatch.delenv("TOKEN")
    assert "TOKEN is not set" in cli("validate", world.spec).err
    assert not world.root.exists()


def test_schema_is_json(cli: Cli) -> None:
    assert "properties" in cli("schema").document


def test_site_shows_every_key(cli: Cli) -> None:
    assert "partition" in cli("site").out
    assert cli("site", "--json").document["root"] is None


# --- submit


def test_dry_run_prints_the_bytes_and_writes_nothing(cli: Cli, world: World) -> None:
    said = cli("submit", world.spec, "--dry-run")
    assert said.code == 0
    assert "#!/bin/bash" in said.out
    assert "#SBATCH --job-name=job" in said.out
    assert "s3cret-value" not in said.out
    assert not world.root.exists()
    document = cli("submit", world.spec, "--dry-run", "--json").document
    assert document["script"] in said.out
    assert document["agent"]["run_id"] == document["run_id"]


def test_dry_run_needs_neither_slurm_nor_docker(cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent")
    image = "container.image=sha256:" + "0" * 64
    assert cli("submit", world.spec, "--dry-run", "--set", "container.runtime=docker", "--set", image).code == 0


def test_no_sbatch_is_one_error_and_leaves_nothing(cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    said = cli("submit", world.spec)
    assert (said.code, said.out) == (3, "")
    assert "sbatch is not on PATH" in said.err
    assert "backend: local" in said.err
    assert list((world.root / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "empty"),
        ("name: [", "yaml"),
        ("- a\n- b\n", "mapping"),
        ("name: job\njob: {script: nowhere.py}\n", "nowhere.py"),
        ("name: job\njob: {script: train.py}\ncontainer: {runtime: docker, image: 'a/b:latest'}\n", "orch image lock"),
        ("name: job\nname: job\njob: {script: train.py}\n", "name"),
        ("name: 'bad name'\njob: {script: train.py}\n", "name"),
    ],
)
def test_bad_specs_are_one_message_and_exit_2(cli: Cli, content: str | None, message: str) -> None:
    if content is not None:
        Path("bad.yaml").write_text(content)
    said = cli("submit", "bad.yaml", "--json")
    assert said.code == 2
    assert message.lower() in said.err.lower()
    assert said.document["error"]["type"] == "SpecError"


def test_a_missing_secret(cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKEN")
    said = cli("submit", world.spec)
    assert said.code == 2
    assert "TOKEN is not set" in said.err
    assert "hint: export" in said.err


def test_submitting_what_is_done_says_so(cli: Cli, world: World) -> None:
    run = world.ended("completed", "completed", step=9)
    said = cli("submit", world.spec)
    assert said.code == 0
    assert said.out == f"{run}  is already completed. Nothing was submitted. A fresh copy: orch submit --new\n"
    assert cli("submit", world.spec, "--json").document["action"] == "already_completed"


def test_submitting_what_was_cancelled_is_refused(cli: Cli, world: World) -> None:
    run = world.ended("cancelled", "cancelled")
    world.paths(run).tombstone.touch()
    said = cli("submit", world.spec)
    assert said.code == 7
    assert f"orch resume {run}" in said.err


# --- status, ps, logs, wait


def test_status_of_an_unknown_run(cli: Cli) -> None:
    said = cli("status", "nobody")
    assert (said.code, said.out) == (6, "")
    assert "no run 'nobody'" in said.err
    document = cli("status", "nobody", "--json").document
    assert document["error"]["type"] == "RunNotFound"


def test_status_tells_the_story_of_a_run(cli: Cli, world: World) -> None:
    run, agent = world.running()
    agent.commit(0, 18204)
    agent.end("preempted", "time_limit", step=18204, saved_in_s=3.1)
    agent.begin(1, resumed=18204)
    agent.commit(1, 30000)
    write_json(world.paths(run).progress, {"step": 30977, "epoch": 1, "max_steps": 125000, "attempt": 1, "time": 1.0})
    agent.end("failed", "out_of_memory", step=30977, message="node n1 killed rank 5 at 61.9 of 62 GB")
    world.paths(run).metrics.write_text(
        "step,epoch,name,value\n" + "".join(f"{step},0,train/loss,{100 / (step + 1)}\n" for step in range(100))
    )
    said = cli("status", run)
    assert said.code == 0
    headline, *rest = said.out.splitlines()
    assert headline == f"{run}   failed · attempt 1 · out of memory · step 30 977 / 125 000 (25 %)"
    story = "\n".join(rest)
    assert "Node n1 killed rank 5 at 61.9 of 62 GB" in story
    assert "time limit" in story
    assert "saved step 18 204 in 3.1 s, 0 steps lost" in story
    assert "resumed from step 18 204 (verified), ended at step 30 977, 977 steps lost" in story
    assert "checkpoint  step 30 000" in story
    assert "train/loss  █" in story
    assert "Your work is safe up to step 30 000." in story
    assert f"orch resume {run} --set resources.mem=…" in story


def test_what_is_gone_is_not_called_safe(cli: Cli, world: World) -> None:
    run, agent = world.running()
    log, folder = EventLog(world.paths(run), "rank0-0"), world.paths(run).checkpoints
    folder.mkdir()
    for step in (600, 601):
        path = folder / f"step-{step}.ckpt"
        path.write_bytes(b"weights")
        path.with_suffix(".json").write_text("{}")
        log.append("checkpoint_committed", attempt=0, step=step, epoch=0, path=str(path), size_bytes=7)
    agent.end("cancelled", "cancelled", step=601)
    world.paths(run).heartbeat.touch()  # its last one is young
    world.paths(run).tombstone.touch()
    world.backend.set("101", SchedulerState.ENDED)
    assert "Your work is safe up to step 601. Go on" in cli("status", run).out
    assert "Step 601 is safe. Go on" in cli("cancel", run).out
    path.write_bytes(b"short")
    expected = "Your work is safe up to step 600. The checkpoint of step 601 is gone or damaged."
    said = cli("status", run).out
    assert expected in said
    assert "step-600.ckpt" in said
    assert expected in cli("cancel", run).out
    log.append("checkpoint_rejected", attempt=1, path=str(folder), reason="all 2 checkpoints are damaged")
    expected = (
        "No checkpoint could be used; the last one was of step 601. "
        "Restore a copy of one first (docs/checkpoints.md, `By hand`)."
    )
    said = cli("status", run).out
    assert expected in said
    assert "safe" not in said
    assert expected in cli("cancel", run).out
    assert cli("status", run, "--json").document["last_checkpoint"] is None


def test_status_names_the_foreign_checkpoint_a_run_began_with(cli: Cli, world: World) -> None:
    run, _agent = world.running()
    theirs = "/theirs.ckpt"
    began = {"step": 800, "epoch": 1, "from_attempt": None, "checkpoint": theirs, "start_from": theirs}
    EventLog(world.paths(run), "rank0-000").append("resumed", attempt=0, **began)
    assert "started at step 800 from /theirs.ckpt" in cli("status", run).out
    assert cli("status", run, "--json").document["resumed_from"]["path"] == "/theirs.ckpt"


def test_status_json_is_one_document(cli: Cli, world: World) -> None:
    run = world.ended("completed", "completed", step=9)
    document = cli("status", run, "--json").document
    assert document["state"] == "completed"
    assert document["exit_reason"] == "completed"


def test_status_survives_not_a_number(cli: Cli, world: World) -> None:
    run, agent = world.running()
    from orchestrator.registry import EventLog

    EventLog(world.paths(run), "rank0").append("action", attempt=0, loss=float("nan"))
    agent.end("completed", "completed")
    said = cli("status", run, "--json")
    assert '"NaN"' in said.out
    assert json.loads(said.out, parse_constant=lambda word: pytest.fail(f"bare {word}"))


def test_ps(cli: Cli, world: World) -> None:
    assert cli("ps").out == "no runs in any known root; --root DIR looks elsewhere\n"
    run = world.ended("completed", "completed")
    heading, row = cli("ps").out.splitlines()
    assert heading.split() == ["RUN", "STATE", "ATTEMPT", "JOB", "STEP", "SUBMITTED"]
    assert row.split()[:4] == [run, "completed", "0", "101"]
    (only,) = cli("ps", "--json").document
    assert only["run_id"] == run
    assert cli("ps", "--state", "failed", "--json").document == []


def test_a_long_message_does_not_break_the_rows_of_a_table() -> None:
    rows = [[("run-1", ""), ("x" * 200, "")], [("r", ""), ("", "")]]
    wide = ["".join(text for text, _ in line) for line in out.table(("RUN", ""), rows)]
    assert wide == ["RUN    ", "run-1  " + "x" * 200, "r      "]
    narrow = ["".join(text for text, _ in line) for line in out.table(("RUN", ""), rows, width=40)]
    assert narrow[1] == "run-1  " + "x" * 32 + "…"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("the node died", "The node died"),
        ("orchestrator.errors.SpecError: no data", "orchestrator.errors.SpecError: no data"),
        ("data: /x does not exist", "data: /x does not exist"),
    ],
)
def test_a_message_that_begins_with_a_name_keeps_it(cli: Cli, world: World, message: str, shown: str) -> None:
    run = world.ended("failed", "failure", message=message)
    assert f"  {shown}\n" in cli("status", run).out


def test_logs(cli: Cli, world: World) -> None:
    run, agent = world.running()
    world.paths(run).rank_log(0, 0).write_text("hello\nworld\n")
    agent.end("completed", "completed")
    assert cli("logs", run).out == "hello\nworld\n"
    assert cli("logs", "-f", run).out == "hello\nworld\n"
    assert cli("logs", run, "--json").document == {"attempt": 0, "rank": 0, "node": None, "lines": ["hello", "world"]}
    missing = cli("logs", run, "--rank", "7")
    assert missing.code == 6
    assert "rank 7" in missing.err
    never = cli("logs", run, "--attempt", "9")
    assert never.code == 6
    assert "has no attempt 9\nhint: it has attempt 0 only" in never.err


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [("completed", "completed", 0), ("failed", "failure", 1), ("cancelled", "cancelled", 1)],
)
def test_wait_ends_with_the_runs_success(cli: Cli, world: World, status: str, reason: str, code: int) -> None:
    run = world.ended(status, reason)
    assert cli("wait", run).code == code
    said = cli("wait", run, "--json", "--timeout", "5s")
    assert said.code == code
    assert said.document["state"] == status


@pytest.mark.parametrize(("text", "value"), [("90", 90), ("90s", 90), ("1.5h", 5400), ("2 m", 120), ("1d", 86400)])
def test_times(text: str, value: float) -> None:
    from orchestrator.cli.commands import seconds

    assert seconds(text, "--timeout") == value


# --- cancel, preempt, resume


def test_cancel_of_a_completed_run(cli: Cli, world: World) -> None:
    run = world.ended("completed", "completed")
    assert "already completed" in cli("cancel", run).out
    assert cli("cancel", run, "--json").document["action"] == "already_completed"


def test_preempt_needs_a_running_job(cli: Cli, world: World) -> None:
    run = world.ended("completed", "completed")
    said = cli("preempt", run)
    assert said.code == 3
    assert "not running" in said.err


def test_verify_has_to_watch(cli: Cli, world: World) -> None:
    run, _ = world.running()
    said = cli("preempt", run, "--verify", "--no-wait")
    assert said.code == 2
    assert "--verify has to watch" in said.err


@pytest.mark.parametrize("arguments", [["shell", "--", "true"], ["top", "--once"], ["top", "--json"]])
def test_shell_and_top_need_a_running_job(cli: Cli, world: World, arguments: list[str]) -> None:
    run = world.ended("completed", "completed")
    said = cli(arguments[0], run, *arguments[1:])
    assert said.code == 3
    assert "not running" in said.err


def test_top_does_not_look_without_pause(cli: Cli, world: World) -> None:
    run, _ = world.running()
    assert cli("top", run, "--interval", "0.1s").code == 2


def test_resume_refuses_drift(cli: Cli, world: World) -> None:
    run = world.ended("failed", "failure")
    said = cli("resume", run, "--set", "job.args.lr=1")
    assert said.code == 7
    assert "job" in said.err


def test_resume_all_with_nothing_to_do(cli: Cli, world: World) -> None:
    world.ended("completed", "completed")
    assert cli("resume", "--all").out == "no run waits to be resumed\n"
    assert cli("resume", "--all", "--json").document == {"resumed": [], "errors": {}}


def test_image_lock_without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    # In a process of its own: the docker SDK forgets its socket when the connection fails.
    command = [sys.executable, "-m", "orchestrator", "image", "lock", "repo/image:tag"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert "no container engine answers" in done.stderr.lower()
    assert "hint: start docker" in done.stderr.lower()


def test_an_image_is_built_and_only_its_id_is_on_stdout(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    heard: list[dict[str, object]] = []

    def build_image(directory: Path, **options: object) -> BuiltImage:
        heard.append({"directory": directory, **options})
        builder = str(options["builder"] or "podman")
        return BuiltImage(f"sha256:{'1' * 64}", "orch/train:12", builder, builder == "podman", "2" * 64, "")

    monkeypatch.setattr(image_build, "build_image", build_image)
    said = cli("image", "build", "train", "--base", "debian", "--lock", "cpu.lock", "--tag", "x")
    assert (said.code, said.out) == (0, f"sha256:{'1' * 64}\n")
    assert "orch image lock orch/train:12" in said.err
    given = {"directory": Path("train"), "base": "debian", "lock": Path("cpu.lock"), "tag": "x", "builder": None}
    assert heard == [{**given, "tell": None}]
    said = cli("image", "build", "train", "--builder", "docker", "--json")
    assert said.document["reproducible"] is False
    assert "docker gives this image another id each time" in said.err


def test_an_image_that_cannot_be_built(cli: Cli, tmp_path: Path) -> None:
    said = cli("image", "build", tmp_path, "--json")
    assert (said.code, said.document["error"]["type"]) == (2, "SpecError")
    assert "Dockerfile" in said.err
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    (tmp_path / "requirements.lock").write_text("torch==2.13.0\n")
    said = cli("image", "build", tmp_path)
    assert (said.code, said.out) == (2, "")
    assert "torch==2.13.0 has no --hash" in said.err


def test_images_have_names(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no images have names here" in cli("image", "ls").out
    pin = "ghcr.io/lab/train@sha256:" + "a" * 64
    said = cli("image", "lock", pin, "--name", "train")
    assert said.out.splitlines()[0] == pin
    assert "write container.image: train" in said.out
    assert cli("image", "ls").out == f"train  {pin}  (from {pin})\n"
    (listed,) = cli("image", "ls", "--json").document
    assert (listed["name"], listed["image"]) == ("train", pin)
    assert cli("image", "lock", pin, "--name", "train", "--json").document["before"] == pin


# --- what never happens: tracebacks, noise


def test_a_bug_is_one_line_with_a_report(
    cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(describe, "find_run", broken)
    said = cli("status", "x")
    assert said.code == 70
    assert "ZeroDivisionError: surprise" in said.err
    (report,) = (tmp_path / "state" / "crashes").iterdir()
    assert str(report) in said.err
    assert "Traceback" in report.read_text()


def test_a_bug_with_json_is_a_document(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "find_run", lambda *arguments: 1 / 0)
    assert cli("status", "x", "--json").document["error"]["exit_code"] == 70


def test_ctrl_c_is_quiet(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(describe, "find_run", interrupted)
    said = cli("status", "x")
    assert (said.code, said.out, said.err) == (130, "", "")


def test_ctrl_c_while_following_says_that_the_run_goes_on(
    cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = world.running()

    def interrupted(*arguments: object, **options: object) -> Iterator[object]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(operations, "logs", interrupted)
    said = cli("logs", "-f", run)
    assert (said.code, said.out) == (130, "")
    assert f"the run goes on. Look again:  orch logs -f {run}" in said.err


def test_a_reader_that_leaves_is_no_error(world: World) -> None:
    run, agent = world.running()
    world.paths(run).rank_log(0, 0).write_text("line\n" * 200_000)
    agent.end("completed", "completed")
    command = f"{sys.executable} -m orchestrator logs {world.paths(run).run_dir} | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "line\n", "")


def test_on_a_terminal_colours_elsewhere_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    fancy, plain, piped = Terminal(), Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", fancy)
    out.line(("failed", "bold red"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", plain)
    out.line(("failed", "bold red"))
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys, "stdout", piped)
    out.line(("failed", "bold red"))
    assert "\x1b[" in fancy.getvalue()
    assert plain.getvalue() == piped.getvalue() == "failed\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.9, "59 s"), (125, "2 m 05 s"), (14400, "4 h 00 m"), (200000, "2 d 07 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes() -> None:
    assert [size(number) for number in (0, 999, 1000, 1_234_567_890)] == ["0 B", "999 B", "1.0 kB", "1.2 GB"]


def test_completion_of_run_ids_is_cheap_and_quiet(world: World) -> None:
    from orchestrator.cli.complete import run_ids

    assert run_ids("job") == []
    done = world.submit()
    assert run_ids("job-") == [done.run_id]
    assert run_ids("x") == []


def test_an_unwritable_state_directory_does_not_hide_a_bug(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ORCH_STATE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(describe, "find_run", lambda *arguments: 1 / 0)
    assert main(["status", "x"]) == failures.CRASHED
    assert "ORCH_DEBUG=1" in capsys.readouterr().err


# --- doctor -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("levels", "sum_of_all"),
    [
        ([Level.OK], "nothing is wrong"),
        ([Level.WARN, Level.WARN], "nothing is wrong, 2 things to know"),
        ([Level.BAD, Level.OK], "1 wrong"),
    ],
)
def test_doctor_counts_only_what_there_is(levels: list[Level], sum_of_all: str) -> None:
    from orchestrator.cli.examined import examined_lines

    examined = Examined(tuple(Finding("topic", level, "words") for level in levels), SaveSeconds())
    assert examined_lines(examined, ("v", "!", "x"))[-1][0][0] == sum_of_all


def test_doctor_tells_level_words_and_fix(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = (
        Finding("slurm", Level.OK, "Slurm 24.11"),
        Finding("caches", Level.WARN, "small", "set caches", Family.DISK),
        Finding("root", Level.BAD, "full", "make room", Family.DISK),
    )
    asked: dict[str, object] = {}

    def doctor(spec: Path | None, **options: object) -> Examined:
        asked.update(options, spec=spec)
        return Examined(findings, SaveSeconds(60, 120, 30))

    monkeypatch.setattr(operations, "doctor", doctor, raising=False)
    said = cli("doctor", "--node", "--partition", "p", "--timeout", "5m")
    assert said.code == 6
    assert said.out.splitlines() == [
        "  ✔ slurm  Slurm 24.11",
        "  ! caches small",
        "           do: set caches",
        "  ✘ root   full",
        "           do: make room",
        "1 wrong, 1 thing to know",
    ]
    assert (asked["node"], asked["partition"], asked["start_s"], asked["spec"]) == (True, "p", 300.0, None)
    said = cli("doctor", "--json")
    assert (said.code, said.document["ok"]) == (6, False)
    assert said.document["save_seconds"] == {"preemption": 60, "time_limit": 120, "requeue_by_admin": 30}


def test_doctor_set_needs_a_spec(cli: Cli) -> None:
    assert cli("doctor", "--set", "name=x").code == 2


def test_marks_fall_back_to_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert out.marks() == ("ok", "!", "x")


# --- ckpt


def committed(world: World, run: str, *steps: int) -> list[Manifest]:
    store = open_run_store(world.paths(run))
    _, fence = take_over(store, attempt=0)
    for step in steps:
        store.commit(fence, lambda f, s=step: f.write(b"state %d" % s), step=step, epoch=1, world_size=1)  # type: ignore[misc]
    return store.manifests()


def test_ckpt_ls(cli: Cli, world: World) -> None:
    run = world.ended("failed", "failure")
    assert cli("ckpt", "ls", run).out == "no checkpoint was committed yet\n"
    assert cli("ckpt", "ls", run, "--json").document == []
    committed(world, run, 10, 1200)
    said = cli("ckpt", "ls", run)
    assert said.out.splitlines()[0].split() == ["step", "epoch", "attempt", "size", "age", "valid", "path"]
    assert said.out.splitlines()[1].startswith("1 200  1")
    rows = cli("ckpt", "ls", run, "--json").document
    assert [row["step"] for row in rows] == [1200, 10]
    assert set(rows[0]) == {"step", "epoch", "attempt", "path", "size_bytes", "sha256", "valid", "committed_at"}
    assert (rows[0]["valid"], rows[0]["size_bytes"], rows[0]["attempt"]) == (True, 10, 0)


def test_ckpt_verify_ends_with_5_when_one_is_damaged(cli: Cli, world: World) -> None:
    run = world.ended("failed", "failure")
    newest = committed(world, run, 10, 20)[0]
    assert "2 of 2 match" in cli("ckpt", "verify", run).out
    newest.path.write_bytes(b"STATE 20")
    said = cli("ckpt", "verify", run)
    assert said.code == 5
    assert "damaged: step 20" in said.err
    said = cli("ckpt", "verify", run, "--json")
    assert (said.code, [row["valid"] for row in said.document]) == (5, [False, True])
    assert cli("ckpt", "verify", run, "--step", "10").code == 0
    said = cli("ckpt", "verify", run, "--step", "11", "--json")
    assert (said.code, said.document["error"]["exit_code"]) == (5, 5)


def test_ckpt_verify_says_what_damage_means_for_the_run(cli: Cli, world: World) -> None:
    run = world.ended("failed", "failure")
    newest, middle, oldest = committed(world, run, 10, 20, 30)
    middle.path.write_bytes(b"STATE 20")
    said = cli("ckpt", "verify", run)
    assert (said.code, "the newest, step 30, matches" in said.err) == (5, True)
    newest.path.write_bytes(b"STATE 30")
    said = cli("ckpt", "verify", run)
    assert "damaged: step 30, 20" in said.err
    assert "would go on from step 10" in said.err
    assert f"orch ckpt verify {run}" in cli("ckpt", "verify", run, "--step", "30").err
    oldest.path.write_bytes(b"STATE 10")
    said = cli("ckpt", "verify", run)
    assert "none matches" in said.err
    assert "goes on from" not in said.err


def test_ckpt_gc_names_the_damaged_ones_one_a_line(cli: Cli, world: World) -> None:
    run = world.ended("failed", "failure")
    for manifest in committed(world, run, 10, 20, 1030):
        manifest.path.write_bytes(b"?")
    said = cli("ckpt", "gc", run, "--dry-run")
    assert said.code == 5
    assert [line.partition(":")[0] for line in said.err.splitlines()[1:4]] == ["  step 1 030", "  step 20", "  step 10"]
    assert all(line.count(".ckpt") == 1 for line in said.err.splitlines()[1:4])
    assert cli("ckpt", "gc", run).code == 5
    assert cli("ckpt", "gc", run, "--json").document["error"]["exit_code"] == 5


def test_ckpt_commands_name_the_emergency_save_that_waits(
    cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.ended("failed", "failure")
    committed(world, run, 10)
    refuge = Refuge(world.paths(run).run_dir / "waiting")
    monkeypatch.setattr(checkpoints, "_refuge", lambda store, paths: refuge)
    assert "no emergency save waits" in cli("ckpt", "push", run).out
    fence = open_run_store(world.paths(run)).owner()
    assert fence is not None
    refuge.open().commit(fence, lambda f: f.write(b"waits"), step=902, epoch=1, world_size=1)
    said = cli("ckpt", "gc", run, "--dry-run")
    assert "the emergency save of step 902 would first be uploaded" in said.err
    assert "892 steps and 1 newer checkpoint are given up" in cli("ckpt", "rollback", run, "--step", "10").out
    said = cli("ckpt", "push", run)
    assert (said.code, "the emergency save of step 902 was given up" in said.out) == (0, True)


def test_ckpt_rollback_of_one_step(cli: Cli, world: World) -> None:
    run = world.ended("failed", "failure")
    committed(world, run, 10, 11)
    assert "1 step and 1 newer checkpoint are given up" in cli("ckpt", "rollback", run, "--step", "10").out


def test_ckpt_pull(cli: Cli, world: World, tmp_path: Path) -> None:
    run = world.ended("failed", "failure")
    committed(world, run, 10, 20)
    assert "step 20" in cli("ckpt", "pull", run, tmp_path / "copy").out
    document = cli("ckpt", "pull", run, tmp_path / "copy", "--step", "10", "--json").document
    assert Path(document["path"]).read_bytes() == b"state 10"
    assert Path(document["manifest"]).is_file()


def test_ckpt_gc(cli: Cli, world: World) -> None:
    run = world.ended("failed", "failure")
    committed(world, run, 1, 2, 3, 4)
    assert "2 files would be removed" in cli("ckpt", "gc", run, "--dry-run").out
    document = cli("ckpt", "gc", run, "--json").document
    assert (len(document["removed"]), document["steps_left"], document["dry_run"]) == (2, [4, 3, 2], False)
    assert document["freed_bytes"] > 0
    assert "0 files removed" in cli("ckpt", "gc", run).out


def test_ckpt_rollback(cli: Cli, world: World) -> None:
    run = world.ended("failed", "failure")
    committed(world, run, 10, 20, 30)
    said = cli("ckpt", "rollback", run, "--step", "20")
    assert said.code == 0
    assert "10 steps and 1 newer checkpoint are given up" in said.out
    assert f"orch resume {run}" in said.out
    assert cli("ckpt", "rollback", run, "--step", "30").code == 5
    document = cli("ckpt", "rollback", run, "--step", "10", "--yes", "--json").document
    assert (document["step"], document["checkpoints_given_up"]) == (10, 1)
    assert cli("status", run, "--json").document["last_checkpoint"]["step"] == 10


def test_ckpt_rollback_asks_on_a_terminal(cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = world.ended("failed", "failure")
    committed(world, run, 10, 20)
    answers = io.StringIO("n\ny\n")
    monkeypatch.setattr(answers, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", answers)
    said = cli("ckpt", "rollback", run, "--step", "10")
    assert (said.code, "nothing was changed" in said.err) == (7, True)
    said = cli("ckpt", "rollback", run, "--step", "10")
    assert (said.code, "rolled back to step 10" in said.out) == (0, True)

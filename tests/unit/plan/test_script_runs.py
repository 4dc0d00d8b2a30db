"""The rendered script, executed by bash with stand-ins for srun and the agent: exit codes, signals, order of events."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.plan import render_plan
from orchestrator.spec import parse_spec
from tests.polling import poll

# srun: notes its arguments and each USR1, and ends with the code in the file `code` once the file `end` is there.
SRUN = """#!/bin/bash
trap 'echo told >> "$STAGE/log"' USR1
trap 'echo "srun got TERM" >> "$STAGE/log"; exit 137' TERM
echo "srun $ORCH_ATTEMPT_BASE $ORCH_TOLD" >> "$STAGE/log"
until [ -e "$STAGE/end" ]; do sleep 0.02; done
exit "$(cat "$STAGE/code")"
"""
PYTHON = """#!/bin/bash
if [ "$3" = ready ]; then
  echo "agent ready $4" >> "$STAGE/log"
  cat "$STAGE/ready"
  exit "$(cat "$STAGE/ready-code")"
fi
echo "agent $3 status $6" >> "$STAGE/log"
exit "$(cat "$STAGE/finish-code")"
"""


class Stage:
    """A node with stand-ins on PATH."""

    def __init__(self, directory: Path, after: tuple[str, ...] = (), **slurm: Any) -> None:
        self.directory = directory
        for name, text in (("srun", SRUN), ("python", PYTHON)):
            (directory / name).write_text(text)
            (directory / name).chmod(0o755)
        spec = {"name": "run", "backend": "slurm", "job": {"module": "m"}, "slurm": slurm, "after": after}
        plan = render_plan(
            parse_spec(spec, base_dir=directory),
            run_id="run-0123456789",
            root=directory,
            code_hash="c",
            library_hash="d",
            attempt_base=4,
            python=str(directory / "python"),
        )
        (directory / "script").write_text(plan.script)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, code: int = 0, finish: int = 0) -> None:
        (self.directory / "code").write_text(str(code))
        (self.directory / "finish-code").write_text(str(finish))
        environ = {"PATH": f"{self.directory}:{os.environ['PATH']}", "STAGE": str(self.directory)}
        script = self.directory / "script"
        self.process = subprocess.Popen(["bash", script], env=environ, start_new_session=True)

    def log(self) -> list[str]:
        path = self.directory / "log"
        return path.read_text().splitlines() if path.exists() else []

    def end(self) -> int:
        (self.directory / "end").touch()
        assert self.process is not None
        return self.process.wait(timeout=60)


NewStage = Callable[..., Stage]


@pytest.fixture
def new_stage(tmp_path: Path) -> Iterator[NewStage]:
    """Makes stages; whatever a failing test leaves running is ended."""
    stages: list[Stage] = []

    def make(**slurm: Any) -> Stage:
        stages.append(Stage(tmp_path, **slurm))
        return stages[-1]

    yield make
    for stage in stages:
        if stage.process is not None:
            with contextlib.suppress(ProcessLookupError):  # of a script that has ended, its srun may live on
                os.killpg(stage.process.pid, signal.SIGKILL)
            stage.process.wait()


@pytest.mark.parametrize(("code", "finish"), [(0, 0), (75, 75), (1, 1), (137, 75), (93, 93)])
def test_the_agent_judges_and_its_code_is_the_script_s(new_stage: NewStage, code: int, finish: int) -> None:
    stage = new_stage()
    stage.start(code=code, finish=finish)
    assert stage.end() == finish
    assert stage.log() == ["srun 4 0", f"agent finish status {code}"]


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_every_notice_reaches_srun_as_usr1_and_the_wait_goes_on(new_stage: NewStage, signum: int) -> None:
    stage = new_stage()
    stage.start(code=75, finish=75)
    poll(lambda: stage.log() == ["srun 4 0"], "the stand-ins")
    assert stage.process is not None
    for number in (1, 2):
        stage.process.send_signal(signum)
        poll(lambda n=number: stage.log().count("told") == n, "the stand-ins")
    assert stage.process.poll() is None
    assert stage.end() == 75
    assert stage.log() == ["srun 4 0", "told", "told", "agent finish status 75"]


def test_a_notice_is_not_lost_to_the_cont_that_comes_with_it(new_stage: NewStage) -> None:
    """Slurm sends both, in either order; bash lost the first of two that were trapped."""
    stage = new_stage()
    stage.start(code=75, finish=75)
    poll(lambda: stage.log() == ["srun 4 0"], "the stand-ins")
    assert stage.process is not None
    for number in range(1, 31):
        for signum in (signal.SIGUSR1, signal.SIGCONT) if number % 2 else (signal.SIGCONT, signal.SIGUSR1):
            stage.process.send_signal(signum)
        poll(lambda n=number: stage.log().count("told") == n, "the notice")
    assert stage.end() == 75


def test_no_pair_of_notices_ends_the_wait_for_srun(new_stage: NewStage) -> None:
    """What comes after it would judge, and requeue, a job that is still saving."""
    stage = new_stage()
    stage.start(code=75, finish=75)
    poll(lambda: stage.log() == ["srun 4 0"], "the stand-ins")
    assert stage.process is not None
    for number in range(400):
        stage.process.send_signal(signal.SIGUSR1)
        busy = time.perf_counter() + (number % 20) * 1e-4  # where the second one meets bash in the first one's trap
        while time.perf_counter() < busy:
            pass
        stage.process.send_signal(signal.SIGTERM)
        poll(lambda: is_sleeping(stage.process), "the trap's end")
        assert "agent" not in "".join(stage.log()), f"given up at the {number}. pair"
    assert stage.end() == 75
    assert stage.log()[-1] == "agent finish status 75"


def is_sleeping(process: subprocess.Popen[bytes] | None) -> bool:
    assert process is not None
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "SZ"


def test_cont_alone_ends_no_wait(new_stage: NewStage) -> None:
    stage = new_stage()
    stage.start(code=0)
    poll(lambda: stage.log() == ["srun 4 0"], "the stand-ins")
    assert stage.process is not None
    stage.process.send_signal(signal.SIGCONT)
    assert stage.end() == 0
    assert stage.log() == ["srun 4 0", "agent finish status 0"]


def test_agents_begin_with_a_notice_that_came_during_set_up(new_stage: NewStage, tmp_path: Path) -> None:
    stage = new_stage(setup=['touch "$STAGE/setting-up"', 'until [ -e "$STAGE/set-up" ]; do sleep 0.02; done'])
    stage.start(code=75, finish=75)
    poll((tmp_path / "setting-up").exists, "the stand-ins")
    assert stage.process is not None
    stage.process.send_signal(signal.SIGUSR1)
    (tmp_path / "set-up").touch()
    poll(lambda: stage.log() == ["srun 4 1"], "the stand-ins")
    assert stage.end() == 75


def test_an_unset_variable_in_set_up_is_the_user_s_business(new_stage: NewStage) -> None:
    stage = new_stage(setup=['echo "x $NOT_SET" > /dev/null'])
    stage.start()
    assert stage.end() == 0


def test_a_run_that_may_start_counts_its_attempts_from_what_the_agent_says(tmp_path: Path) -> None:
    stage = Stage(tmp_path, after=("first",))
    (tmp_path / "ready").write_text("3")
    (tmp_path / "ready-code").write_text("0")
    (tmp_path / "end").touch()
    stage.start()
    assert stage.process is not None
    assert stage.process.wait(timeout=60) == 0
    run_dir = tmp_path / "runs" / "run-0123456789"
    assert stage.log() == [f"agent ready {run_dir}", "srun 3 0", "agent finish status 0"]


def test_a_run_that_has_to_wait_again_starts_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path, after=("first",))
    (tmp_path / "ready").write_text("")
    (tmp_path / "ready-code").write_text("75")
    stage.start()
    assert stage.process is not None
    assert stage.process.wait(timeout=60) == 75
    assert stage.log() == [f"agent ready {tmp_path / 'runs' / 'run-0123456789'}"]


# An srun that never hears of its dead slurmstepd; the agent held the pipe for a moment.
DEAF_SRUN = """#!/bin/bash
echo "srun" >> "$STAGE/log"
( exec 9<>"$ORCH_ALIVE"; until [ -e "$STAGE/die" ]; do sleep 0.02; done ) &
wait
while :; do sleep 0.02; done
"""


def test_an_srun_that_outlives_its_agent_is_given_up(new_stage: NewStage, tmp_path: Path) -> None:
    stage = new_stage()
    script = tmp_path / "script"
    assert " -t 60 " in script.read_text()
    script.write_text(script.read_text().replace(" -t 60 ", " -t 1 "))
    (tmp_path / "srun").write_text(DEAF_SRUN)
    stage.start(finish=75)
    poll(lambda: stage.log() == ["srun"], "srun")
    assert stage.process is not None
    with pytest.raises(subprocess.TimeoutExpired):
        stage.process.wait(timeout=1.5)
    (tmp_path / "die").touch()
    assert stage.process.wait(timeout=60) == 75
    assert stage.log()[-1] == "agent finish status 137"


def test_without_the_pipe_nobody_is_watched_and_nobody_killed(new_stage: NewStage, tmp_path: Path) -> None:
    stage = new_stage()
    script = tmp_path / "script"
    script.write_text(script.read_text().replace(" -t 60 ", " -t 0.1 ").replace("/dev/shm/", f"{tmp_path}/nowhere/"))
    stage.start()
    poll(lambda: len(stage.log()) == 1, "srun")
    assert stage.process is not None
    with pytest.raises(subprocess.TimeoutExpired):
        stage.process.wait(timeout=1.5)
    assert stage.end() == 0
    assert stage.log()[-1] == "agent finish status 0"


def test_a_node_that_has_ended_well_hurries_nobody(new_stage: NewStage, tmp_path: Path) -> None:
    """A command may run, or save, longer on another node: that is no reason to kill it."""
    stage = new_stage()
    script = tmp_path / "script"
    script.write_text(script.read_text().replace(" -t 60 ", " -t 0.1 "))
    holder = 'exec 9<>"$ORCH_ALIVE"; until [ -e "$STAGE/die" ]; do sleep 0.02; done; echo done >&9'
    (tmp_path / "srun").write_text(SRUN.replace("until", f"( {holder}; exec 9>&-; touch $STAGE/gone ) &\nuntil"))
    stage.start()
    poll(lambda: len(stage.log()) == 1, "srun")
    (tmp_path / "die").touch()
    poll((tmp_path / "gone").exists, "the first node's end")
    assert stage.process is not None
    with pytest.raises(subprocess.TimeoutExpired):
        stage.process.wait(timeout=1.5)
    assert stage.end() == 0
    assert stage.log()[-1] == "agent finish status 0"


def test_nobody_else_gets_at_the_pipe(new_stage: NewStage, tmp_path: Path) -> None:
    """Everybody may make files in /dev/shm, and numbers of processes are easily guessed."""
    stage = new_stage()
    note = 'dir=${ORCH_ALIVE%/*}; echo "$dir" > "$STAGE/where"; stat -c "%a %u" "$dir" > "$STAGE/mode"'
    (tmp_path / "srun").write_text(SRUN.replace("until", f"{note}\nuntil"))
    stage.start()
    assert stage.end() == 0
    assert (tmp_path / "mode").read_text().split() == ["700", str(os.getuid())]
    assert not Path((tmp_path / "where").read_text().strip()).exists()


def test_being_continued_during_set_up_is_no_notice(new_stage: NewStage, tmp_path: Path) -> None:
    """Slurm continues a suspended job; that is not being told to stop."""
    stage = new_stage(setup=['touch "$STAGE/setting-up"', 'until [ -e "$STAGE/set-up" ]; do sleep 0.02; done'])
    stage.start()
    poll((tmp_path / "setting-up").exists, "the stand-ins")
    assert stage.process is not None
    stage.process.send_signal(signal.SIGCONT)
    (tmp_path / "set-up").touch()
    poll(lambda: stage.log() == ["srun 4 0"], "the stand-ins")
    assert stage.end() == 0

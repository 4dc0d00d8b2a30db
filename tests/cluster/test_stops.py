"""Every way a cluster can stop a job, on the real thing: what the run says of it, what it costs, what is left over.

One row per cause; docs/preemption.md shows what they gave. `make stop-table` runs every row on all its runtimes.
Elsewhere a row whose outcome no engine can change runs without one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import processes
from tests.cluster.handle import Cluster
from tests.cluster.orch import REPOSITORY, TERMINAL, Orch
from tests.cluster.programs import COLLECTIVE, CRASHER, EATER, LIGHTNING, said, script_spec
from tests.cluster.scene import ALL_RUNTIMES, EVERY_STEPS, Scene, Stop, record

CAME_BACK = ("preempted", "completed")
WITHIN_S = 300  # from the stop to the next new step or the final state; the time limit is twice as far away


# --- what happens, one function per cause; each marks the moment of the stop ---------------------------------------
def preempt(scene: Scene) -> None:
    scene.mark()
    scene.cluster.preempt(nodes=3, seconds=1)


def preempt_by_qos(scene: Scene) -> None:
    scene.mark()
    scene.cluster.sbatch(
        "--partition=low", "--qos=urgent", "--nodes=3", "--exclusive", "--mem=0", "--time=5", wrap="sleep 1"
    )


def requeue_by_admin(scene: Scene) -> None:
    scene.mark()
    scene.cluster.run("scontrol", "requeue", scene.job)


def hold_by_admin(scene: Scene) -> None:
    scene.mark()
    scene.cluster.run("scontrol", "requeuehold", scene.job)
    scene.cluster.wait("the status to say so", lambda: "scontrol release" in told(scene), timeout=60)
    assert scene.orch.status(scene.run)["state"] == "preempted"
    scene.cluster.run("scontrol", "release", scene.job)


def told(scene: Scene) -> str:
    """What `orch status` says to people."""
    return scene.orch.call("status", scene.run, "--root", str(scene.orch.root)).stdout


def nothing(scene: Scene) -> None:
    """The time limit comes by itself."""
    scene.mark()


def scancel(scene: Scene) -> None:
    scene.mark()
    scene.cluster.run("scancel", scene.job)


def scancel_in_the_queue(scene: Scene) -> None:
    assert scene.orch.status(scene.run)["state"] == "queued"
    scancel(scene)


def scancel_during_a_save(scene: Scene) -> None:
    scene.wait_paused()
    scancel(scene)
    scene.wait_signalled()
    scene.go()


def orch_cancel(scene: Scene) -> None:
    scene.mark()
    scene.orch.json("cancel", scene.run)


def kill_slurmd(scene: Scene) -> None:
    """Slurm gives the node up after SlurmdTimeout and starts the job elsewhere; here the old one works on."""
    (node,) = scene.orch.attempts(scene.run)[0]["nodes"]
    scene.mark()
    scene.cluster.stop(node, signal="SIGKILL")
    scene.cluster.wait("the next attempt", lambda: len(scene.orch.attempts(scene.run)) == 2, timeout=300)
    scene.cluster.wait("the old one to be fenced", lambda: fenced(scene) is not None, timeout=120)
    fenced_at = fenced(scene)
    assert fenced_at is not None and fenced_at > scene.orch.attempts(scene.run)[1]["started"], "both live for a while"


def fenced(scene: Scene) -> float | None:
    """When it was."""
    path = scene.directory / "verdict-000.json"
    verdict = json.loads(path.read_text()) if path.exists() else {}
    return verdict["time"] if verdict.get("outcome") == "fenced" else None


def kill_agent(scene: Scene) -> None:
    scene.mark()
    scene.kill_agent()


def kill_agent_whose_leash_holds(scene: Scene) -> None:
    """Somebody else holds the FIFO open, so PID 1 never learns that its agent is gone."""
    (leash,) = Path(f"/dev/shm/orch-{os.getuid()}").glob(f"{scene.run}.0.*/leash")
    held = os.open(leash, os.O_RDWR)
    try:
        kill_agent(scene)
        scene.cluster.wait(
            "the old one to end", lambda: fenced(scene) or scene.orch.attempt(scene.run) == 1, timeout=90
        )
    finally:
        os.close(held)


def kill_pid_1(scene: Scene) -> None:
    scene.mark()
    scene.kill_pid_1()


def kill_a_rank(scene: Scene) -> None:
    scene.mark()
    for pid in scene.ranks():
        os.kill(pid, signal.SIGKILL)


def kill_a_rank_during_a_save(scene: Scene) -> None:
    scene.wait_paused()
    kill_a_rank(scene)


def kill_slurmstepd(scene: Scene) -> None:
    stepd = processes.parent(scene.agent())
    assert Path(f"/proc/{stepd}/comm").read_text().startswith("slurmstepd")
    scene.mark()
    os.kill(stepd, signal.SIGKILL)
    scene.cluster.wait("the program to die", lambda: processes.of_run(scene.run) == [], timeout=60)


def restart_dockerd(scene: Scene) -> None:
    scene.mark()
    scene.cluster.stop("dockerd", signal="SIGKILL")
    scene.cluster.start_daemon("dockerd")


def slurmctld_restarts_while_saving(scene: Scene) -> None:
    preempt(scene)
    scene.wait_signalled()
    scene.cluster.stop("slurmctld", signal="SIGKILL")
    scene.go()
    scene.wait_event("verdict")
    scene.cluster.start_daemon("slurmctld")


def slurmctld_hangs_while_requeueing(scene: Scene) -> None:
    scene.mark()
    scene.notice("USR1")
    pid = scene.cluster.pid("slurmctld")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        scene.go()
        scene.wait_event("verdict")
        scene.cluster.wait("a question without an answer", lambda: asking(scene), timeout=60, interval=0.05)
    finally:
        os.kill(pid, signal.SIGCONT)


def asking(scene: Scene) -> bool:
    """The end of the batch script waits for an answer of scontrol."""
    job = scene.orch.attempts(scene.run)[0]["job_id"]
    return bool(processes.commands("scontrol", "show", "job", "-o", job))


def slurmctld_stays_away(scene: Scene) -> None:
    agent = scene.agent()
    scene.mark()
    scene.cluster.stop("slurmctld", signal="SIGKILL")
    os.kill(agent, signal.SIGUSR1)
    sidecar = scene.directory / "sidecar.json"
    scene.cluster.wait("the run to say what it needs", lambda: '"needs_resume"' in sidecar.read_text(), timeout=150)
    scene.cluster.start_daemon("slurmctld")


def drill(scene: Scene) -> None:
    scene.mark()
    scene.orch.json("preempt", scene.run)


def notice_before_the_first_step(scene: Scene) -> None:
    scene.wait_event("attempt_started")
    scene.mark()
    os.kill(scene.agent(), signal.SIGUSR1)


def notice_while_paused(scene: Scene) -> None:
    scene.wait_paused()
    scene.mark()
    scene.notice("USR1")
    scene.go()


def notice_during_the_export(scene: Scene) -> None:
    (scene.directory / "enough").touch()
    notice_while_paused(scene)


def two_notices(*names: str) -> Callable[[Scene], None]:
    """The second comes while the program has not answered the first."""

    def act(scene: Scene) -> None:
        scene.wait_paused()
        scene.mark()
        scene.notice(*names)
        assert set(scene.signals()) == {f"SIG{name}" for name in names}
        scene.go()

    return act


def preempt_a_rank_that_hangs(scene: Scene) -> None:
    scene.cluster.wait("step 50", lambda: scene.orch.step(scene.run) == 50, timeout=60)
    drill(scene)


def hang(scene: Scene) -> None:
    scene.cluster.wait("step 50", lambda: scene.orch.step(scene.run) == 50, timeout=60)
    scene.mark()
    scene.wait_event("attempt_started")
    stacks = [scene.directory / "logs" / "attempt-000" / f"stack-rank-{rank}.txt" for rank in (0, 1)]
    scene.cluster.wait("the stacks", lambda: all(path.exists() and path.read_text() for path in stacks), timeout=60)
    scene.cluster.wait("rank 1's", lambda: "stand_still" in stacks[1].read_text(), timeout=60)


def mend(scene: Scene) -> None:
    """Nothing to do for the crash; what makes the resume work comes after it."""
    scene.mark()
    scene.orch.wait_for_state(scene.run, "failed", timeout=120)
    (scene.directory / "mended").touch()


def feed(scene: Scene) -> None:
    scene.mark()
    scene.orch.wait_for_state(scene.run, "failed", timeout=120)
    (scene.directory / "fed").touch()


# --- settings of the spec ------------------------------------------------------------------------------------------
def partition(name: str, **more: Any) -> dict[str, Any]:
    return {"slurm": {"partition": name, **more}}


def paused(point: str, **more: Any) -> dict[str, Any]:
    return {"env": {"PAUSE_AT": point}, "preemption": {"lead_time": "90s"}, **more}


RETRY = {"retry": {"failure": 1, "backoff": "1s"}}
USER_SIGNAL = ("SlurmctldParameters=preempt_send_user_signal",)
QOS = ("PreemptType=preempt/qos", "PreemptMode=REQUEUE", "AccountingStorageEnforce=associations,qos")
TWO_RANKS = {"torchrun": {"nproc_per_node": 2}, "resources": {"mem": "2G", "cpus_per_task": 2, "time": "00:10:00"}}
TWICE = paused("save")
TORCH = {"resources": {"mem": "2G", "time": "00:10:00"}}

STOPS = (
    Stop(
        "preemption, Slurm's defaults (GraceTime=20)",
        preempt,
        CAME_BACK,
        by_slurm=True,
        runtimes=ALL_RUNTIMES,
        by_engine=True,
    ),
    Stop(
        "preemption, preempt_send_user_signal with `B:` (ours)",
        preempt,
        CAME_BACK,
        settings=USER_SIGNAL,
        by_slurm=True,
    ),
    Stop(
        "preemption, preempt_send_user_signal without `B:`",
        preempt,
        CAME_BACK,
        settings=USER_SIGNAL,
        spec={"slurm": {"partition": "low", "template": "without_b.sbatch.j2"}},
        by_slurm=True,
    ),
    Stop(
        "preemption, GraceTime=0",
        preempt,
        ("requeued_by_admin", "completed"),  # Slurm 22.05 tells it apart from an administrator's nowhere
        spec=partition("nograce"),
        by_slurm=True,
        by_engine=True,
    ),
    Stop("preemption, PreemptMode=CANCEL", preempt, CAME_BACK, spec=partition("cancel"), by_slurm=True),
    Stop("preemption, JobRequeue=0", preempt, CAME_BACK, settings=("JobRequeue=0",), by_slurm=True),
    Stop("preemption by QOS", preempt_by_qos, CAME_BACK, settings=QOS, spec=partition("low", qos="low"), by_slurm=True),
    Stop(
        "time limit",
        nothing,
        ("time_limit", "completed"),
        spec={"resources": {"mem": "500M", "time": "00:02:00"}, "preemption": {"lead_time": "30s"}},
        by_slurm=True,
        by_engine=True,
    ),
    Stop("`scontrol requeue` by an administrator", requeue_by_admin, ("requeued_by_admin", "completed"), by_slurm=True),
    Stop(
        "`scontrol requeuehold` (JobHeldAdmin), then released",
        hold_by_admin,
        ("requeued_by_admin", "completed"),
        by_slurm=True,
    ),
    Stop(
        "`scancel` before start",
        scancel_in_the_queue,
        (),
        state="cancelled",
        spec=partition("low", begin="now+1hour"),
        resume=("--set", "slurm.begin=null"),
        begin_at=0,
    ),
    Stop(
        "`scancel` while running",
        scancel,
        ("cancelled",),
        state="cancelled",
        by_slurm=True,
        runtimes=ALL_RUNTIMES,
        by_engine=True,
    ),
    Stop(
        "`scancel` during a save",
        scancel_during_a_save,
        ("cancelled",),
        state="cancelled",
        spec=paused("save"),
        by_engine=True,
    ),
    Stop("`orch cancel`", orch_cancel, ("cancelled",), state="cancelled"),
    Stop(
        "node failure: slurmd killed, SlurmdTimeout=10",
        kill_slurmd,
        ("node_failure", "completed"),
        settings=("SlurmdTimeout=10",),
        lost=EVERY_STEPS,
        takeover=True,
        begin_at=EVERY_STEPS + 5,
        by_slurm=True,
        by_engine=True,
    ),
    Stop(
        "slurmstepd killed",
        kill_slurmstepd,
        ("node_failure", "completed"),
        runtimes=ALL_RUNTIMES,
        lost=EVERY_STEPS,
        begin_at=EVERY_STEPS + 5,
        by_slurm=True,
        by_engine=True,
    ),
    Stop(
        "agent killed",
        kill_agent,
        ("node_failure", "completed"),
        lost=EVERY_STEPS,
        begin_at=EVERY_STEPS + 5,
        runtimes=ALL_RUNTIMES,
        by_engine=True,
    ),
    Stop(
        "agent killed while its leash is held open",
        kill_agent_whose_leash_holds,
        ("node_failure", "completed"),
        spec=partition("low", nodelist="n1"),
        lost=EVERY_STEPS,
        takeover=True,
        begin_at=EVERY_STEPS + 5,
        by_engine=True,
    ),
    Stop(
        "PID 1 killed",
        kill_pid_1,
        ("failure", "completed"),
        spec=RETRY,
        lost=EVERY_STEPS,
        begin_at=EVERY_STEPS + 5,
        runtimes=ALL_RUNTIMES,
        by_engine=True,
    ),
    Stop(
        "rank killed",
        kill_a_rank,
        ("failure", "completed"),
        spec=RETRY,
        lost=EVERY_STEPS,
        begin_at=EVERY_STEPS + 5,
        by_engine=True,
    ),
    Stop(
        "rank killed during a save",
        kill_a_rank_during_a_save,
        ("failure", "completed"),
        spec={**RETRY, **paused("save")},
        lost=EVERY_STEPS,
    ),
    Stop(
        "dockerd killed and restarted",
        restart_dockerd,
        CAME_BACK,  # an engine that starts tells the containers it finds to end, and so they save
        runtimes=("docker",),
        lost=EVERY_STEPS,
        begin_at=EVERY_STEPS + 5,
        by_engine=True,
    ),
    Stop(
        "slurmctld killed while saving, and restarted",
        slurmctld_restarts_while_saving,
        CAME_BACK,
        spec=paused("save"),
        begin_at=EVERY_STEPS - 3,
    ),
    Stop(
        "slurmctld hangs while requeueing",
        slurmctld_hangs_while_requeueing,
        CAME_BACK,
        spec=paused("save"),
        begin_at=EVERY_STEPS - 3,
    ),
    Stop(
        "slurmctld stays away for more than a minute",
        slurmctld_stays_away,
        ("preempted",),
        state="needs_resume",
        words="did not say why",
    ),
    Stop(
        "a node that may not requeue",
        drill,
        ("preempted",),
        state="needs_resume",
        words="refused to requeue",
        spec={"slurm": {"partition": "low", "setup": ['PATH="{directory}/no-requeue:$PATH"']}},
        resume=("--set", "slurm.setup=[]"),
    ),
    Stop(
        "requeues used up (max_requeues=0)",
        drill,
        ("preempted",),
        state="needs_resume",
        words="max_requeues=0 is used up",
        spec={"preemption": {"lead_time": "20s", "max_requeues": 0}},
        by_slurm=True,
    ),
    Stop(
        "out of memory in a rank",
        feed,
        ("out_of_memory",),
        state="failed",
        words="killed a process at",
        runtimes=("docker", "podman"),
        program=EATER,
        spec={"resources": {"mem": "1G", "time": "00:10:00"}},
        resume=("--set", "resources.mem=2G"),
        lost=EVERY_STEPS,
        by_engine=True,
    ),
    Stop(
        "a rank hangs in a collective, then a notice",
        preempt_a_rank_that_hangs,
        ("deadline_missed", "completed"),
        program=COLLECTIVE,
        spec={**TWO_RANKS, "preemption": {"lead_time": "8s"}},
        lost=EVERY_STEPS,
        by_engine=True,
    ),
    Stop(
        "a rank hangs in a collective, no notice (watchdog.no_progress=20s)",
        hang,
        ("hung", "completed"),
        program=COLLECTIVE,
        spec={**TWO_RANKS, "preemption": {"lead_time": "30s"}, "watchdog": {"no_progress": "20s"}},
        lost=EVERY_STEPS,
    ),
    Stop(
        "crash loop",
        mend,
        ("failure", "failure", "failure"),
        state="failed",
        words="attempts in a row made no new step",
        program=CRASHER,
        spec={"retry": {"failure": 9, "backoff": "2s"}},
        begin_at=0,
    ),
    Stop("notice before the first step", notice_before_the_first_step, CAME_BACK, begin_at=0, by_engine=True),
    Stop("notice during the first step", notice_while_paused, CAME_BACK, spec=paused("step"), begin_at=0),
    Stop(
        "notice during the first batch (Lightning)",
        notice_while_paused,
        CAME_BACK,
        program=LIGHTNING,
        spec={**TORCH, **paused("step")},
        begin_at=0,
        by_engine=True,
    ),
    Stop(
        "notice during a validation (Lightning)",
        notice_while_paused,
        CAME_BACK,
        program=LIGHTNING,
        spec={**TORCH, **paused("validation")},
        begin_at=0,
    ),
    Stop("notice during a save", notice_while_paused, CAME_BACK, spec=paused("save")),
    Stop("notice during the export", notice_during_the_export, ("completed",), spec=paused("export")),
    Stop("USR1 twice", two_notices("USR1", "USR1"), CAME_BACK, spec=TWICE),
    Stop("USR1, then TERM", two_notices("USR1", "TERM"), CAME_BACK, spec=TWICE),
    Stop(
        "TERM, then USR1",
        two_notices("TERM", "USR1"),
        CAME_BACK,
        spec=TWICE,
        runtimes=ALL_RUNTIMES,
        by_engine=True,
    ),
)


def rows() -> list[Any]:
    return [
        pytest.param(stop, runtime, id=f"{stop.name} [{runtime}]", marks=marks(stop, runtime))
        for stop in STOPS
        for runtime in (stop.runtimes if stop.by_engine or "ORCH_STOPS" in os.environ else stop.runtimes[:1])
    ]


def marks(stop: Stop, runtime: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.other_slurm] if stop.by_slurm and runtime == "none" else []


@pytest.fixture
def surroundings(orch: Orch) -> Path:
    """What some rows find beside their spec: a template without `B:`, a scontrol that refuses to requeue."""
    text = (REPOSITORY / "slurm_templates" / "run.sbatch.j2").read_text()
    directives = "#SBATCH {{ directive }}\n{% endfor %}\n"
    assert directives in text
    own = text.replace(directives, directives + "#SBATCH --signal=USR1@20\n")
    (orch.directory / "without_b.sbatch.j2").write_text(own)
    scontrol = orch.directory / "no-requeue" / "scontrol"
    scontrol.parent.mkdir()
    real = shutil.which("scontrol", path=orch.cluster.env["PATH"])
    refusal = '[ "$1" != requeue ] || { echo "Access denied"; exit 1; }'
    scontrol.write_text(f'#!/bin/sh\n{refusal}\nexec {real} "$@"\n')
    scontrol.chmod(0o755)
    return orch.directory


@pytest.mark.parametrize(("stop", "runtime"), rows())
def test_stop(stop: Stop, runtime: str, orch: Orch, cluster: Cluster, surroundings: Path) -> None:
    if stop.settings:
        cluster.configure(*stop.settings)
    scene = Scene(stop, orch, runtime)
    scene.submit()
    stop.act(scene)
    status = scene.settle()
    seconds = time.monotonic() - scene.started_at
    assert status["state"] == stop.state or stop.state == "completed"
    assert seconds < WITHIN_S
    state = stop.state
    if state in TERMINAL and state != "completed":
        assert stop.words in told(scene)
        reasons = [attempt["exit_reason"] for attempt in orch.attempts(scene.run)]
        assert orch.json("resume", scene.run, *stop.resume)["action"] == "resumed"
        orch.wait_for_step(scene.run, 1, attempt=len(reasons), timeout=WITHIN_S)
        status = orch.status(scene.run)
    scene.finish()
    reasons = tuple(attempt["exit_reason"] for attempt in orch.attempts(scene.run))
    if state != "completed":
        assert reasons[-1] == "completed"
        reasons = reasons[:-1]
    assert reasons == stop.reasons, orch.story(scene.run)
    lost = scene.steps_lost()
    assert lost <= stop.lost
    scene.assert_no_step_was_skipped()
    if not stop.takeover:
        scene.assert_attempts_never_mixed()
    resumed = status["resumed_from"]
    assert scene.first_step(status["attempt"]) == (resumed["step"] if resumed else 0) + 1, "not the checkpoint it names"
    assert not (resumed or {}).get("skipped"), "no stop leaves a bad checkpoint behind"
    record(scene, seconds=seconds, state=state, resumed=resumed, lost=lost)


def test_a_job_cancelled_in_the_queue_never_starts(orch: Orch, cluster: Cluster) -> None:
    cluster.sbatch("--partition=high", "--nodes=3", "--exclusive", "--mem=0", wrap="sleep 300")
    run = orch.submit(script_spec(orch))["run_id"]
    assert orch.status(run)["state"] == "queued"
    orch.json("cancel", run)
    assert orch.wait_for_state(run, "cancelled", timeout=60)["attempt"] in (None, 0)
    assert said(orch, run) == []

"""Where a run is: the run directory's word × the scheduler's, and what `status` makes of it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator import operations
from orchestrator.backends.base import JobHandle, JobStatus, SchedulerState
from orchestrator.errors import BackendError, RunNotFound
from orchestrator.files import write_json
from orchestrator.registry import EventLog
from orchestrator.states import ExitReason, JobState
from tests.fakes.backend import FakeAgent
from tests.unit.operations.conftest import World

PENDING, RUNNING = SchedulerState.PENDING, SchedulerState.RUNNING
COMPLETING, ENDED, UNKNOWN = SchedulerState.COMPLETING, SchedulerState.ENDED, SchedulerState.UNKNOWN


@pytest.mark.parametrize(
    ("written", "scheduler", "state", "alive"),
    [
        (None, PENDING, "queued", True),
        (None, RUNNING, "running", True),  # the agent is starting
        (None, ENDED, "lost", False),
        (None, UNKNOWN, "lost", False),
        ("running", RUNNING, "running", True),
        ("running", COMPLETING, "running", True),
        ("running", PENDING, "preempted", True),  # Slurm requeued it over the agent's head
        ("running", ENDED, "lost", False),
        ("running", UNKNOWN, "lost", False),
        ("preempted", PENDING, "preempted", True),
        ("preempted", RUNNING, "preempted", True),  # saved, the batch script is about to requeue
        ("preempted", ENDED, "needs_resume", False),
        ("needs_resume", ENDED, "needs_resume", False),
        ("needs_resume", COMPLETING, "needs_resume", True),
        ("needs_resume", PENDING, "preempted", True),
        ("completed", ENDED, "completed", False),
        ("completed", COMPLETING, "completed", False),
        ("failed", UNKNOWN, "failed", False),
        ("cancelled", ENDED, "cancelled", False),
    ],
)
def test_the_two_words_together(
    world: World, written: str | None, scheduler: SchedulerState, state: str, alive: bool
) -> None:
    done = world.submit()
    if written is not None:
        agent = FakeAgent(world.paths(done.run_id))
        agent.begin(0)
        if written != "running":
            reason = {"preempted": "preempted", "needs_resume": "preempted", "failed": "failure"}.get(written, written)
            agent.end(written, reason, step=5)
    world.backend.set("101", scheduler)
    if scheduler is UNKNOWN:
        del world.backend.states["101"]
    status = world.status(done.run_id)
    assert (status.state.value, status.alive) == (state, alive)


def test_a_job_removed_from_the_queue_by_scancel_is_cancelled(world: World) -> None:
    done = world.submit()
    world.backend.set("101", ENDED, "CANCELLED")
    assert world.status(done.run_id).state is JobState.CANCELLED


@pytest.mark.parametrize(
    ("cause", "scheduler", "state"),
    [
        ("cancelled", "CANCELLED", "cancelled"),
        ("preempted", "CANCELLED", "cancelled"),  # by somebody, in its grace
        ("preempted", "PREEMPTED", "needs_resume"),
        ("time_limit", "TIMEOUT", "needs_resume"),
        (None, "CANCELLED", "cancelled"),
        (None, "TIMEOUT", "lost"),
    ],
)
def test_an_agent_killed_before_it_wrote_the_end_had_heard_the_reason(
    world: World, cause: str | None, scheduler: str, state: str
) -> None:
    run, _ = world.running()
    EventLog(world.paths(run), "agent-n0").append("signalled", attempt=0, cause=cause)
    world.backend.set("101", ENDED, scheduler)
    status = world.status(run)
    assert status.state.value == state
    assert state == "lost" or "the job ended before its agent had written that down" in status.message
    assert f"(scheduler: {scheduler})" in status.message


@pytest.mark.parametrize(
    ("outcome", "state"), [("completed", "completed"), ("saved", "needs_resume"), ("failed", "failed")]
)
def test_what_rank_0_said_counts_without_its_agent(world: World, outcome: str, state: str) -> None:
    run, _ = world.running()
    verdict = {"outcome": outcome, "attempt": 0, "rank": 0, "step": 7, "reason": "failure", "message": "said so"}
    write_json(world.paths(run).verdict(0), verdict)
    world.backend.set("101", ENDED, "NODE_FAIL")
    assert world.status(run).state.value == state


def test_a_node_that_got_no_answer_does_not_hide_what_another_one_knew(world: World) -> None:
    run, _ = world.running()
    log = EventLog(world.paths(run), "agent-n0")
    log.append("signalled", attempt=0, cause="preempted")
    log.append("signalled", attempt=0, cause=None)
    world.backend.set("101", ENDED, "FAILED")
    assert world.status(run).exit_reason is ExitReason.PREEMPTED


@pytest.mark.parametrize("ago_s", [1, 60])
def test_a_job_that_has_just_ended_may_still_have_its_say(world: World, ago_s: int) -> None:
    """A shared disk shows the agent's last word late; nobody may act on its silence meanwhile."""
    run, agent = world.running()
    EventLog(world.paths(run), "agent-n0").append("signalled", attempt=0, cause="preempted")
    world.backend.states["101"] = JobStatus(ENDED, "COMPLETED", end=time.time() - ago_s)
    late = ago_s < 5
    assert world.status(run).state is (JobState.RUNNING if late else JobState.NEEDS_RESUME)
    agent.end("completed", "completed", step=9)
    assert world.status(run).state is JobState.COMPLETED


def test_what_an_earlier_attempt_was_told_does_not_explain_the_newest_one(world: World) -> None:
    run, agent = world.running()
    EventLog(world.paths(run), "agent-n0").append("signalled", attempt=0, cause="preempted")
    agent.begin(1)
    world.backend.set("101", ENDED, "NODE_FAIL")
    assert world.status(run).state is JobState.LOST


def test_a_killed_run_with_a_tombstone_is_cancelled_not_lost(world: World) -> None:
    run, _ = world.running()
    world.paths(run).tombstone.touch()
    assert "being cancelled" in world.status(run).message
    world.backend.set("101", ENDED)
    assert world.status(run).state is JobState.CANCELLED


def test_the_end_of_an_older_submission_says_nothing_about_the_newer(world: World) -> None:
    run = world.ended("failed", "failure", step=3)
    world.submit()
    assert world.status(run).state is JobState.QUEUED
    world.backend.set("102", ENDED, "NODE_FAIL")
    status = world.status(run)
    assert status.state is JobState.LOST
    assert "NODE_FAIL" in status.message


@pytest.mark.parametrize(
    "reason", ["JobHeldAdmin", "JobHeldUser", "job requeued in held state", "launch failed requeued held"]
)
def test_a_job_that_slurm_holds_says_how_to_release_it(world: World, reason: str) -> None:
    done = world.submit()
    world.backend.set("101", PENDING, reason)
    assert "scontrol release" in world.status(done.run_id).message


def test_a_silent_scheduler_is_a_warning_and_the_heartbeat_decides(world: World) -> None:
    run, _ = world.running()
    world.backend.down = True
    world.paths(run).heartbeat.touch()
    fresh = world.status(run)
    assert (fresh.state, fresh.alive) == (JobState.RUNNING, True)
    assert "no answer" in fresh.warnings[0]
    old = time.time() - 600
    os.utime(world.paths(run).heartbeat, (old, old))
    assert not world.status(run).alive


def test_a_silent_scheduler_does_not_lose_a_program_that_has_no_heartbeat(world: World) -> None:
    run, _ = world.running()
    world.backend.down = True
    status = world.status(run)
    assert (status.state, status.alive) == (JobState.RUNNING, True)


def test_a_fresh_heartbeat_beats_a_queue_that_does_not_know_the_job(world: World) -> None:
    """The login node of another cluster: its queue knows nothing of the job, and it trains all the same."""
    run, _ = world.running()
    del world.backend.states["101"]
    world.paths(run).heartbeat.touch()
    assert world.status(run).state is JobState.RUNNING


def test_a_run_started_by_hand_is_told_by_its_verdict(world: World) -> None:
    paths = world.paths("12345")
    paths.run_dir.mkdir(parents=True)
    assert world.status("12345").state is JobState.LOST
    write_json(paths.verdict(0), {"outcome": "completed", "attempt": 0, "message": "", "reason": "completed"})
    status = world.status("12345")
    assert (status.state, status.exit_reason) == (JobState.COMPLETED, ExitReason.COMPLETED)
    assert world.backend.polls == 0


def test_settled_runs_ask_nobody(world: World) -> None:
    run = world.ended("completed", "completed", step=9)
    world.backend.down = True
    assert world.status(run).succeeded
    assert world.status(run).warnings == ()


def test_status_as_json_has_exactly_the_documented_keys(world: World) -> None:
    run, agent = world.running()
    agent.commit(0, 40)
    write_json(world.paths(run).progress, {"step": 42, "epoch": 1, "max_steps": 100, "attempt": 0, "time": time.time()})
    document = world.status(run).as_json()
    assert list(document) == [
        "run_id", "run_dir", "state", "exit_reason", "attempt", "job_id", "alive", "progress", "last_checkpoint",
        "resumed_from", "drill", "events",
    ]  # fmt: skip
    assert document["progress"] == {"step": 42, "epoch": 1, "max_steps": 100, "rank_seconds": []}
    assert document["last_checkpoint"] == {"step": 40, "path": "/ckpt/step-40"}
    assert document["resumed_from"] is None
    assert document["drill"] is None
    assert document["exit_reason"] is None
    assert [event["event"] for event in document["events"]][:2] == ["action", "submitted"]


def test_progress_of_an_older_attempt_is_ignored(world: World) -> None:
    run, agent = world.running()
    write_json(world.paths(run).progress, {"step": 42, "epoch": 1, "max_steps": 100, "attempt": 0, "time": 1.0})
    agent.end("preempted", "preempted", step=42, saved_in_s=1.0)
    agent.begin(1, resumed=42)
    status = world.status(run)
    assert status.progress.step is None
    assert status.resumed_from == {"step": 42, "attempt": 0, "path": "/c", "skipped": []}


def test_attempts_tell_why_and_what_was_lost(world: World) -> None:
    run, agent = world.running()
    agent.end("preempted", "preempted", step=42, saved_in_s=2.5)
    agent.begin(1, resumed=42)
    agent.end("preempted", "node_failure", step=60)
    agent.begin(2, resumed=50)
    first, second, third = world.status(run).attempts
    assert (first.exit_reason, first.saved_in_s, first.steps_lost) == (ExitReason.PREEMPTED, 2.5, 0)
    assert (second.steps_lost, second.resumed_step) == (10, 42)
    assert (third.ended, third.resumed_step, third.steps_lost) == (None, 50, None)


def test_steps_lost_at_the_end_are_those_after_the_last_checkpoint(world: World) -> None:
    run, agent = world.running()
    agent.commit(0, 50)
    agent.end("failed", "failure", step=57, message="boom")
    world.backend.set("101", ENDED)
    status = world.status(run)
    assert status.attempts[0].steps_lost == 7
    assert status.message == "boom"


def test_a_damaged_sidecar_is_a_warning_not_a_crash(world: World) -> None:
    run, _ = world.running()
    world.paths(run).sidecar.write_text('{"version": 1, "stat')
    status = world.status(run)
    assert status.alive
    assert any("sidecar" in warning for warning in status.warnings)


def test_a_torn_event_line_hides_nothing_else(world: World) -> None:
    run, agent = world.running()
    agent.commit(0, 5)
    with world.paths(run).events("rank0-0").open("a") as stream:
        stream.write('{"time": 1, "event": "chec')
    checkpoint = world.status(run).last_checkpoint
    assert checkpoint is not None
    assert checkpoint.step == 5


def test_a_local_run_of_another_machine_is_believed_while_its_heart_beats(world: World) -> None:
    world.backend.name = "local"
    spec = {"name": "job", "backend": "local", "root": str(world.root), "job": {"command": ["true"]}}
    done = world.submit({**spec, "workspace": {"path": str(world.folder)}})
    agent = FakeAgent(world.paths(done.run_id))
    agent.begin(0)  # on n1, which is not this machine
    world.backend.states.clear()
    world.paths(done.run_id).heartbeat.touch()
    assert world.status(done.run_id).alive
    with pytest.raises(BackendError, match="runs on n1") as caught:
        world.cancel(done.run_id)
    assert "on n1:  orch cancel" in str(caught.value.hint)
    old = time.time() - 600
    os.utime(world.paths(done.run_id).heartbeat, (old, old))
    assert world.status(done.run_id).state is JobState.CANCELLED  # the tombstone stands


# --- ps


def test_ps_lists_every_run_with_one_question(world: World) -> None:
    first = world.submit()
    second = world.submit(overrides=["job.args.lr=0.5"])
    world.ended("completed", "completed")
    world.backend.polls = 0
    rows, warnings = operations.ps(root=world.root, open_backend=world.backend.open)
    assert {row.run_id for row in rows} == {first.run_id, second.run_id}
    assert world.backend.polls == 1
    assert warnings == []
    only, _ = operations.ps(root=world.root, states=[JobState.COMPLETED], open_backend=world.backend.open)
    assert len(only) == 1


def test_ps_without_a_root_looks_where_runs_were_submitted(world: World) -> None:
    done = world.submit()
    rows, _ = operations.ps(open_backend=world.backend.open)
    assert [row.run_id for row in rows] == [done.run_id]


def test_one_broken_run_does_not_hide_the_others(world: World) -> None:
    done = world.submit()
    (world.root / "runs" / "broken" / "events").mkdir(parents=True)
    (world.root / "runs" / "broken" / "sidecar.json").mkdir()
    rows, warnings = operations.ps(root=world.root, open_backend=world.backend.open)
    assert done.run_id in {row.run_id for row in rows}
    assert len(rows) == 2 or warnings


# --- finding runs


def test_an_unknown_run_says_where_it_looked_and_what_comes_close(world: World) -> None:
    done = world.submit()
    with pytest.raises(RunNotFound, match="no run") as caught:
        operations.status(done.run_id[:-1] + "x", open_backend=world.backend.open)
    assert done.run_id in str(caught.value.hint)
    assert caught.value.exit_code == 6


def test_an_ambiguous_beginning_lists_the_candidates(world: World) -> None:
    first = world.submit()
    second = world.submit(overrides=["job.args.lr=0.5"])
    with pytest.raises(RunNotFound, match="several runs") as caught:
        operations.status("job-", open_backend=world.backend.open)
    assert first.run_id in caught.value.message
    assert second.run_id in caught.value.message


def test_a_run_directory_is_a_name_too(world: World, tmp_path: Path) -> None:
    done = world.submit()
    assert operations.status(str(done.run_dir), open_backend=world.backend.open).run_id == done.run_id
    with pytest.raises(RunNotFound):
        operations.status(f"{tmp_path}/nowhere", open_backend=world.backend.open)


def test_an_event_of_a_later_version_is_passed_on(world: World) -> None:
    run, _ = world.running()
    EventLog(world.paths(run), "future").append("teleported", attempt=0, where="moon")
    assert world.status(run).events[-1]["where"] == "moon"


@pytest.mark.parametrize("ask", ["status", "ps", "submit", "cancel"])
def test_a_run_that_ends_between_the_two_looks_is_not_lost(world: World, ask: str) -> None:
    """The files are read first; the scheduler's answer may be from after the agent's last word."""
    run, agent = world.running()
    poll = world.backend.poll

    def ends(handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        agent.end("completed", "completed")
        world.backend.set("101", SchedulerState.ENDED, "COMPLETED")
        return poll(handles)

    world.backend.poll = ends  # type: ignore[method-assign]
    if ask == "status":
        assert world.status(run).state is JobState.COMPLETED
    elif ask == "ps":
        assert [row.state for row in operations.ps(root=world.root, open_backend=world.backend.open)[0]] == [
            JobState.COMPLETED
        ]
    elif ask == "submit":
        assert world.submit().action == "already_completed"
    else:
        assert world.cancel(run).action == "already_completed"

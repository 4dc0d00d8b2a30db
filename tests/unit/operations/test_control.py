"""cancel, preempt, resume, wait, logs: what a person does to a run."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import operations
from orchestrator.backends.base import SchedulerState
from orchestrator.errors import BackendError, RefusedError, RegistryError, RunNotFound, SchedulerUnavailable, SpecError
from orchestrator.files import write_json
from orchestrator.operations.drill import watch_drill
from orchestrator.registry import EventLog, read_events
from orchestrator.states import JobState
from tests.fakes.backend import FakeAgent
from tests.unit.operations.conftest import World, owned_by_another

ENDED = SchedulerState.ENDED


# --- cancel


def test_a_queued_run_ends_as_cancelled_without_its_secrets(world: World) -> None:
    done = world.submit()
    result = world.cancel(done.run_id)
    assert (result.action, result.job_id) == ("cancelled", "101")
    assert world.status(done.run_id).state is JobState.CANCELLED
    assert not world.paths(done.run_id).secrets.exists()
    assert "cancelled" in [event["event"] for event in read_events(world.paths(done.run_id))]


def test_the_tombstone_is_there_before_the_scheduler_is_told(world: World) -> None:
    run, _ = world.running()
    seen: list[bool] = []
    cancel = world.backend.cancel

    def watched(handle: Any) -> None:
        seen.append(world.paths(run).tombstone.exists())
        cancel(handle)

    world.backend.cancel = watched  # type: ignore[method-assign]
    world.cancel(run)
    assert seen == [True]


def test_cancelling_twice_is_fine(world: World) -> None:
    run, _ = world.running()
    world.cancel(run)
    assert world.cancel(run).action == "already_cancelled"
    assert [event["event"] for event in read_events(world.paths(run))].count("cancelled") == 1


def test_cancelling_again_removes_what_a_killed_agent_could_not(world: World) -> None:
    run, _ = world.running()
    world.cancel(run)
    world.paths(run).secrets.write_text("{}")
    assert world.cancel(run).action == "already_cancelled"
    assert not world.paths(run).secrets.exists()


def test_cancelling_a_completed_run_changes_nothing(world: World) -> None:
    run = world.ended("completed", "completed")
    assert world.cancel(run).action == "already_completed"
    assert not world.paths(run).tombstone.exists()
    assert world.status(run).state is JobState.COMPLETED


def test_a_failed_run_can_be_cancelled_for_good(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    world.cancel(run)
    assert world.status(run).state is JobState.CANCELLED
    with pytest.raises(RefusedError):
        world.submit()


def test_a_scheduler_that_cannot_be_told_leaves_the_tombstone(world: World) -> None:
    run, _ = world.running()
    world.backend.down = True
    world.paths(run).heartbeat.touch()
    with pytest.raises(SchedulerUnavailable):
        world.cancel(run)
    assert world.paths(run).tombstone.exists()
    world.backend.down = False
    assert world.cancel(run).action == "cancelled"


def test_a_preempted_run_that_waits_loses_its_secrets_too(world: World) -> None:
    run, agent = world.running()
    agent.end("preempted", "preempted")
    world.paths(run).secrets.write_text("{}")  # a requeued job keeps them
    world.backend.set("101", SchedulerState.PENDING)
    world.cancel(run)
    assert not world.paths(run).secrets.exists()


# --- preempt


def test_a_drill_sends_the_specs_signal(world: World) -> None:
    run, _ = world.running()
    drill = operations.preempt(str(world.paths(run).run_dir), open_backend=world.backend.open)
    assert world.backend.signals == [("101", "USR1")]
    assert (drill.signal, drill.attempt, drill.lead_time_s) == ("USR1", 0, 120)


def test_a_drill_needs_a_running_job(world: World) -> None:
    done = world.submit()
    with pytest.raises(BackendError, match="queued, not running"):
        operations.preempt(str(done.run_dir), open_backend=world.backend.open)


def test_a_drill_is_told_step_by_step(world: World) -> None:
    run, agent = world.running()
    paths = world.paths(run)
    drill = operations.preempt(str(paths.run_dir), open_backend=world.backend.open, clock=lambda: time.time() - 1)
    agent.commit(0, 16)  # a periodic save between the signal and the stop is not the drill's
    agent.commit(0, 17)
    agent.stop(0, 17)
    agent.end("preempted", "preempted", step=17, saved_in_s=0.2)
    EventLog(paths, "agent-n0").append("verdict", attempt=0, node=0, exit_code=75, message="")
    EventLog(paths, "agent-n0").append("requeued", attempt=0)
    agent.begin(1, resumed=17)
    news = list(watch_drill(drill, timeout_s=20, open_backend=world.backend.open))
    assert [item.kind for item in news] == ["saved", "requeued", "started", "resumed", "ended"]
    assert news[0].step == news[3].step == 17
    status = news[-1].status
    assert status is not None
    assert status.attempts[0].steps_lost == 0


def test_a_drill_that_saves_nothing_ends_when_the_next_attempt_makes_steps(world: World) -> None:
    run, agent = world.running()
    paths = world.paths(run)
    drill = operations.preempt(str(paths.run_dir), open_backend=world.backend.open, clock=lambda: time.time() - 1)
    agent.end("preempted", "preempted", step=17)
    agent.begin(1)
    write_json(paths.progress, {"step": 1, "epoch": 0, "max_steps": 9, "attempt": 1, "time": time.time()})
    news = list(watch_drill(drill, timeout_s=20, open_backend=world.backend.open))
    assert [item.kind for item in news] == ["started", "ended"]
    assert news[-1].status is not None
    assert news[-1].status.attempts[-1].resumed_step is None


def test_a_drill_that_ends_the_run_says_so(world: World) -> None:
    run, agent = world.running()
    place = str(world.paths(run).run_dir)
    drill = operations.preempt(place, open_backend=world.backend.open, clock=lambda: time.time() - 1)
    agent.end("failed", "failure", message="no handler")
    EventLog(world.paths(run), "agent-n0").append("finished", attempt=0)
    world.backend.set("101", ENDED)
    news = list(watch_drill(drill, timeout_s=20, open_backend=world.backend.open))
    assert news[-1].kind == "ended"
    assert news[-1].status is not None
    assert news[-1].status.state is JobState.FAILED


# --- resume


def test_resume_lifts_a_cancellation(world: World) -> None:
    run, agent = world.running()
    world.cancel(run)
    agent.end("cancelled", "cancelled", step=4)
    done = world.resume(run)
    assert done.action == "resumed"
    assert not world.paths(run).tombstone.exists()
    assert world.status(run).state is JobState.QUEUED


def test_resume_of_a_job_cancelled_in_the_queue(world: World) -> None:
    done = world.submit()
    world.cancel(done.run_id)
    assert world.resume(done.run_id).action == "resumed"
    assert world.backend.plans[1].agent["attempt_base"] == 0


def test_resume_runs_the_code_the_run_began_with(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    (world.folder / "train.py").write_text("print('edited since')\n")
    world.resume(run)
    assert world.backend.plans[1].agent["code_hash"] == world.backend.plans[0].agent["code_hash"]


def test_resume_works_when_the_workspace_is_gone(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    shutil.rmtree(world.folder)
    assert world.resume(run).action == "resumed"


def test_resume_works_when_the_root_has_moved(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    moved = world.root.rename(world.root.with_name("moved"))
    operations.resume(str(moved / "runs" / run), environ=world.environ, open_backend=world.backend.open)
    assert world.backend.plans[1].run_dir == moved / "runs" / run
    assert world.backend.plans[1].agent["code_dir"].startswith(str(moved))


def test_resume_with_other_resources(world: World) -> None:
    run = world.ended("failed", "out_of_memory")
    world.resume(run, overrides=["resources.mem=80G", "slurm.partition=high"])
    assert "#SBATCH --mem=81920M" in world.backend.plans[1].script
    assert "#SBATCH --partition=high" in world.backend.plans[1].script


@pytest.mark.parametrize("override", ["name=other", "root=/elsewhere", "backend=local"])
def test_resume_refuses_what_would_be_another_run(world: World, override: str) -> None:
    run = world.ended("needs_resume", "preempted")
    with pytest.raises(RefusedError, match=override.partition("=")[0]):
        world.resume(run, overrides=[override], allow_drift=[override.partition("=")[0]])
    assert world.status(run).state is JobState.NEEDS_RESUME


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("job.args.lr=0.5", "job.args.lr: 0.1 → 0.5"),
        ("job.args.new.name=yes", 'job.args.new.name: not set → "yes"'),
        ("env.A=1", 'env.A: not set → "1"'),
        (f"container.runtime=docker container.image=repo/x@sha256:{'a' * 64}", 'image: not set → "sha256:aaa'),
    ],
)
def test_what_would_differ_is_listed_and_refused_unless_it_is_allowed(world: World, override: str, line: str) -> None:
    run, agent = world.running()
    agent.commit(0, 120)
    agent.end("needs_resume", "preempted", step=120)
    world.backend.set("101", ENDED)
    before = world.paths(run).spec.read_bytes(), world.paths(run).agent_plan.read_bytes()
    with pytest.raises(RefusedError, match="its checkpoint is of step 120") as caught:
        world.resume(run, overrides=override.split(), allow_drift=["code", "data"])
    assert f"  {line}" in caught.value.message
    key = line.partition(":")[0]
    assert f"--allow-drift {key}" in (caught.value.hint or "")
    assert (world.paths(run).spec.read_bytes(), world.paths(run).agent_plan.read_bytes()) == before
    assert len(world.backend.plans) == 1
    done = world.resume(run, overrides=override.split(), allow_drift=[key])
    assert (done.run_id, done.action) == (run, "resumed")
    assert any(line in warning for warning in done.warnings)
    [event] = [event for event in read_events(world.paths(run)) if event["event"] == "drift"]
    assert (event["attempt"], event["step"], event["changes"][0]["key"]) == (1, 120, key)


def test_changed_arguments_stay_and_the_first_spec_does_not_turn_them_back(world: World) -> None:
    run = world.ended("failed", "failure")
    world.resume(run, overrides=["job.args.lr=0.5"], allow_drift=["job.args.lr"])
    assert "--lr=0.5" in world.backend.plans[1].agent["program"]["argv"]
    assert world.submit().action == "already_queued"
    world.backend.set("102", ENDED, "CANCELLED")
    agent = FakeAgent(world.paths(run))
    agent.begin(1, job_id="102")
    agent.end("failed", "failure")
    with pytest.raises(RefusedError, match="would turn it back") as caught:
        world.submit()
    assert "job.args.lr: 0.5 → 0.1" in caught.value.message
    world.resume(run)
    assert "--lr=0.5" in world.backend.plans[2].agent["program"]["argv"]


def test_resume_with_the_code_as_it_is_now(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    world.resume(run, code=True)  # nothing has changed: the spec beside the code is none of it
    begun = world.backend.plans[1].agent["code_hash"]
    assert begun == world.backend.plans[0].agent["code_hash"]
    world.backend.set("102", ENDED)
    agent = FakeAgent(world.paths(run))
    agent.begin(1, job_id="102")
    agent.end("needs_resume", "preempted")
    (world.folder / "train.py").write_text("print('better')\n")
    with pytest.raises(RefusedError, match="changed since it was last submitted:") as caught:
        world.resume(run, code=True)
    assert f"  code: {begun[:12]} → " in caught.value.message
    world.resume(run, code=True, allow_drift=["code"])
    plan = world.backend.plans[2].agent
    assert plan["code_hash"] != begun
    assert (Path(plan["code_dir"]) / "train.py").read_text() == "print('better')\n"


def test_the_training_code_is_told_what_may_differ(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    world.resume(run, allow_drift=["data"])
    assert world.backend.plans[1].agent["allow_drift"] == ["data"]
    assert "allow_drift" not in world.backend.plans[0].agent


def test_a_run_is_not_sent_away_from_its_checkpoints(world: World, tmp_path: Path) -> None:
    run = world.ended("needs_resume", "preempted")
    elsewhere = f"checkpoint.uri={tmp_path}/elsewhere"
    world.resume(run, overrides=[elsewhere])  # nothing is lost yet
    world.backend.set("102", SchedulerState.ENDED, "COMPLETED")
    agent = FakeAgent(world.paths(run))
    agent.begin(1, job_id="102")
    agent.end("needs_resume", "preempted")
    EventLog(world.paths(run), "rank0-001", attempt=1).append("checkpoint_committed", step=10, epoch=0, path="x")
    with pytest.raises(RefusedError, match="now says s3://bucket/x"):
        world.resume(run, overrides=["checkpoint.uri=s3://bucket/x"])
    with pytest.raises(RefusedError, match="now says the run directory"):
        world.submit()
    assert world.resume(run).action == "resumed"


def test_a_run_is_not_sent_to_another_endpoint_either(world: World) -> None:
    world.spec.write_text(
        world.spec.read_text() + "checkpoint: {uri: s3://b/x, storage_options: {endpoint_url: https://one}}\n"
    )
    run = world.ended("needs_resume", "preempted")
    EventLog(world.paths(run), "rank0-000", attempt=0).append("checkpoint_committed", step=10, epoch=0, path="x")
    options = "checkpoint.storage_options"
    for given, told in {
        "{endpoint_url: https://two}": f"{options}.endpoint_url is https://one, and it now says https://two",
        "{client_kwargs: {endpoint_url: https://two}}": "it now says https://two",
        "{}": "it now is not set",
        "{endpoint_url: https://one, profile: other}": f"{options}.profile is not set, and it now says other",
    }.items():
        with pytest.raises(RefusedError, match=told):
            world.resume(run, overrides=[f"{options}={given}"])
    same = "{client_kwargs: {endpoint_url: https://one}, max_concurrency: 4}"
    assert world.resume(run, overrides=[f"{options}={same}"]).action == "resumed"


def test_resume_of_what_runs_or_is_done_does_nothing(world: World) -> None:
    run, agent = world.running()
    assert world.resume(run).action == "already_running"
    agent.end("completed", "completed")
    assert world.resume(run).action == "already_completed"
    assert len(world.backend.plans) == 1


def test_resume_of_a_missing_secret_keeps_everything(world: World) -> None:
    run = world.ended("needs_resume", "preempted")
    with pytest.raises(SpecError, match="TOKEN"):
        world.resume(run, environ={})
    assert world.status(run).state is JobState.NEEDS_RESUME


def test_resume_of_a_run_started_by_hand_is_refused(world: World) -> None:
    world.paths("4711").run_dir.mkdir(parents=True)
    with pytest.raises(RegistryError, match="not started by"):
        world.resume("4711")


def test_resume_all_takes_those_that_wait_and_no_others(world: World) -> None:
    waiting = world.ended("needs_resume", "requeue_limit")
    world.submit(overrides=["job.args.lr=0.5"])
    done, problems = operations.resume_all(root=world.root, environ=world.environ, open_backend=world.backend.open)
    assert [result.run_id for result in done] == [waiting]
    assert problems == {}


@pytest.mark.parametrize("whose", ["run_dir", "agent_plan"])
def test_resume_all_starts_nobody_elses_program(world: World, whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's cron job, or a colleague's, looks at the same root."""
    waiting = world.ended("needs_resume", "preempted")
    owned_by_another(getattr(world.paths(waiting), whose), monkeypatch)
    done, problems = operations.resume_all(root=world.root, environ=world.environ, open_backend=world.backend.open)
    assert done == []
    assert "belongs to somebody else" in problems[waiting].message


def test_resume_all_goes_on_after_a_failure(world: World) -> None:
    waiting = world.ended("needs_resume", "preempted")
    done, problems = operations.resume_all(root=world.root, environ={}, open_backend=world.backend.open)
    assert done == []
    assert "TOKEN" in problems[waiting].message


# --- wait


def waited(world: World, run: str, timeout_s: float | None = None) -> Any:
    place = str(world.paths(run).run_dir)
    return operations.wait(place, timeout_s=timeout_s, open_backend=world.backend.open)


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled", "needs_resume"])
def test_wait_returns_when_the_run_has_ended(world: World, status: str) -> None:
    reasons = {"completed": "completed", "failed": "failure", "cancelled": "cancelled", "needs_resume": "preempted"}
    run = world.ended(status, reasons[status])
    result = waited(world, run)
    assert (result.timed_out, result.status.state.value) == (False, status)
    assert result.status.succeeded == (status == "completed")


def test_wait_notices_the_end(world: World) -> None:
    run, agent = world.running()
    timer = threading.Timer(0.4, lambda: agent.end("completed", "completed", step=3))
    timer.start()
    result = waited(world, run, timeout_s=30)
    timer.join()
    assert result.status.succeeded


def test_wait_gives_up_in_time(world: World) -> None:
    run, _ = world.running()
    result = waited(world, run, timeout_s=0.3)
    assert result.timed_out
    assert result.as_json()["state"] == "running"
    assert result.as_json()["timed_out"] is True


def test_wait_believes_in_a_loss_only_after_a_while(world: World) -> None:
    run, agent = world.running()
    world.backend.set("101", ENDED)
    times = iter(range(0, 1000, 1))

    def clock() -> float:
        now = float(next(times))
        if now == 3.0:  # the shared disk shows the agent's last word late
            agent.end("completed", "completed")
        return now

    place = str(world.paths(run).run_dir)
    result = operations.wait(place, open_backend=world.backend.open, clock=clock, sleep=lambda seconds: None)
    assert result.status.succeeded


def test_wait_ends_for_a_lost_run(world: World) -> None:
    run, _ = world.running()
    world.backend.set("101", ENDED)
    times = iter(range(0, 1000, 1))
    place = str(world.paths(run).run_dir)
    result = operations.wait(
        place, open_backend=world.backend.open, clock=lambda: float(next(times)), sleep=lambda seconds: None
    )
    assert result.status.state is JobState.LOST


# --- logs


def lines(world: World, run: str, **options: Any) -> list[str]:
    found = operations.logs(str(world.paths(run).run_dir), open_backend=world.backend.open, **options)
    return [line.text for line in found]


def test_logs_of_the_newest_attempt_and_of_another(world: World) -> None:
    run, agent = world.running()
    paths = world.paths(run)
    paths.rank_log(0, 0).write_text("first\nattempt\n")
    paths.rank_log(0, 3).write_text("rank three\n")
    agent.end("preempted", "preempted")
    agent.begin(1)
    paths.rank_log(1, 0).write_text("second\n")
    assert lines(world, run) == ["second"]
    assert lines(world, run, attempt=0) == ["first", "attempt"]
    assert lines(world, run, attempt=0, rank=3) == ["rank three"]


def test_before_a_rank_speaks_its_agent_does(world: World) -> None:
    run, _ = world.running()
    paths = world.paths(run)
    paths.scheduler_log.write_text("slurmstepd: error\n")
    assert lines(world, run) == ["slurmstepd: error"]
    paths.node_log(0, 0).write_text("the container does not start\n")
    assert lines(world, run) == ["the container does not start"]
    assert lines(world, run, node=0) == ["the container does not start"]


def test_no_log_is_one_error(world: World) -> None:
    done = world.submit()
    with pytest.raises(RunNotFound, match="rank 5 has not started"):
        lines(world, done.run_id, rank=5)


def test_bytes_that_are_no_text_are_shown_all_the_same(world: World) -> None:
    run, _ = world.running()
    world.paths(run).rank_log(0, 0).write_bytes(b"caf\xe9 \r 10%\r 20%\nend")
    assert lines(world, run)[-1] == "end"


def test_following_goes_on_through_attempts_to_the_end(world: World) -> None:
    run, agent = world.running()
    paths = world.paths(run)
    paths.rank_log(0, 0).write_text("one\n")

    def live() -> Iterator[None]:
        with paths.rank_log(0, 0).open("a") as stream:
            stream.write("two\nthr")
            stream.flush()
            yield
            stream.write("ee\n")
        agent.end("preempted", "preempted")
        agent.begin(1)
        paths.rank_log(1, 0).write_text("four\nfive")
        agent.end("completed", "completed")

    going_on = live()
    seen = lines(world, run, follow=True, sleep=lambda seconds: next(going_on, None))
    assert [line for line in seen if "──" not in line] == ["one", "two", "three", "four", "five"]
    assert "── attempt 1 · rank-0.log ──" in seen


def test_following_one_attempt_ends_with_it(world: World) -> None:
    run, agent = world.running()
    world.paths(run).rank_log(0, 0).write_text("one\n")
    agent.end("preempted", "preempted")
    agent.begin(1)
    assert lines(world, run, follow=True, attempt=0, sleep=lambda seconds: None) == ["one"]


def test_an_agent_without_a_submission_is_followed_to_its_verdict(world: World) -> None:
    paths = world.paths("4711")
    paths.logs(0).mkdir(parents=True)
    paths.rank_log(0, 0).write_text("by hand\n")
    assert lines(world, "4711", follow=True, sleep=lambda seconds: None) == ["by hand"]
    assert FakeAgent(paths).rows == []

"""The certificate of a drill: what is shown, and why it fails in words."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator import operations
from orchestrator.backends.base import SchedulerState
from orchestrator.checkpoint import Manifest, open_store
from orchestrator.cli.drilled import certificate_lines
from orchestrator.cli.view import status_lines
from orchestrator.files import read_json, write_json
from orchestrator.operations.drill import Checked, DrillNews, Evidence, certify, gather
from orchestrator.operations.record import load_record
from orchestrator.operations.results import Certificate, Signalled, Told
from orchestrator.paths import RunPaths
from orchestrator.registry import EventLog
from tests.fakes.backend import FakeAgent
from tests.unit.operations.conftest import World

DRILL = Signalled("job-1", Path("/runs/job-1"), "7", "USR1", attempt=2, lead_time_s=60, time=1000.0)
TOLD = (Told("n1", ("SIGUSR1",), "preempted", 1001.0, 1061.0), Told("n2", ("SIGUSR1",), "preempted", 1000.5, 1060.5))
VERDICT = {"outcome": "saved", "step": 40, "time": 1003.0}
WELL: dict[str, Any] = {
    "told": TOLD,
    "nodes": ("n1", "n2"),
    "verdict": VERDICT,
    "commit": {"seconds": 1.5, "size_bytes": 10},
    "over": True,
    "exit_codes": (75, 75),
    "started": {"attempt": 3, "time": 1100.0},
    "resumed": {"attempt": 3, "step": 40, "checkpoint": "/c/step.ckpt"},
    "made_step": 41,
    "made_at": 1120.0,
}


def certified(last: str = "ended", checked: Checked | None = None, **changes: Any) -> Certificate:
    evidence = Evidence(**{**WELL, **changes})
    return certify(DRILL, evidence, checked or Checked(None, 0.1, 10), DrillNews(last))


def test_a_drill_that_went_well_is_certified_with_its_figures() -> None:
    shown = certified()
    assert shown.passed
    assert (shown.grace_used_s, shown.grace_s) == (2.5, 60.0)
    assert (shown.requeue_wait_s, shown.startup_s, shown.save_s) == (97.0, 20.0, 1.5)
    assert (shown.step_saved, shown.step_resumed, shown.steps_lost, shown.exact) == (40, 40, 0, True)
    text = "\n".join("".join(part for part, _ in line) for line in certificate_lines(shown))
    assert "n1 (SIGUSR1, preempted); n2 (SIGUSR1, preempted)" in text
    assert "2.5 s of 60 s" in text
    assert "from step 40, 0 steps lost (exact)" in text


def test_a_signal_that_reaches_the_program_before_the_agent_uses_no_grace() -> None:
    shown = certified(verdict={**VERDICT, "time": min(told.at for told in TOLD) - 0.039})
    assert shown.passed
    assert shown.grace_used_s == 0


def test_clocks_that_disagree_give_no_figure() -> None:
    assert certified(verdict={**VERDICT, "time": 900.0}).grace_used_s is None


def test_a_node_told_twice_knows_since_the_first_time(world: World) -> None:
    run, _ = world.running()
    drill = operations.preempt(run, open_backend=world.backend.open)
    log = EventLog(world.paths(run), "agent-n0")
    for at, cause in ((100.0, None), (103.0, "preempted")):
        log.append("signalled", attempt=0, node="n1", signals=["SIGTERM"], cause=cause, at=at, deadline=at + 20)
    (told,) = gather(load_record(world.paths(run)), drill).told
    assert (told.at, told.deadline, told.cause) == (100.0, 123.0, "preempted")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verdict": {}, "exit_codes": (137,)}, "did not react to SIGUSR1"),
        ({"verdict": {}, "exit_codes": (75,), "unused": True}, "its image was still on the way"),
        ({"verdict": {}, "exit_codes": (75, 75)}, "cannot see whether it saved"),
        ({"verdict": {}, "over": False}, "has neither stopped nor saved"),
        ({"verdict": {}, "over": False, "told": ()}, "no agent has noted the signal"),
        (
            {"verdict": {"outcome": "unsaved", "message": "too slow"}},
            "nothing was saved in the 60 s there were: too slow",
        ),
        ({"verdict": {"outcome": "failed", "message": "boom"}}, "it did not stop, it ended (failed): boom"),
        ({"told": TOLD[:1]}, "no agent on n2 has noted the signal"),
        ({"verdict": {**VERDICT, "time": 1070.0}}, "saving took 69.5 s, and there were only 60.0 s"),
        ({"resumed": {"attempt": 3, "step": 30, "checkpoint": "/c/s"}}, "10 steps were lost"),
        ({"resumed": {"attempt": 3, "step": 44, "checkpoint": "/c/s"}}, "stopped at step 40 and went on at step 44"),
        ({"resumed": None}, "began at the beginning, although"),
        ({"checked": Checked("the checkpoint is damaged: x")}, "the checkpoint is damaged"),
        (
            {"last": "time_up", "made_step": None, "resumed": None},
            "the time was up before the next attempt made a step",
        ),
    ],
)
def test_a_drill_fails_for_one_reason_in_words(changes: dict[str, Any], words: str) -> None:
    shown = certified(**changes)
    assert not shown.passed
    assert len(shown.reasons) == 1
    assert words in shown.reasons[0]


def saved_checkpoint(world: World, run: str, agent: FakeAgent, step: int) -> Manifest:
    """A true checkpoint of attempt 0 and the verdict that goes with it."""
    paths = world.paths(run)
    store = open_store(str(read_json(paths.agent_plan)["checkpoint"]["uri"]))
    fence = store.open_epoch(attempt=0, base=None)
    manifest = store.commit(fence, lambda file: file.write(b"state"), step=step, epoch=0, world_size=1)
    write_json(paths.verdict(0), {"outcome": "saved", "step": step, "time": time.time(), "attempt": 0})
    agent.stop(0, step)
    agent.end("preempted", "preempted", step=step, saved_in_s=0.2)
    return manifest


def go_on(world: World, run: str, agent: FakeAgent, manifest: Manifest) -> None:
    """Attempt 1 resumes from the checkpoint and makes a step."""
    paths = world.paths(run)
    agent.begin(1)
    EventLog(paths, "rank0-1").append("resumed", attempt=1, step=manifest.step, checkpoint=str(manifest.path))
    step = manifest.step + 1
    write_json(paths.progress, {"step": step, "epoch": 0, "max_steps": 90, "attempt": 1, "time": time.time()})


def told(paths: RunPaths) -> None:
    now = time.time()
    EventLog(paths, "agent-n0").append(
        "signalled", attempt=0, node="n1", signals=["SIGUSR1"], cause="preempted", at=now, deadline=now + 60
    )


def test_the_checkpoint_is_read_again_and_the_certificate_kept(world: World) -> None:
    run, agent = world.running()
    paths = world.paths(run)
    drill = operations.preempt(str(paths.run_dir), open_backend=world.backend.open, clock=lambda: time.time() - 1)
    told(paths)
    manifest = saved_checkpoint(world, run, agent, 17)
    go_on(world, run, agent, manifest)
    news, read = list[str](), list[tuple[int, int]]()
    shown = operations.verify_drill(
        drill,
        timeout_s=20,
        open_backend=world.backend.open,
        tell=lambda item: news.append(item.kind),
        reading=lambda count, total: read.append((count, total)),
    )
    assert shown.passed, shown.reasons
    assert news == ["saved", "started", "resumed", "stepped", "ended"]
    assert read == [(5, 5)]
    assert read_json(paths.drill(0))["verdict"] == "PASS"
    text = "".join(part for line in status_lines(world.status(run), []) for part, _ in line)
    assert "drill       passed" in text


def test_a_damaged_checkpoint_fails_the_drill_and_stays_where_it_is(world: World) -> None:
    run, agent = world.running()
    paths = world.paths(run)
    drill = operations.preempt(str(paths.run_dir), open_backend=world.backend.open, clock=lambda: time.time() - 1)
    told(paths)
    manifest = saved_checkpoint(world, run, agent, 17)
    manifest.path.write_bytes(b"stATe")
    go_on(world, run, agent, manifest)
    shown = operations.verify_drill(drill, timeout_s=20, open_backend=world.backend.open)
    assert "does not match its hash" in shown.reasons[0]
    assert not shown.verified
    assert manifest.path.exists()


def test_a_run_that_is_not_restarted_fails_though_it_saved(world: World) -> None:
    run, agent = world.running()
    paths = world.paths(run)
    drill = operations.preempt(str(paths.run_dir), open_backend=world.backend.open, clock=lambda: time.time() - 1)
    told(paths)
    saved_checkpoint(world, run, agent, 17)
    agent.end("needs_resume", "requeue_limit", step=17, message="max_requeues=0 is used up")
    EventLog(paths, "agent-n0").append("finished", attempt=0)
    world.backend.set("101", SchedulerState.ENDED)
    shown = operations.verify_drill(drill, timeout_s=20, open_backend=world.backend.open)
    assert shown.reasons == ("it saved, but nothing restarts it by itself (max_requeues=0 is used up)",)


def test_a_damaged_certificate_does_not_cost_the_status(world: World) -> None:
    run, _ = world.running()
    paths = world.paths(run)
    paths.drills.mkdir()
    paths.drill(0).write_text("{")
    assert world.status(run).drill is None

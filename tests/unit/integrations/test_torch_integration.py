from __future__ import annotations

import signal
from pathlib import Path

import pytest

from orchestrator.errors import CheckpointError
from orchestrator.integrations.torch import Agreement, RankTimes, ResumableLoop, SaveSchedule, agree
from orchestrator.worker.session import CheckpointSettings, Session


def test_one_rank_agrees_with_itself() -> None:
    assert agree("mine") == "mine"
    agreement = Agreement(2, world_size=1)
    agreement.begin([0, 1])
    assert agreement.finish() == [0, 1]
    assert agreement.minimum(7) == 7
    assert agreement.gather({"a": 1}) == [{"a": 1}]
    agreement.barrier()


def test_own_times_travel_with_the_agreement_and_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    agreement = Agreement(2, world_size=1)
    agreement.begin([0, 1], 0.25)
    assert agreement.finish() == [0, 1]
    assert agreement.rank_seconds == [0.25]
    now = [0.0]
    monkeypatch.setattr("orchestrator.integrations.torch.time.monotonic", lambda: now[0])
    times = RankTimes()
    assert times.add([0.1, 0.3]) is None
    now[0] = 2.0
    assert times.add([0.3, 0.5]) == [0.2, 0.4]
    assert times.add([9.0, 9.0]) == [0.2, 0.4]


def test_finishing_what_never_began_is_an_error() -> None:
    agreement = Agreement(1, world_size=1)
    agreement._group = object()
    with pytest.raises(CheckpointError, match="begin"):
        agreement.finish()


def test_saves_fall_on_the_same_steps_whatever_happened_before() -> None:
    schedule = SaveSchedule(CheckpointSettings(every_steps=5, every_epochs=2))
    assert [step for step in range(1, 13) if schedule.due_at_step(step)] == [5, 10]
    assert [epoch for epoch in range(1, 6) if schedule.due_after_epoch(epoch)] == [2, 4]
    assert not schedule.due_by_time()
    nothing = SaveSchedule(CheckpointSettings(every_epochs=None))
    assert not any(nothing.due_at_step(step) or nothing.due_after_epoch(step) for step in range(1, 50))


def test_minutes_count_from_the_last_save() -> None:
    schedule = SaveSchedule(CheckpointSettings(every_minutes=1e-9))
    assert schedule.due_by_time()
    schedule.saved(3)
    assert schedule.is_saved(3)
    assert not schedule.is_saved(4)


def test_a_loops_checkpoints_know_the_numbers_it_was_given(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    session = Session.start(environ={}, default_dir=tmp_path, settings=CheckpointSettings(every_steps=2))
    try:
        loop = ResumableLoop(session, {})
        loop.step_done({"loss": 0.5})
        loop.step_done({"loss": 0.25})
        loop.step_done({"accuracy": 0.75})
        loop.epoch_done({"loss": 0.125})
    finally:
        session.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    newest, older = session.store.manifests()
    assert (newest.step, dict(newest.metrics)) == (3, {"loss": 0.125, "accuracy": 0.75})
    assert (older.step, dict(older.metrics)) == (2, {"loss": 0.25})

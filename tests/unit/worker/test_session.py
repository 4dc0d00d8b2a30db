"""Session: who am I, must I stop, how do I save, how do I leave. No torch, no network."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pytest

from orchestrator.checkpoint import Best, CheckpointStore, FileEntry, PosixStore, Refuge, posix
from orchestrator.checkpoint.medium import Problem
from orchestrator.errors import CheckpointCorrupt, CheckpointError, Fenced
from orchestrator.files import write_json
from orchestrator.paths import RunPaths
from orchestrator.registry import read_events
from orchestrator.registry.usable import Usable, usable_checkpoint
from orchestrator.states import ExitReason
from orchestrator.worker.session import CheckpointSettings, Session, identify
from orchestrator.worker.stop import DEADLINE_MARGIN_S, DeadlineWatchdog, StopRequest


class Exited(BaseException):
    """Stands for the end of the process."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def exit_process(code: int) -> NoReturn:
    raise Exited(code)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Session]]:
    """Starts managed sessions; their threads end with the test."""
    sessions: list[Session] = []

    def build(*, rank: int = 0, attempt: int = 0, managed: bool = True, **environ: str) -> Session:
        base = {"RANK": str(rank), "ORCH_RUN_DIR": str(tmp_path), "ORCH_ATTEMPT": str(attempt)}
        if managed:
            base |= {"ORCH_RUN_ID": "run-1", "ORCH_DEADLINE_FILE": str(tmp_path / "deadline.json")}
        session = Session.start(environ=base | environ, default_dir=tmp_path, exit_process=exit_process)
        sessions.append(session)
        return session

    yield build
    for session in sessions:
        session.close()


@pytest.fixture
def restored_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def verdict(run_dir: Path, attempt: int = 0, rank: int | None = None) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(RunPaths(run_dir).verdict(attempt, rank).read_text())
    return content


def eventually(condition: Callable[[], bool], *, within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return condition()


# --- identity


@pytest.mark.parametrize(
    ("environ", "run_id"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3"),
        ({"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "elastic"}, "7"),
        ({"TORCHELASTIC_RUN_ID": "elastic"}, "elastic"),
    ],
)
def test_run_id_without_orch_submit(tmp_path: Path, environ: dict[str, str], run_id: str) -> None:
    identity = identify(environ, default_dir=tmp_path, agree=None)
    assert (identity.run_id, identity.managed) == (run_id, False)


def test_torchruns_default_run_id_is_no_identity(tmp_path: Path) -> None:
    environ = {"TORCHELASTIC_RUN_ID": "none"}
    first, second = (identify(environ, default_dir=tmp_path, agree=None).run_id for _ in range(2))
    assert first != second
    assert len(first) == 12


def test_ranks_take_rank_zeros_identity(tmp_path: Path) -> None:
    said = json.dumps({"run_id": "chief", "run_dir": str(tmp_path / "there"), "attempt": 4})
    identity = identify({"RANK": "1", "WORLD_SIZE": "2"}, default_dir=tmp_path, agree=lambda _mine: said)
    assert (identity.run_id, identity.run_dir, identity.attempt) == ("chief", tmp_path / "there", 4)
    with pytest.raises(CheckpointError, match="agree"):
        identify({"RANK": "1", "WORLD_SIZE": "2"}, default_dir=tmp_path, agree=None)


def test_standalone_attempts_are_counted_by_what_they_left(tmp_path: Path, start: Callable[..., Session]) -> None:
    start(managed=False).verdict("saved", step=1, epoch=0)
    assert start(managed=False).attempt == 1


def test_default_directory_is_below_the_root(tmp_path: Path) -> None:
    identity = identify({"SLURM_JOB_ID": "7", "ORCH_ROOT": str(tmp_path)}, default_dir=None, agree=None)
    assert identity.run_dir == tmp_path / "runs" / "7"


def test_the_plan_of_orch_submit_decides(tmp_path: Path, start: Callable[..., Session]) -> None:
    plan = {
        "checkpoint": {
            "uri": "/somewhere",
            "every_steps": 5,
            "every_minutes": None,
            "every_epochs": None,
            "keep_last": 2,
            "async": True,
            "keep_every": 100,
            "keep_best": {"metric": "loss", "mode": "min", "k": 2},
        },
        "signal": "USR2",
        "code_hash": "abc",
        "container": {"image": "sha256:1"},
    }
    (tmp_path / "plan").mkdir()
    RunPaths(tmp_path).agent_plan.write_text(json.dumps(plan))
    session = start(ORCH_CHECKPOINT_URI=str(tmp_path / "elsewhere"))
    assert session.settings == CheckpointSettings(
        every_steps=5,
        every_minutes=None,
        every_epochs=None,
        keep_last=2,
        keep_every=100,
        keep_best=Best("loss", "min", 2),
        asynchronous=True,
    )
    assert session.signals == (signal.SIGUSR2, signal.SIGTERM)
    session.resume()
    manifest = session.commit(lambda file: file.write(b"x"), step=1, epoch=0)
    assert (manifest.code_hash, manifest.image) == ("abc", "sha256:1")
    assert Path(session.checkpoint_path(manifest)).parent == tmp_path / "elsewhere"


# --- being stopped


@pytest.mark.usefixtures("restored_signals")
def test_signals_only_set_a_flag_and_the_first_one_counts(start: Callable[..., Session]) -> None:
    session = start()
    session.install_signal_handlers()
    session.install_signal_handlers()
    assert not session.stop_requested
    os.kill(os.getpid(), signal.SIGUSR1)
    first = session.signalled_at
    os.kill(os.getpid(), signal.SIGTERM)
    assert session.stop_requested
    assert session.signalled_at == first


def test_the_deadline_is_read_anew_because_a_second_signal_shortens_it(tmp_path: Path) -> None:
    file = tmp_path / "deadline.json"
    request = StopRequest(file, clock=lambda: 100.0)
    assert request.deadline() is None
    file.write_text('{"deadline": 130, "cause": "preempted"}')
    assert request.seconds_left() == 30 - DEADLINE_MARGIN_S
    file.write_text('{"deadline": 110}')
    assert request.seconds_left() == 10 - DEADLINE_MARGIN_S
    file.write_text('{"dead')
    assert request.seconds_left() == 10 - DEADLINE_MARGIN_S
    file.unlink()
    assert request.seconds_left() == 10 - DEADLINE_MARGIN_S


def test_the_watchdog_acts_at_the_deadline_though_no_handler_could_run(tmp_path: Path) -> None:
    """A main thread that hangs in C runs no signal handler; the agent's deadline says that we were told to stop."""
    file = tmp_path / "deadline.json"
    missed = threading.Event()
    watchdog = DeadlineWatchdog(StopRequest(file), missed.set)
    watchdog.start()
    assert not missed.wait(0.6)
    write_json(file, {"deadline": time.time() + 600})
    assert not missed.wait(0.6)
    write_json(file, {"deadline": time.time()})
    assert missed.wait(60)
    watchdog.join(60)


def test_the_watchdog_ends_a_process_that_reaches_no_step_boundary(tmp_path: Path) -> None:
    """The main thread hangs in a call that never returns; the deadline still ends the process, with a verdict."""
    program = """
import os, pathlib, signal, threading, time
from orchestrator.files import write_json
from orchestrator.worker.session import Session
session = Session.start()
session.install_signal_handlers()
session.resume()
session.commit(lambda file: file.write(b"x"), step=3, epoch=1)
session.report(5, 1, None)
write_json(pathlib.Path(os.environ["ORCH_DEADLINE_FILE"]), {"deadline": time.time() + 2.0})
os.kill(os.getpid(), signal.SIGTERM)
threading.Event().wait()
"""
    environ = {
        "ORCH_RUN_ID": "r",
        "ORCH_RUN_DIR": str(tmp_path),
        "ORCH_ATTEMPT": "0",
        "ORCH_DEADLINE_FILE": str(tmp_path / "deadline.json"),
    }
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | environ, timeout=120, check=False)
    assert done.returncode == 0  # under orch: PID 1 reads the verdict
    said = verdict(tmp_path)
    assert (said["outcome"], said["reason"], said["step"]) == ("unsaved", "deadline_missed", 5)
    assert "the checkpoint of step 3 stands" in said["message"]


def test_a_program_started_beside_a_rank_does_not_take_the_run_over(start: Callable[..., Session]) -> None:
    """`orch shell` gives it the rank's own environment; resuming with that would fence the rank for good."""
    session = start()
    session.resume()
    with pytest.raises(CheckpointError, match="beside a running rank of run-1"):
        start(ORCH_ATTACHED="1")
    with pytest.raises(CheckpointError):  # ORCH_CHECKPOINT_URI is still there
        start(managed=False, ORCH_ATTACHED="1")
    session.commit(lambda file: file.write(b"x"), step=1, epoch=0)


# --- checkpoints


def test_commit_is_found_by_the_next_attempt(tmp_path: Path, start: Callable[..., Session]) -> None:
    first = start()
    assert first.resume() is None
    first.report(3, 0, 10)
    first.commit(lambda file: file.write(b"weights"), step=3, epoch=0)
    second = start(attempt=1)
    found = second.resume()
    assert found is not None
    assert found.path.read_bytes() == b"weights"
    assert second.resumed_step == 3
    events = [(event["event"], event["attempt"]) for event in read_events(RunPaths(tmp_path))]
    assert events == [("checkpoint_committed", 0), ("resumed", 1)]
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 3


def test_a_file_url_is_a_directory_like_any_other(tmp_path: Path, start: Callable[..., Session]) -> None:
    url = f"file://{RunPaths(tmp_path).checkpoints}"  # taken for an object store, its saves went for emergency saves
    for attempt in range(2):
        session = start(attempt=attempt, managed=False, ORCH_CHECKPOINT_URI=url)
        found = session.resume()
        session.commit(lambda file: file.write(b"weights"), step=attempt + 1, epoch=0)
        session.verdict("unsaved", step=attempt + 1, epoch=0)
    assert found is not None
    assert found.path.read_bytes() == b"weights"
    assert session.shares_files


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    tmp_path: Path, start: Callable[..., Session]
) -> None:
    first = start()
    first.resume()
    first.commit(lambda file: file.write(b"good"), step=1, epoch=0)
    damaged = first.commit(lambda file: file.write(b"soon bad"), step=2, epoch=0)
    path = Path(first.checkpoint_path(damaged))
    path.chmod(0o600)
    path.write_bytes(b"SOON BAD")
    second = start(attempt=1)
    found = second.resume()
    assert found is not None
    assert found.manifest.step == 1
    rejected = [event for event in read_events(RunPaths(tmp_path)) if event["event"] == "checkpoint_rejected"]
    assert len(rejected) == 1
    assert path.name in rejected[0]["path"]


def test_when_all_are_damaged_the_events_say_so(tmp_path: Path, start: Callable[..., Session]) -> None:
    first = start()
    first.resume()
    manifest = first.commit(lambda file: file.write(b"soon bad"), step=2, epoch=0)
    path = Path(first.checkpoint_path(manifest))
    path.chmod(0o600)
    path.write_bytes(b"SOON BAD")
    second = start(attempt=1)
    with pytest.raises(CheckpointCorrupt, match="all 1 checkpoints") as caught, second.guard():
        second.resume()
    said = json.loads(second.paths.verdict(1).read_text())["message"]
    assert said == f"{caught.value.message}; hint: {caught.value.hint}"
    events = list(read_events(RunPaths(tmp_path)))
    assert [event["path"] for event in events if event["event"] == "checkpoint_rejected"] == [str(path.parent)]
    assert usable_checkpoint(events, tmp_path, look=False) == Usable(None, 2)


def test_old_checkpoints_are_removed_but_not_while_stopping(tmp_path: Path, start: Callable[..., Session]) -> None:
    session = start()
    session.settings = CheckpointSettings(keep_last=2)
    session.resume()
    for step in range(1, 5):
        session.commit(lambda file: file.write(b"x"), step=step, epoch=0)
    assert [manifest.step for manifest in session.store.manifests()] == [4, 3]
    session._stop.signalled_at = time.time()
    session.commit(lambda file: file.write(b"x"), step=5, epoch=0)
    assert [manifest.step for manifest in session.store.manifests()] == [5, 4, 3]


def test_the_best_by_a_metric_stay(start: Callable[..., Session]) -> None:
    session = start()
    session.settings = CheckpointSettings(keep_last=2, keep_every=None, keep_best=Best("loss", "min", 1))
    session.resume()
    for step, loss in [(1, 0.9), (2, 0.1), (3, 0.5), (4, float("nan")), (5, 0.7)]:
        session.commit(lambda file: file.write(b"x"), step=step, epoch=0, metrics={"loss": loss})
    assert [(m.step, dict(m.metrics)) for m in session.store.manifests()] == [
        (5, {"loss": 0.7}),
        (4, {}),
        (2, {"loss": 0.1}),
    ]


def test_to_go_on_with_other_data_is_refused_unless_it_is_allowed(
    tmp_path: Path, start: Callable[..., Session]
) -> None:
    def attempt(number: int, data: str | None) -> Session:
        session = start(attempt=number)
        if data is not None:
            session.declare_data(data)
        session.resume()
        return session

    attempt(0, "1000 images").commit(lambda file: file.write(b"x"), step=1, epoch=0)
    attempt(1, "1000 images")
    attempt(2, None)  # who says nothing is not held up
    with pytest.raises(CheckpointError, match="1000 images then, 900 images now") as caught:
        attempt(3, "900 images")
    assert "--allow-drift data" in (caught.value.hint or "")
    RunPaths(tmp_path).plan_dir.mkdir()
    write_json(RunPaths(tmp_path).agent_plan, {"allow_drift": ["data"]})
    attempt(4, "900 images").commit(lambda file: file.write(b"x"), step=2, epoch=0)
    drift = [event for event in read_events(RunPaths(tmp_path)) if event["event"] == "drift"]
    assert [(event["attempt"], event["step"]) for event in drift] == [(4, 1)]
    assert drift[0]["changes"] == [{"key": "data", "old": "1000 images", "new": "900 images"}]
    RunPaths(tmp_path).agent_plan.unlink()
    attempt(5, "900 images")  # from its own checkpoint nothing has changed


def test_where_it_went_on_is_in_the_log(
    tmp_path: Path, start: Callable[..., Session], caplog: pytest.LogCaptureFixture
) -> None:
    first = start()
    first.resume()
    first.commit(lambda file: file.write(b"good"), step=1, epoch=0)
    bad = first.commit(lambda file: file.write(b"soon bad"), step=2, epoch=0)
    bad.path.write_bytes(b"SOON BAD")
    with caplog.at_level("INFO", logger="orchestrator.worker"):
        start(attempt=1).resume()
    assert f"passed over {bad.path}: the content of" in caplog.text
    assert "resumed from step 1 of attempt 0: " in caplog.text


def test_other_ranks_neither_search_nor_write(tmp_path: Path, start: Callable[..., Session]) -> None:
    session = start(rank=1)
    assert session.resume() is None
    session.report(1, 0, None)
    session.event("anything")
    assert list(tmp_path.iterdir()) == []


def test_commit_without_a_fence_is_refused(start: Callable[..., Session]) -> None:
    with pytest.raises(CheckpointError, match="resume"):
        start().commit(lambda file: file.write(b"x"), step=1, epoch=0)


# --- a save beside the training


class Held:
    """Writes its content once it is let."""

    def __init__(self, content: bytes = b"x", error: Exception | None = None) -> None:
        self.content, self.error = content, error
        self.begun, self.let = threading.Event(), threading.Event()

    def __call__(self, file: BinaryIO) -> None:
        self.begun.set()
        assert self.let.wait(60)
        if self.error is not None:
            raise self.error
        file.write(self.content)

    def freeze(self) -> Callable[[BinaryIO], None]:
        return self


def test_training_goes_on_while_a_save_is_written(start: Callable[..., Session]) -> None:
    session, held = start(), Held()
    session.resume()
    session.commit_async(held.freeze, step=1, epoch=0)
    assert held.begun.wait(60)
    session.report(2, 0, 10)
    assert session.last_manifest is None
    held.let.set()
    session.finish_save()
    assert session.last_manifest is not None
    assert session.last_manifest.step == 1
    assert session._position == (2, 0)  # where the training is, not what was saved


def test_a_second_save_waits_for_the_first_before_it_touches_the_state(start: Callable[..., Session]) -> None:
    session, held = start(), Held()
    session.resume()
    session.commit_async(held.freeze, step=1, epoch=0)
    frozen = threading.Event()

    def freeze() -> Callable[[BinaryIO], object]:
        assert session.last_manifest is not None
        assert session.last_manifest.step == 1
        frozen.set()
        return lambda file: file.write(b"y")

    second = threading.Thread(target=session.commit_async, args=(freeze,), kwargs={"step": 2, "epoch": 0})
    second.start()
    assert held.begun.wait(60)
    assert not frozen.wait(0.1)
    held.let.set()
    second.join(60)
    session.finish_save()
    assert [manifest.step for manifest in session.store.manifests()] == [2, 1]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), ValueError("cannot be written")])
def test_a_failed_save_is_raised_by_the_next_report_and_once(start: Callable[..., Session], failure: Exception) -> None:
    session, held = start(), Held(error=failure)
    session.resume()
    session.commit_async(held.freeze, step=1, epoch=0)
    held.let.set()
    assert eventually(lambda: session._in_flight._save is not None and session._in_flight._save.error is not None)
    expected = CheckpointError if isinstance(failure, OSError) else ValueError
    with pytest.raises(expected, match="No space left" if isinstance(failure, OSError) else "cannot be written"):
        session.report(2, 0, 10)
    session.report(3, 0, 10)
    session.commit(lambda file: file.write(b"x"), step=3, epoch=0)


def test_a_save_beside_the_training_that_is_fenced_ends_as_any_other(
    tmp_path: Path, start: Callable[..., Session]
) -> None:
    session, held = start(), Held()
    with pytest.raises(Exited) as left, session.guard():
        session.resume()
        session.commit_async(held.freeze, step=1, epoch=0)
        start(attempt=1).resume()
        held.let.set()
        assert eventually(lambda: session._in_flight._save is not None and session._in_flight._save.error is not None)
        session.report(2, 0, 10)
    assert left.value.code == 93
    assert verdict(tmp_path)["outcome"] == "fenced"


@pytest.mark.parametrize("leave", [lambda: None, lambda: sys.exit(0)], ids=["at its end", "by sys.exit(0)"])
def test_the_last_save_is_waited_for_and_its_failure_is_the_runs(
    tmp_path: Path, start: Callable[..., Session], leave: Callable[[], object]
) -> None:
    session, held = start(), Held(error=OSError(5, "Input/output error"))
    with pytest.raises(CheckpointError, match="Input/output error"), session.guard():
        session.resume()
        session.commit_async(held.freeze, step=1, epoch=0)
        threading.Timer(0.1, held.let.set).start()
        leave()
    assert (verdict(tmp_path)["outcome"], verdict(tmp_path)["reason"]) == ("failed", "checkpoint_failure")


def test_nothing_is_completed_before_its_last_save(tmp_path: Path, start: Callable[..., Session]) -> None:
    session, held = start(), Held()
    session.resume()
    session.commit_async(held.freeze, step=1, epoch=0)
    threading.Timer(0.1, held.let.set).start()
    session.verdict("completed", step=1, epoch=0)
    assert verdict(tmp_path)["checkpoint"] is not None


def test_old_checkpoints_go_beside_the_training_too(start: Callable[..., Session]) -> None:
    session = start()
    session.settings = CheckpointSettings(keep_last=2, asynchronous=True)
    session.resume()
    for step in range(1, 5):
        session.commit_async(lambda: lambda file: file.write(b"x"), step=step, epoch=0)
    session.finish_save()
    assert [manifest.step for manifest in session.store.manifests()] == [4, 3]


@pytest.mark.parametrize(("seconds_left", "saved"), [(None, 2), (100, 2), (0.001, 1)])
def test_a_stop_finishes_the_save_in_flight_and_then_saves_if_time_allows(
    tmp_path: Path,
    start: Callable[..., Session],
    monkeypatch: pytest.MonkeyPatch,
    seconds_left: float | None,
    saved: int,
) -> None:
    session, held = start(), Held()
    session.resume()
    if seconds_left is not None:
        write_json(tmp_path / "deadline.json", {"deadline": time.time() + seconds_left + DEADLINE_MARGIN_S})
    session.commit_async(held.freeze, step=1, epoch=0)
    finish_commit = session.finish_commit

    def let_it_finish() -> None:  # from in here: a timer could be too early to find it in flight
        held.let.set()
        finish_commit()

    monkeypatch.setattr(session, "finish_commit", let_it_finish)
    session.commit_before_leaving(lambda file: file.write(b"y"), step=2, epoch=0)
    with pytest.raises(Exited):
        session.stopped(step=2, epoch=0)
    said = verdict(tmp_path)
    assert (said["outcome"], said["step"]) == ("saved", saved)
    assert said["checkpoint"] == session.checkpoint_path(session.store.manifests()[0])
    assert [manifest.step for manifest in session.store.manifests()] == list(range(saved, 0, -1))


def test_a_stop_does_not_wait_for_an_upload(tmp_path: Path, start: Callable[..., Session]) -> None:
    """With an object store the last save goes to the run directory, and an upload in flight would only delay it."""
    session, held = start(), Held()
    session.resume()
    session._places.refuge = Refuge(tmp_path / "refuge")
    session.commit_async(held.freeze, step=1, epoch=0)
    upload = session._in_flight._save
    assert upload is not None
    assert held.begun.wait(60)
    session.commit_before_leaving(lambda file: file.write(b"y"), step=2, epoch=0)
    held.let.set()
    upload.wait()  # it ends all the same before the process does
    with pytest.raises(Exited):
        session.stopped(step=2, epoch=0)
    assert [manifest.step for manifest in session._places.refuge.store.manifests()] == [2]
    assert (verdict(tmp_path)["outcome"], verdict(tmp_path)["step"]) == ("saved", 2)


def test_without_a_save_in_flight_a_stop_always_tries(tmp_path: Path, start: Callable[..., Session]) -> None:
    session = start()
    session.resume()
    session.commit(lambda file: file.write(b"x"), step=1, epoch=0)
    write_json(tmp_path / "deadline.json", {"deadline": time.time() + DEADLINE_MARGIN_S})
    session.commit_before_leaving(lambda file: file.write(b"y"), step=2, epoch=0)
    assert session.store.manifests()[0].step == 2


def test_a_stop_does_not_wait_for_old_checkpoints_to_be_removed(start: Callable[..., Session]) -> None:
    """And the removal, when it goes on, does not turn last.ckpt back to the checkpoint it knows of."""
    session = start()
    session.settings = CheckpointSettings(keep_last=2)
    session.resume()
    verifying, go_on = threading.Event(), threading.Event()
    store = session.store
    assert isinstance(store, PosixStore)
    examine = store.medium.examine

    def slow(*arguments: Any, **options: Any) -> Any:
        verifying.set()
        assert go_on.wait(60)
        return examine(*arguments, **options)

    for step in (1, 2):
        session.commit(lambda file: file.write(b"x"), step=step, epoch=0)
    store.medium.examine = slow  # type: ignore[method-assign]
    session.commit_async(lambda: lambda file: file.write(b"x"), step=3, epoch=0)
    assert verifying.wait(60)
    session.commit_before_leaving(lambda file: file.write(b"y"), step=4, epoch=0)
    go_on.set()
    session.finish_save()
    assert [manifest.step for manifest in store.manifests()] == [4, 3, 2, 1]
    assert store.medium.pointer() == store.manifests()[0].files[0].name


def test_the_deadline_ends_a_save_in_flight_that_does_not_end(tmp_path: Path, start: Callable[..., Session]) -> None:
    session, held = start(), Held()
    session.resume()
    session.commit(lambda file: file.write(b"x"), step=1, epoch=0)
    session.commit_async(held.freeze, step=2, epoch=0)
    session.report(3, 0, None)
    with pytest.raises(Exited) as left:
        session._deadline_missed()
    held.let.set()
    assert left.value.code == 0
    said = verdict(tmp_path)
    assert (said["outcome"], said["reason"]) == ("unsaved", "deadline_missed")
    assert "step 1 stands" in said["message"]


def test_metrics_are_those_of_the_step_that_is_saved(start: Callable[..., Session]) -> None:
    session, held = start(), Held()
    session.resume()
    metrics = {"loss": 1.0}
    session.commit_async(held.freeze, step=1, epoch=0, metrics=metrics)
    metrics["loss"] = 0.5  # the loop has gone on
    held.let.set()
    session.finish_save()
    assert session.last_manifest is not None
    assert session.last_manifest.metrics == {"loss": 1.0}


def test_a_metric_may_be_a_tensor_and_what_is_no_number_is_left_out(
    start: Callable[..., Session], caplog: pytest.LogCaptureFixture
) -> None:
    class Scalar:
        def __float__(self) -> float:
            return 0.25

    class Vector:
        def __float__(self) -> float:
            raise RuntimeError("a Tensor with 2 elements cannot be converted to Scalar")

    session = start()
    session.resume()
    given: Any = {"loss": Scalar(), "shape": Vector(), "name": "x", "nothing": None, "wrong": float("nan")}
    manifest = session.commit(lambda file: file.write(b"x"), step=1, epoch=0, metrics=given)
    assert session.store.manifests()[0].metrics == manifest.metrics == {"loss": 0.25}
    assert [record.args[0] for record in caplog.records if isinstance(record.args, tuple)] == [
        "shape",
        "name",
        "nothing",
    ]


@pytest.mark.parametrize("heard", ["here", "by another rank"])
def test_a_failed_upload_does_not_cost_the_last_save(tmp_path: Path, start: Callable[..., Session], heard: str) -> None:
    session, held = start(), Held(error=CheckpointError("no answer"))
    session.resume()
    session._places.refuge = Refuge(tmp_path / "refuge")
    session._in_flight.begin(lambda: held(io.BytesIO()), lambda: None)  # type: ignore[arg-type, return-value]
    held.let.set()
    session._in_flight.wait()
    if heard == "here":
        session._stop.signalled_at = time.time()
    session.report(2, 0, 10, stopping=heard != "here")
    session.commit_before_leaving(lambda file: file.write(b"y"), step=2, epoch=0)
    assert in_refuge(session) == [2]


def test_a_save_in_flight_is_waited_for_when_the_training_fails(start: Callable[..., Session]) -> None:
    session, held = start(), Held()
    with pytest.raises(ValueError, match="the training"), session.guard():
        session.resume()
        session.commit_async(held.freeze, step=1, epoch=0)
        assert held.begun.wait(60)
        threading.Timer(0.1, held.let.set).start()
        raise ValueError("the training failed")
    assert session.last_manifest is not None


def test_at_the_deadline_a_save_in_flight_is_not_waited_for_after_a_failure(
    tmp_path: Path, start: Callable[..., Session]
) -> None:
    session, held = start(), Held()
    write_json(tmp_path / "deadline.json", {"deadline": time.time()})
    with pytest.raises(ValueError, match="the training"), session.guard():
        session.resume()
        session.commit_async(held.freeze, step=1, epoch=0)
        assert held.begun.wait(60)
        raise ValueError("the training failed")
    assert session.last_manifest is None
    held.let.set()


# --- a disk that takes nothing any more


def test_a_save_whose_event_cannot_be_written_is_a_save(tmp_path: Path, start: Callable[..., Session]) -> None:
    (tmp_path / "events").write_text("no directory: every append fails")
    session = start()
    session.resume()
    session.commit(lambda file: file.write(b"x"), step=8, epoch=1)
    with pytest.raises(Exited):
        session.stopped(step=8, epoch=1)
    assert verdict(tmp_path)["outcome"] == "saved"


def test_the_failure_is_raised_even_if_its_verdict_cannot_be_written(
    tmp_path: Path, start: Callable[..., Session]
) -> None:
    RunPaths(tmp_path).verdict(0).mkdir()
    with pytest.raises(CheckpointError, match="disk full"), start().guard():
        raise CheckpointError("disk full")
    with pytest.raises(Exited) as exited, start().guard():
        raise Fenced("attempt 1 took over")
    assert exited.value.code == 93


def test_at_the_deadline_rank_0_does_not_leave_as_if_done_without_a_verdict(
    tmp_path: Path, start: Callable[..., Session]
) -> None:
    RunPaths(tmp_path).verdict(0).mkdir()
    session = start()
    for _ in range(2):  # the first failure to write must not count as said
        with pytest.raises(Exited) as exited:
            session._deadline_missed()
        assert exited.value.code == 75


# --- leaving


def test_after_a_save_all_ranks_of_a_managed_run_leave_with_zero(tmp_path: Path, start: Callable[..., Session]) -> None:
    barriers: list[int] = []
    for rank in (0, 1):
        session = start(rank=rank)
        if rank == 0:
            session.resume()
            session._stop.signalled_at = time.time() - 2
            session.commit(lambda file: file.write(b"x"), step=8, epoch=1)
        with pytest.raises(Exited) as exited:
            session.stopped(step=8, epoch=1, barrier=lambda: barriers.append(1))
        assert exited.value.code == 0
    said = verdict(tmp_path)
    assert (said["outcome"], said["reason"], said["step"], said["rank"]) == ("saved", "preempted", 8, 0)
    assert said["checkpoint"].endswith(".ckpt")
    assert said["saved_in_s"] >= 2
    assert barriers == [1, 1]
    assert not RunPaths(tmp_path).verdict(0, 1).exists()


def test_without_orch_ranks_leave_with_75(start: Callable[..., Session]) -> None:
    session = start(managed=False)

    def broken() -> None:
        raise RuntimeError("connection closed by a peer that has left")

    with pytest.raises(Exited) as exited:
        session.stopped(step=8, epoch=1, barrier=broken)
    assert exited.value.code == 75


def test_a_failure_is_written_by_the_rank_that_failed(tmp_path: Path, start: Callable[..., Session]) -> None:
    session = start(rank=3, WORLD_SIZE="4")
    session.report(5, 1, None)
    with pytest.raises(ZeroDivisionError), session.guard():
        _ = 1 / 0
    said = verdict(tmp_path, rank=3)
    assert (said["outcome"], said["reason"], said["rank"], said["step"]) == ("failed", "failure", 3, 5)
    assert said["message"] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CheckpointError("disk full"), "checkpoint_failure"),
        (MemoryError(), "out_of_memory"),
        (SystemExit(3), "failure"),
    ],
)
def test_what_failed_decides_the_reason(
    tmp_path: Path, start: Callable[..., Session], error: BaseException, reason: str
) -> None:
    with pytest.raises(type(error)), start().guard():
        raise error
    assert verdict(tmp_path)["reason"] == reason


def test_leaving_with_success_is_no_failure(tmp_path: Path, start: Callable[..., Session]) -> None:
    with pytest.raises(SystemExit), start().guard():
        raise SystemExit(0)
    assert not RunPaths(tmp_path).verdict(0).exists()


def test_a_fenced_attempt_never_restarts(tmp_path: Path, start: Callable[..., Session]) -> None:
    old = start()
    old.resume()
    start(attempt=1).resume()
    with pytest.raises(Exited) as exited, old.guard():
        old.commit(lambda file: file.write(b"x"), step=1, epoch=0)
    assert exited.value.code == 93
    assert (verdict(tmp_path)["outcome"], verdict(tmp_path)["reason"]) == ("fenced", "fenced")


def test_a_connection_that_breaks_because_rank_zero_left_is_no_failure(
    tmp_path: Path, start: Callable[..., Session]
) -> None:
    start().verdict("unsaved", step=1, epoch=0, reason=ExitReason.DEADLINE_MISSED)
    with pytest.raises(Exited) as exited, start(rank=1).guard():
        raise RuntimeError("connection closed by peer")
    assert exited.value.code == 0
    assert not RunPaths(tmp_path).verdict(0, 1).exists()


def test_what_breaks_because_rank_zero_failed_first_hides_no_reason(
    tmp_path: Path, start: Callable[..., Session]
) -> None:
    with pytest.raises(CheckpointError), start().guard():
        raise CheckpointError("disk full")
    with pytest.raises(RuntimeError), start(rank=1).guard():
        raise RuntimeError("connection closed by peer")
    assert verdict(tmp_path)["reason"] == "checkpoint_failure"
    assert not RunPaths(tmp_path).verdict(0, 1).exists()


def test_outside_the_main_thread_signals_are_not_caught_and_that_is_said(
    start: Callable[..., Session], caplog: pytest.LogCaptureFixture
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=start().install_signal_handlers)
    thread.start()
    thread.join(60)
    assert signal.getsignal(signal.SIGUSR1) is before
    assert "not in the main thread" in caplog.text


def test_the_first_verdict_stands_unless_a_failure_follows(tmp_path: Path, start: Callable[..., Session]) -> None:
    session = start()
    session.verdict("saved", step=4, epoch=0)
    session.verdict("unsaved", step=4, epoch=0)
    assert verdict(tmp_path)["outcome"] == "saved"
    session.verdict("failed", step=4, epoch=0)
    assert verdict(tmp_path)["outcome"] == "failed"


def test_fenced_is_raised_not_swallowed_outside_a_guard(start: Callable[..., Session]) -> None:
    old = start()
    old.resume()
    start(attempt=1).resume()
    with pytest.raises(Fenced):
        old.commit(lambda file: file.write(b"x"), step=1, epoch=0)


def test_the_session_needs_neither_torch_nor_pydantic() -> None:
    program = (
        "import sys, orchestrator.worker.session; print([m for m in ('torch', 'pydantic', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


# --- emergency saves: what a claim would bury


@pytest.fixture
def store_url() -> str:
    return f"memory://{os.urandom(4).hex()}/run"


def in_refuge(session: Session) -> list[int]:
    assert session._places.refuge is not None
    return [manifest.step for manifest in session._places.refuge.store.manifests()]


def unreadable(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], None]:
    """Until the result is called, no checkpoint of that step can be read from a disk."""
    mismatch = posix._mismatch

    def stale(path: Path, *arguments: Any, **options: Any) -> str | None:
        if f"step-{step:09d}" in path.name:
            raise OSError(errno.ESTALE, "Stale file handle")
        return mismatch(path, *arguments, **options)

    monkeypatch.setattr(posix, "_mismatch", stale)
    return lambda: monkeypatch.setattr(posix, "_mismatch", mismatch)


def test_an_emergency_save_that_is_passed_over_in_the_store_is_not_buried(
    start: Callable[..., Session], store_url: str
) -> None:
    first = start(ORCH_CHECKPOINT_URI=store_url)
    first.resume()
    first.commit(lambda file: file.write(b"a"), step=100, epoch=0)
    first.commit_before_leaving(lambda file: file.write(b"b"), step=150, epoch=0)
    second = start(attempt=1, ORCH_CHECKPOINT_URI=store_url)
    examine = second.store.medium.examine

    def times_out(entry: FileEntry, **options: Any) -> Problem | None:
        return Problem("no answer", certain=False) if "000150" in entry.name else examine(entry, **options)

    second.store.medium.examine = times_out  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"could not be read there|cannot be read now"):
        second.resume()
    assert in_refuge(second) == [150]
    found = start(attempt=2, ORCH_CHECKPOINT_URI=store_url).resume()
    assert found is not None
    assert found.manifest.step == 150


@pytest.mark.parametrize("before", [[], [30]], ids=["alone", "with an older one in the store"])
def test_an_emergency_save_that_cannot_be_read_now_is_not_buried(
    start: Callable[..., Session], monkeypatch: pytest.MonkeyPatch, store_url: str, before: list[int]
) -> None:
    first = start(ORCH_CHECKPOINT_URI=store_url)
    first.resume()
    for step in before:
        first.commit(lambda file: file.write(b"x"), step=step, epoch=0)
    first.commit_before_leaving(lambda file: file.write(b"x"), step=50, epoch=0)
    well_again = unreadable(monkeypatch, 50)
    with pytest.raises(CheckpointError, match="cannot be read") as refused:
        start(attempt=1, ORCH_CHECKPOINT_URI=store_url).resume()
    assert "nothing was changed" in str(refused.value.hint)
    well_again()
    found = start(attempt=2, ORCH_CHECKPOINT_URI=store_url).resume()
    assert found is not None
    assert found.manifest.step == 50


def test_a_damaged_emergency_save_is_passed_over_unless_it_is_all_there_is(
    start: Callable[..., Session], store_url: str
) -> None:
    first = start(ORCH_CHECKPOINT_URI=store_url)
    first.resume()
    first.commit_before_leaving(lambda file: file.write(b"x"), step=50, epoch=0)
    assert first._places.refuge is not None
    (saved,) = first._places.refuge.store.manifests()
    saved.path.write_bytes(b"short")
    with pytest.raises(CheckpointCorrupt, match="the only checkpoint"):
        start(attempt=1, ORCH_CHECKPOINT_URI=store_url).resume()
    first.commit(lambda file: file.write(b"x"), step=40, epoch=0)
    second = start(attempt=2, ORCH_CHECKPOINT_URI=store_url)
    found = second.resume()
    assert found is not None
    assert found.manifest.step == 40
    assert in_refuge(second) == [50]


# --- a place where the checkpoints are no longer


@pytest.mark.parametrize("managed", [True, False])
def test_a_run_that_has_saved_does_not_start_over_because_the_place_is_empty(
    tmp_path: Path, start: Callable[..., Session], managed: bool
) -> None:
    first = start(managed=managed)
    first.resume()
    first.commit(lambda file: file.write(b"x"), step=3, epoch=0)
    place = RunPaths(tmp_path).checkpoints
    place.rename(tmp_path / "unmounted")
    second = start(managed=managed, attempt=1)
    with pytest.raises(CheckpointError, match="has saved step 3, but there is nothing at all") as refused:
        second.resume()
    assert ("--new" in str(refused.value.hint)) == managed
    with pytest.raises(CheckpointError, match="nothing at all"):  # the refusal has left nothing that looks like a start
        start(managed=managed, attempt=2).resume()
    (tmp_path / "unmounted").rename(place)
    assert start(managed=managed, attempt=3).resume() is not None


def test_a_run_that_never_saved_or_whose_saves_were_moved_away_starts_from_the_beginning(
    tmp_path: Path, start: Callable[..., Session]
) -> None:
    for attempt in range(2):
        session = start(attempt=attempt)
        assert session.resume() is None
    session.commit(lambda file: file.write(b"x"), step=3, epoch=0)
    for path in RunPaths(tmp_path).checkpoints.glob("step-*"):
        path.unlink()
    assert start(attempt=2).resume() is None


# --- a save for which there is another place


def out_of_order(store: CheckpointStore, code: int) -> None:
    """From now on the place takes no data, and removes none."""

    def refuses(*arguments: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    store.medium.write_data = refuses  # type: ignore[method-assign]
    store.medium.remove = refuses  # type: ignore[method-assign]


@pytest.mark.parametrize("beside", [False, True], ids=["the loop waits", "beside the training"])
def test_a_save_goes_to_the_run_directory_while_the_store_is_down(
    tmp_path: Path, start: Callable[..., Session], store_url: str, beside: bool
) -> None:
    session = start(ORCH_CHECKPOINT_URI=store_url)
    session.settings = CheckpointSettings(keep_last=2)
    session.resume()
    session.commit(lambda file: file.write(b"x"), step=1, epoch=0)
    out_of_order(session.store, errno.ETIMEDOUT)
    for step in (2, 3, 4):
        if beside:
            session.commit_async(lambda: lambda file: file.write(b"y"), step=step, epoch=0)
        else:
            session.commit(lambda file: file.write(b"y"), step=step, epoch=0)
        session.finish_save()
    assert in_refuge(session) == [4, 3]  # as many as are kept elsewhere
    paths = [event["path"] for event in read_events(RunPaths(tmp_path)) if event["event"] == "checkpoint_committed"]
    assert [path.startswith(str(tmp_path)) for path in paths] == [False, True, True, True]
    found = start(attempt=1, ORCH_CHECKPOINT_URI=store_url).resume()
    assert found is not None
    assert found.manifest.step == 4


def test_the_last_save_goes_to_the_store_when_the_disk_is_full(start: Callable[..., Session], store_url: str) -> None:
    session = start(ORCH_CHECKPOINT_URI=store_url)
    session.resume()
    assert session._places.refuge is not None
    out_of_order(session._places.refuge.store, errno.EDQUOT)
    session.commit_before_leaving(lambda file: file.write(b"x"), step=5, epoch=0)
    assert [manifest.step for manifest in session.store.manifests()] == [5]


def test_a_save_in_parts_finds_the_other_place_too(start: Callable[..., Session], store_url: str) -> None:
    session = start(ORCH_CHECKPOINT_URI=store_url)
    session.resume()
    names = session.store.medium.names

    def down() -> list[str]:
        raise OSError(errno.ETIMEDOUT, "no answer")

    session.store.medium.names = down  # type: ignore[method-assign]
    saving = session.begin(3)
    session.publish(saving, [session.write_part(saving, lambda file: file.write(b"x"))], epoch=0)
    assert in_refuge(session) == [3]
    session.store.medium.names = names  # type: ignore[method-assign]
    assert session.store.manifests() == []


def test_an_upload_that_fails_while_the_process_leaves_does_not_go_to_the_disk(
    start: Callable[..., Session], store_url: str
) -> None:
    session, held = start(ORCH_CHECKPOINT_URI=store_url), Held()
    session.resume()
    session.commit_async(held.freeze, step=1, epoch=0)
    upload = session._in_flight._save
    assert upload is not None
    assert held.begun.wait(60)
    session.commit_before_leaving(lambda file: file.write(b"y"), step=2, epoch=0)
    held.error = OSError(errno.ETIMEDOUT, "no answer")
    held.let.set()
    upload.wait(60)
    assert in_refuge(session) == [2]


def test_where_nothing_takes_the_save_the_first_failure_is_raised(
    start: Callable[..., Session], store_url: str
) -> None:
    session = start(ORCH_CHECKPOINT_URI=store_url)
    session.resume()
    assert session._places.refuge is not None
    out_of_order(session.store, errno.ETIMEDOUT)
    out_of_order(session._places.refuge.store, errno.EDQUOT)
    with pytest.raises(CheckpointError, match="ETIMEDOUT"):
        session.commit(lambda file: file.write(b"x"), step=5, epoch=0)


def test_old_checkpoints_that_cannot_be_removed_do_not_end_the_run(
    start: Callable[..., Session], caplog: pytest.LogCaptureFixture
) -> None:
    session = start()
    session.settings = CheckpointSettings(keep_last=2)
    session.resume()

    def refuses(*arguments: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    session.store.medium.sync = refuses  # type: ignore[method-assign]
    for step in range(1, 5):
        session.commit(lambda file: file.write(b"x"), step=step, epoch=0)
    assert "old checkpoints were not removed" in caplog.text


def test_the_last_save_of_a_replaced_attempt_ends_it_for_good(
    tmp_path: Path, start: Callable[..., Session], store_url: str
) -> None:
    session = start(ORCH_CHECKPOINT_URI=store_url)
    with pytest.raises(Exited) as left, session.guard():
        session.resume()
        session.commit(lambda file: file.write(b"x"), step=1, epoch=0)
        start(attempt=1, ORCH_CHECKPOINT_URI=store_url).resume()
        session.commit_before_leaving(lambda file: file.write(b"x"), step=2, epoch=0)
    assert left.value.code == 93
    assert verdict(tmp_path)["outcome"] == "fenced"


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_store_that_does_not_say_who_owns_the_run_does_not_cost_the_last_save(
    start: Callable[..., Session], monkeypatch: pytest.MonkeyPatch, store_url: str, how: str
) -> None:
    monkeypatch.setattr("orchestrator.worker.places.OWNER_WAIT_S", 0.05)
    session, done = start(ORCH_CHECKPOINT_URI=store_url), threading.Event()
    session.resume()

    def owner() -> None:
        if how == "hangs":
            done.wait(60)
        raise CheckpointError("no answer")

    session.store.owner = owner  # type: ignore[assignment, method-assign]
    session.commit_before_leaving(lambda file: file.write(b"x"), step=2, epoch=0)
    done.set()
    assert in_refuge(session) == [2]


# --- emergency saves: what goes once it is in the store


def begin_with_an_emergency_save(start: Callable[..., Session], store_url: str) -> Session:
    first = start(ORCH_CHECKPOINT_URI=store_url)
    first.resume()
    first.commit(lambda file: file.write(b"x"), step=1, epoch=0)
    first.commit_before_leaving(lambda file: file.write(b"y"), step=2, epoch=0)
    return first


def test_checkpoints_that_a_run_kept_on_the_disk_before_it_had_a_store_stay(
    tmp_path: Path, start: Callable[..., Session], store_url: str
) -> None:
    first = start(managed=False)
    first.resume()
    for step in (1, 2, 3):
        first.commit(lambda file: file.write(b"x"), step=step, epoch=0)
    first.verdict("saved", step=3, epoch=0)
    before = sorted(path.name for path in RunPaths(tmp_path).checkpoints.iterdir())
    second = start(managed=False, ORCH_CHECKPOINT_URI=store_url)
    found = second.resume()
    assert found is not None
    assert found.manifest.step == 3
    assert sorted(path.name for path in RunPaths(tmp_path).checkpoints.iterdir()) == before


def test_of_an_emergency_save_with_a_damaged_manifest_everything_stays(
    tmp_path: Path, start: Callable[..., Session], store_url: str
) -> None:
    first = begin_with_an_emergency_save(start, store_url)
    assert first._places.refuge is not None
    (saved,) = first._places.refuge.store.manifests()
    (RunPaths(tmp_path).checkpoints / saved.name.manifest).write_bytes(b"")
    assert start(attempt=1, ORCH_CHECKPOINT_URI=store_url).resume() is not None
    left = {path.name for path in RunPaths(tmp_path).checkpoints.iterdir()}
    assert {saved.name.manifest, saved.name.data} <= left


def test_what_a_killed_emergency_save_left_goes(tmp_path: Path, start: Callable[..., Session], store_url: str) -> None:
    begin_with_an_emergency_save(start, store_url)
    place = RunPaths(tmp_path).checkpoints
    for name in ("step-000000003.e0001.0123abcd.ckpt", ".step-000000003.e0001.0123abcd.ckpt.0123456789ab.tmp"):
        (place / name).write_bytes(b"half")
    assert start(attempt=1, ORCH_CHECKPOINT_URI=store_url).resume() is not None
    assert list(place.iterdir()) == []


def test_an_emergency_save_that_cannot_be_removed_does_not_end_the_attempt(
    start: Callable[..., Session], caplog: pytest.LogCaptureFixture, store_url: str
) -> None:
    begin_with_an_emergency_save(start, store_url)
    second = start(attempt=1, ORCH_CHECKPOINT_URI=store_url)
    assert second._places.refuge is not None
    out_of_order(second._places.refuge.store, errno.EACCES)
    found = second.resume()
    assert found is not None
    assert found.manifest.step == 2
    assert "were not removed" in caplog.text

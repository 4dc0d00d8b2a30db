"""Random stops of random kinds on one local run: it completes, bit-identical to the run nobody touched.

Every failure names the seed: `ORCH_CHAOS_SEED=… pytest …` draws the same stops again (at moments that no seed repeats
exactly). `ORCH_CHAOS_STOPS` sets how many.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint import PosixStore
from tests.equality import assert_same_tree
from tests.history import Damage, History, assert_lines_never_mix
from tests.polling import poll

pytestmark = pytest.mark.slow

STOPS = int(os.environ.get("ORCH_CHAOS_STOPS", "60"))
SEED = int(os.environ.get("ORCH_CHAOS_SEED") or secrets.randbits(32))
AT_THE_END = 5  # of the stops: while the run writes its result and leaves
EVERY_STEPS, KEEP_LAST = 7, 3
STEPS_AN_EPOCH, STEPS_AN_ATTEMPT = 12, 24  # as in training_to_stop.py
EPOCHS = (STOPS * STEPS_AN_ATTEMPT) // STEPS_AN_EPOCH + 1  # more than the stops leave time for
STEPS = EPOCHS * STEPS_AN_EPOCH
START_S = 5.0  # what an attempt takes to its first step on an idle machine
LEAD_TIME_S = 8.0
DEADLINE_S = 120.0  # for anything waited for; where steps have to be made, for the next one of them

TRAINING = Path(__file__).with_name("training_to_stop.py")


class StoppedRun:
    """The run under test: what its files and processes say, and the command line."""

    def __init__(self, folder: Path, root: str) -> None:
        self.folder, self.root = folder, folder / root
        self.environ = {**os.environ, "ORCH_STATE_DIR": str(folder / "state"), "ORCH_NODE_DIR": str(folder / "node")}
        self.spec = folder / f"{root}.yaml"
        self.damaged: list[Damage] = []
        (folder / "node").mkdir(exist_ok=True)
        (folder / "code").mkdir(exist_ok=True)
        shutil.copy(TRAINING, folder / "code" / "train.py")
        spec = {
            "name": "random-stops",
            "backend": "local",
            "root": str(self.root),
            "job": {"script": "code/train.py", "args": {"epochs": EPOCHS}},
            "workspace": {"path": "code"},
            "checkpoint": {"every_steps": EVERY_STEPS, "keep_last": KEEP_LAST},
            "preemption": {"lead_time": f"{LEAD_TIME_S:g}s", "max_requeues": 10 * STOPS},
            "retry": {"failure": 10 * STOPS, "node_failure": 10 * STOPS, "backoff": "1s"},
        }
        self.spec.write_text(json.dumps(spec))
        self.dir = Path(self.orch("submit", str(self.spec))["run_dir"])

    def orch(self, *arguments: str) -> Any:
        argv = [sys.executable, "-m", "orchestrator", *arguments, "--json"]
        done = subprocess.run(
            argv, cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert done.returncode == 0, f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}"
        return json.loads(done.stdout)

    # --- files
    def sidecar(self) -> dict[str, Any]:
        try:
            sidecar: dict[str, Any] = json.loads((self.dir / "sidecar.json").read_text())
        except FileNotFoundError:  # the first attempt has not begun
            return {"status": "queued", "attempts": []}
        return sidecar

    def brief(self) -> dict[str, Any]:
        """The sidecar with its newest attempts only, for a message."""
        sidecar = self.sidecar()
        return {**sidecar, "attempts": sidecar["attempts"][-2:]}

    def attempt(self, number: int) -> dict[str, Any]:
        entry: dict[str, Any] = next(e for e in self.sidecar()["attempts"] if e["attempt"] == number)
        return entry

    def said(self) -> list[tuple[int, int]]:
        """(attempt, step) for every step made."""
        path = self.dir / "said.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(attempt), int(step)) for attempt, step in (line.split() for line in lines)]

    def made(self) -> int:
        """Grows with every step made."""
        path = self.dir / "said.txt"
        return path.stat().st_size if path.exists() else 0

    def completed(self) -> bool:
        return bool(self.sidecar()["status"] == "completed")

    def store(self) -> PosixStore:
        return PosixStore(self.dir / "checkpoints")

    # --- processes
    def agent(self) -> int:
        return int(json.loads((self.dir / "local-agent.json").read_text())["pid"])

    def processes(self) -> dict[int, list[str]]:
        """Command lines of all live processes of this run, by pid."""
        found = {}
        marks = (str(self.dir).encode(), str(self.folder / "node").encode())  # PID 1 knows of no run directory
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                words = (process / "cmdline").read_bytes()
                said = words + (process / "environ").read_bytes()
                if words and any(mark in said for mark in marks):
                    found[int(process.name)] = words.decode(errors="replace").split("\0")
        return found

    def process(self, role: str) -> int:
        """pid of `rank`, else of what would have started it: `torchrun`, `PID 1`."""
        processes = self.processes()
        torchrun = [pid for pid, words in processes.items() if "--torchrun" in words]
        roles = {
            "rank": [pid for pid in processes if torchrun and _parent(pid) == torchrun[0]],
            "torchrun": torchrun,
            "PID 1": [pid for pid, words in processes.items() if words[-2].endswith("config.json")],
        }
        order = list(roles)
        return next((roles[name][0] for name in order[order.index(role) :] if roles[name]), 0)

    def kill(self, role: str, signum: int = signal.SIGKILL) -> int:
        pid = poll(lambda: self.process(role) or -self.completed(), f"a process to signal ({role})")
        if pid < 0:  # the last stop may come when all have left: there is nothing to signal
            return pid
        with contextlib.suppress(ProcessLookupError):  # it has just ended: seen by what follows
            os.kill(pid, signum)
        return pid

    def end_everything(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


# --- moments ---------------------------------------------------------------------------------------------------------
Moment = Callable[[StoppedRun, int, random.Random], Callable[[], bool]]
"""Looked up when an attempt begins; the answer is asked again and again until the moment has come."""


def starting(run: StoppedRun, attempt: int, chance: random.Random) -> Callable[[], bool]:
    at = time.monotonic() + chance.uniform(0, START_S)
    return lambda: time.monotonic() >= at


def stepping(run: StoppedRun, attempt: int, chance: random.Random) -> Callable[[], bool]:
    steps = chance.randint(1, STEPS_AN_ATTEMPT - 1)
    return lambda: _steps(run, attempt) >= steps


def saving(run: StoppedRun, attempt: int, chance: random.Random) -> Callable[[], bool]:
    """A file of a checkpoint is being written."""
    before, held = _files(run, ".step-"), _held_back(run, attempt)
    return lambda: bool(_files(run, ".step-") - before) or held()


def committed(run: StoppedRun, attempt: int, chance: random.Random) -> Callable[[], bool]:
    before, held, count = _manifests(run), _held_back(run, attempt), chance.randint(1, 3)
    return lambda: len(_manifests(run) - before) >= count or held()


def two_to_choose_from(run: StoppedRun, attempt: int, chance: random.Random) -> Callable[[], bool]:
    return lambda: _steps(run, attempt) > 2 * EVERY_STEPS and len(run.store().manifests()) >= 2


def ending(run: StoppedRun, attempt: int, chance: random.Random) -> Callable[[], bool]:
    """The last step is done; the result is not written."""
    path = run.dir / "ending"
    return lambda: path.exists() and path.read_text() == str(attempt)


def finishing(run: StoppedRun, attempt: int, chance: random.Random) -> Callable[[], bool]:
    """The result is being written, or the processes are on their way out."""
    at_the_end, at = ending(run, attempt, chance), float("inf")

    def now() -> bool:
        nonlocal at
        if at_the_end() and at == float("inf"):
            (run.dir / "may_end").touch()
            at = time.monotonic() + chance.uniform(0, 2.5)  # torchrun takes about two seconds to leave
        return time.monotonic() >= at

    return now


def _steps(run: StoppedRun, attempt: int) -> int:
    """Steps an attempt has made, as far as the end of the file tells: asked hundreds of times a second."""
    path = run.dir / "said.txt"
    if not path.exists():
        return 0
    with path.open("rb") as said:
        said.seek(max(0, path.stat().st_size - 4096))
        return sum(1 for line in said.readlines() if line.startswith(b"%d " % attempt))


def _files(run: StoppedRun, prefix: str) -> set[str]:
    return {path.name for path in (run.dir / "checkpoints").glob(f"{prefix}*")}


def _manifests(run: StoppedRun) -> set[str]:
    return {name for name in _files(run, "step-") if name.endswith(".json")}


def _held_back(run: StoppedRun, attempt: int) -> Callable[[], bool]:
    """The attempt makes no step any more: whoever was too slow to see it save stops it here."""
    return lambda: _steps(run, attempt) >= STEPS_AN_ATTEMPT


# --- kinds -----------------------------------------------------------------------------------------------------------
NOTICE = frozenset({"preempted", "deadline_missed"})
"""`deadline_missed`, or `preempted` without a save: legal, and exact all the same, where the machine was too slow."""


@dataclass(frozen=True)
class Kind:
    deliver: Callable[[StoppedRun, random.Random], object]
    reasons: frozenset[str]  # what the sidecar may say of the attempt
    moments: Sequence[Moment] = (starting, stepping, saving, committed)
    resumed_by_hand: bool = False
    damage: bool = False


def notice(*signals: int) -> Kind:
    def deliver(run: StoppedRun, chance: random.Random) -> None:
        for number in signals:
            with contextlib.suppress(ProcessLookupError):  # the run has completed
                os.kill(run.agent(), number)
            time.sleep(chance.uniform(0, 0.1))  # before the second one: the random moment itself

    return Kind(deliver, NOTICE)


def killed(role: str) -> Kind:
    return Kind(lambda run, chance: run.kill(role), frozenset({"failure"}))


def kill_agent(run: StoppedRun, chance: random.Random) -> None:
    with contextlib.suppress(ProcessLookupError):  # the run has completed
        os.kill(run.agent(), signal.SIGKILL)


def preempt(run: StoppedRun, chance: random.Random) -> None:
    try:
        run.orch("preempt", run.dir.name)
    except AssertionError:
        if not run.completed():  # then it is refused, and rightly
            raise


def cancel(run: StoppedRun, chance: random.Random) -> None:
    run.orch("cancel", run.dir.name)


def pause(run: StoppedRun, chance: random.Random) -> None:
    """A rank that hangs while it is asked to stop; it goes on too late, or never."""
    rank = run.kill("rank", signal.SIGSTOP)
    os.kill(run.agent(), signal.SIGUSR1)
    late = time.monotonic() + LEAD_TIME_S + chance.uniform(-1, 3)
    if chance.random() < 0.5:
        poll(lambda: time.monotonic() >= late, "a paused rank's time to be over", timeout=DEADLINE_S)
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGCONT)


USR1, TERM = signal.SIGUSR1, signal.SIGTERM
KINDS: dict[str, Kind] = {
    "orch preempt": Kind(preempt, NOTICE),
    "USR1": notice(USR1),
    "TERM": notice(TERM),
    "USR1 then TERM": notice(USR1, TERM),
    "TERM then USR1": notice(TERM, USR1),
    "USR1 twice": notice(USR1, USR1),
    "TERM twice": notice(TERM, TERM),
    "rank killed": killed("rank"),
    "torchrun killed": killed("torchrun"),
    "PID 1 killed": killed("PID 1"),
    "agent killed": Kind(kill_agent, frozenset({"node_failure"}), resumed_by_hand=True),
    "cancelled": Kind(cancel, frozenset({"cancelled"}), resumed_by_hand=True),
    "rank paused": Kind(pause, NOTICE, moments=(stepping, saving)),
    "agent killed, checkpoint truncated": Kind(
        kill_agent, frozenset({"node_failure"}), (two_to_choose_from,), resumed_by_hand=True, damage=True
    ),
    "cancelled, checkpoint truncated": Kind(
        cancel, frozenset({"cancelled"}), (two_to_choose_from,), resumed_by_hand=True, damage=True
    ),
}
RARE = ("rank paused", "agent killed, checkpoint truncated", "cancelled, checkpoint truncated")  # they take their time
AT_LEAST = 3  # of each kind


@dataclass(frozen=True)
class Stop:
    kind: str
    moment: Moment


def plan(chance: random.Random) -> list[Stop]:
    """Every kind `AT_LEAST` times (as far as they fit), the others by chance; in random order, the last at the end."""
    frequent = [name for name in KINDS if name not in RARE]
    names = (AT_LEAST * [*frequent, *RARE])[:STOPS]
    names += chance.choices(frequent, k=STOPS - len(names))
    chance.shuffle(names)
    at_the_end = min(AT_THE_END, STOPS // 10)
    movable = [name for name in names if name in frequent][-at_the_end:] if at_the_end else []
    for name in movable:
        names.remove(name)
    stops = [Stop(name, chance.choice(KINDS[name].moments)) for name in names]
    stops += [Stop(name, ending) for name in movable[:-1]]
    return stops + [Stop(name, finishing) for name in movable[-1:]]


class Patience:
    """The deadline of what comes after many steps: anew for each, because how long all take depends on the machine."""

    def __init__(self, run: StoppedRun) -> None:
        self.run, self.made, self.until = run, -1, 0.0

    def require(self, what: str) -> None:
        made, now = self.run.made(), time.monotonic()
        if made != self.made:
            self.made, self.until = made, now + DEADLINE_S
        assert now < self.until, f"no step for {DEADLINE_S:g} s, still waiting for {what}: {self.run.brief()}"


# --- the driver ------------------------------------------------------------------------------------------------------
@dataclass
class Driver:
    """Delivers one stop after the other and does what a person would where the run waits for one."""

    run: StoppedRun
    chance: random.Random
    told: list[str] = field(default_factory=list)  # for whoever reads a failure

    def deliver(self, stop: Stop) -> None:
        """Stop the newest attempt in the given way, see it end as it should, and let the run go on."""
        kind = KINDS[stop.kind]
        attempt = self._at(stop)
        if attempt is None:
            self.told.append(f"{stop.kind}, {stop.moment.__name__}: too late, the run had completed")
            return
        began = time.monotonic()
        self.told.append(f"attempt {attempt}: {stop.kind}, {stop.moment.__name__}")
        kind.deliver(self.run, self.chance)
        if kind.resumed_by_hand:
            self._gone()
        if stop.kind.startswith("agent killed"):
            self._resume(kind, attempt)
        self._ended(attempt, kind, stop)
        entry = self.run.attempt(attempt)
        self.told[-1] += (
            f" -> {entry['exit_reason']} {entry['outcome']}, steps {entry['step_start']}..{entry['step_end']},"
            f" {time.monotonic() - began:.1f} s"
        )

    def _at(self, stop: Stop) -> int | None:
        """The attempt to stop, once it has come to the moment; the next one where a late second notice ended it.

        None where the last stop was drawn for a moment at which its processes had already left.
        """
        while True:
            attempt = self._begun()
            come = stop.moment(self.run, attempt, self.chance)
            if self._comes(come, attempt, stop):
                return attempt
            if stop.moment is finishing and self.run.completed():
                return None
            assert self._was_signalled(attempt), f"attempt {attempt} ended by itself: {self.run.brief()}"

    def _comes(self, come: Callable[[], bool], attempt: int, stop: Stop) -> bool:
        """False when the attempt ended before."""
        patience, look = Patience(self.run), 0.0
        while not come():
            now = time.monotonic()
            if now >= look:
                look = now + 0.1
                patience.require(f"attempt {attempt} to come to {stop.moment.__name__}")
                if self.run.attempt(attempt)["ended"] is not None:
                    return False
            time.sleep(0.002)  # a save takes a few of these
        return True

    def _begun(self) -> int:
        """The newest attempt, once it runs."""

        def newest() -> dict[str, Any] | None:
            sidecar = self.run.sidecar()
            open_ones = [entry for entry in sidecar["attempts"] if entry["ended"] is None]
            assert sidecar["status"] in ("queued", "running", "preempted"), self.run.brief()
            return open_ones[-1] if open_ones else None

        return int(poll(newest, "the next attempt", timeout=DEADLINE_S)["attempt"])

    def _was_signalled(self, attempt: int) -> bool:
        return any(event["attempt"] == attempt for event in History(self.run.dir).events("signalled"))

    def _gone(self) -> None:
        """Nothing of the run is left: without its agent nothing may live on."""
        poll(lambda: not self.run.processes(), "all processes of the run to end", timeout=LEAD_TIME_S + 120)

    def _resume(self, kind: Kind, attempt: int) -> None:
        if kind.damage:
            self._damage(attempt + 1)
        verb = self.chance.choice(["submit", "resume"])
        cancelled = (self.run.dir / "cancelled").exists()
        answer = (
            self.run.orch("submit", str(self.run.spec))
            if verb == "submit" and not cancelled
            else self.run.orch("resume", self.run.dir.name)
        )
        assert answer["action"] in ("resumed", "already_completed"), answer

    def _damage(self, before_attempt: int) -> None:
        newest, fallback = self.run.store().manifests()[:2]
        os.truncate(newest.path, self.chance.randrange(newest.path.stat().st_size))
        self.run.damaged.append(Damage(newest.path.name, before_attempt, fallback.step))

    def _ended(self, attempt: int, kind: Kind, stop: Stop) -> None:
        """The attempt has ended for one of the reasons it may have; a run that waits for a person gets one."""
        entry = poll(lambda: self._end_of(attempt), f"attempt {attempt} to end", timeout=DEADLINE_S)
        allowed = set(kind.reasons)
        if self._was_signalled(attempt):
            allowed |= NOTICE
        if stop.moment is finishing:
            allowed |= {"completed"}
        assert entry["exit_reason"] in allowed, (stop, entry)
        state = self._next_state(attempt)
        if state["status"] == "failed":
            self._assert_crash_loop(state)
        if state["status"] in ("failed", "cancelled"):
            self._gone()
            self._resume(kind, attempt)
        else:
            assert state["status"] in ("running", "completed"), self.run.brief()

    def _end_of(self, attempt: int) -> dict[str, Any] | None:
        entry = self.run.attempt(attempt)
        return None if entry["ended"] is None else entry

    def _next_state(self, attempt: int) -> dict[str, Any]:
        """The sidecar once another attempt has begun, or none will."""

        def decided() -> dict[str, Any] | None:
            sidecar = self.run.sidecar()
            newer = sidecar["attempts"][-1]["attempt"] > attempt
            return sidecar if newer or sidecar["status"] not in ("running", "preempted") else None

        return poll(decided, f"what follows attempt {attempt}", timeout=DEADLINE_S)

    def _assert_crash_loop(self, sidecar: dict[str, Any]) -> None:
        """Three attempts in a row that failed without a new step: nothing else may end the run as failed."""
        assert sidecar["exit_reason"] == "no_progress", self.run.brief()
        last = sidecar["attempts"][-3:]
        assert [entry["exit_reason"] for entry in last] == 3 * ["failure"], last
        assert all((entry["step_end"] or 0) <= (entry["step_start"] or 0) for entry in last), last

    def finish(self) -> None:
        """Let the run complete."""
        (self.run.dir / "may_end").touch()
        patience = Patience(self.run)
        while not self.run.completed():
            patience.require("the run to complete")
            time.sleep(0.02)
        poll(lambda: not self.run.processes(), "all processes of the run to end", timeout=60)

    def story(self) -> str:
        counts = Counter(line.partition(": ")[2].partition(",")[0] for line in self.told)
        return "\n".join([*self.told, str(dict(counts))])

    def note(self, error: BaseException) -> str:
        """For the end of a failure, where a log that was cut short is still read: last stops, seed, reason."""
        last = [f"the last of {len(self.told)} stops:", *self.told[-5:]]
        return "\n".join([*last, f"ORCH_CHAOS_SEED={SEED} draws these stops again.", _reason(error)])


def _reason(error: BaseException) -> str:
    """What went wrong and where in this test, in a few words."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" in frame.filename]
    where = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:1000]} (in {where})"


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[StoppedRun]:
    run = StoppedRun(tmp_path, "untouched")
    try:
        for name in ("unbound", "may_end"):
            (run.dir / name).touch()
        yield run
    finally:
        run.end_everything()


def test_random_stops_leave_no_trace(untouched: StoppedRun, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    Driver(untouched, chance).finish()
    run = StoppedRun(tmp_path, "stopped")
    driver = Driver(run, chance)
    try:
        for stop in plan(chance):
            if stop.moment in (ending, finishing):
                (run.dir / "unbound").touch()
            driver.deliver(stop)
        (run.dir / "unbound").touch()
        driver.finish()
        assert_nobody_can_tell(untouched, run)
    except BaseException as error:
        error.add_note(driver.note(error))
        raise
    finally:
        print(driver.story())
        run.end_everything()


def assert_nobody_can_tell(untouched: StoppedRun, stopped: StoppedRun) -> None:
    for name in ("final.pt", "checkpoints/last.ckpt"):
        one, other = (torch.load(run.dir / name, weights_only=True) for run in (untouched, stopped))
        assert_same_tree(one, other, name)
    rows, others = ((run.dir / "metrics.csv").read_bytes().splitlines(True) for run in (untouched, stopped))
    different = next((pair for pair in itertools.zip_longest(rows, others) if pair[0] != pair[1]), None)
    assert different is None, f"the first row of metrics.csv that differs: {different}"
    history = History(stopped.dir)
    history.assert_attempts_are_complete()
    history.assert_nothing_committed_was_lost(stopped.damaged)
    history.assert_checkpoints_are_tidy(KEEP_LAST)
    said = stopped.said()
    assert_lines_never_mix(said, STEPS)
    assert_at_most_every_steps_lost(said, history, stopped.damaged)
    assert list((stopped.folder / "node").glob("*/*")) == []  # leashes, orders, secrets


class Told(History):
    """A run that saved at 7, 12 and 14 and was killed at 20; the attempt after that resumed nothing, the next at 12."""

    def __init__(self) -> None:
        self.attempts = [{}, {}, {}, {}]
        self._events = [{"event": "resumed", "attempt": 2, "step": 12}, {"event": "resumed", "attempt": 3, "step": 12}]


def test_a_truncated_checkpoint_excuses_the_first_attempt_that_resumes_and_no_other() -> None:
    said, damage = [(0, step) for step in range(1, 21)], Damage("step-14", before_attempt=1, fallback_step=12)
    assert_at_most_every_steps_lost(said, Told(), [damage])
    with pytest.raises(AssertionError):
        assert_at_most_every_steps_lost(said, Told(), [])
    with pytest.raises(AssertionError):
        assert_at_most_every_steps_lost([*said, *((2, step) for step in range(13, 21))], Told(), [damage])


def assert_at_most_every_steps_lost(said: list[tuple[int, int]], history: History, damaged: Sequence[Damage]) -> None:
    """A killed attempt costs at most the steps since its last save; only a truncated checkpoint costs more."""
    begins = {number: int(event["step"]) for number, event in history.resumed().items()}
    damages = {damage.before_attempt for damage in damaged}
    last, by_damage = 0, False
    for number in range(len(history.attempts)):
        by_damage = by_damage or number in damages
        if number in begins:  # else it was stopped too early to find the damage: the next one does
            assert by_damage or 0 <= last - begins[number] <= EVERY_STEPS, (number, last, begins[number])
            by_damage = False
        last = max([begins.get(number, last), *(step for attempt, step in said if attempt == number)])

"""Twenty random stops of random kinds on one run of the main job: it completes, bit-identical to the untouched run.

Every failure names the seed: `ORCH_CHAOS_SEED=… pytest …` draws the same stops again (at moments that no seed repeats
exactly). `ORCH_CHAOS_CLUSTER_STOPS` sets how many.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.handle import Cluster
from tests.cluster.orch import Orch
from tests.cluster.test_main_job import digits, main_job, workspace  # noqa: F401 (fixtures)
from tests.equality import assert_same_run
from tests.history import History

STOPS = int(os.environ.get("ORCH_CHAOS_CLUSTER_STOPS", "20"))
SEED = int(os.environ.get("ORCH_CHAOS_SEED") or secrets.randbits(32))
BATCH = 32
EPOCHS = 1 + (12 * STOPS) // 20  # of 20 steps each: more than the stops leave time for (held_back_pretrain.py)
START_S = 12.0  # what an attempt takes to its first step on an idle machine
DEADLINE_S = 180.0


@dataclass(frozen=True)
class Kind:
    deliver: Callable[[Driver], object]
    reasons: frozenset[str]  # what the sidecar may say of the attempt


def preempt(driver: Driver) -> None:
    driver.cluster.preempt(nodes=3, seconds=1)


def requeue(driver: Driver) -> None:
    driver.cluster.run("scontrol", "requeue", driver.job())


def drill(driver: Driver) -> None:
    driver.orch.json("preempt", driver.run)


def signal_step(name: str) -> Callable[[Driver], None]:
    def deliver(driver: Driver) -> None:
        driver.cluster.run("scancel", f"--signal={name}", f"{driver.job()}.0")

    return deliver


def kill_process(role: str) -> Callable[[Driver], None]:
    """Of one node, by chance."""

    def deliver(driver: Driver) -> None:
        found = driver.cluster.wait(f"a process to kill ({role})", lambda: driver.processes()[role], timeout=60)
        with contextlib.suppress(ProcessLookupError):
            os.kill(driver.chance.choice(found), signal.SIGKILL)

    return deliver


def kill_container(driver: Driver) -> None:
    found = driver.cluster.wait("a container", lambda: driver.cluster.containers("status=running"), timeout=60)
    driver.cluster.run("docker", "kill", driver.chance.choice(found), check=False)  # it may have ended meanwhile


def cancel(driver: Driver) -> None:
    driver.orch.json("cancel", driver.run)


NOTICE = frozenset({"preempted", "deadline_missed"})
FAILED = frozenset({"failure", "node_failure"})  # peers of whatever died complain about their connections
KINDS = {
    "preempted": Kind(preempt, NOTICE),
    # A save may outlast KillWait. Who is killed before the end is written down lost its node, for all we know.
    "requeued by an administrator": Kind(requeue, NOTICE | {"requeued_by_admin", "node_failure"}),
    "orch preempt": Kind(drill, NOTICE),
    "USR1 to the step": Kind(signal_step("USR1"), NOTICE),
    "TERM to the step": Kind(signal_step("TERM"), NOTICE),
    "agent killed": Kind(kill_process("agent"), FAILED),
    "rank killed": Kind(kill_process("rank"), FAILED),
    "PID 1 killed": Kind(kill_container, FAILED),
    # An attempt that is killed at the end of KillWait, too, is closed by the one that follows.
    "cancelled": Kind(cancel, frozenset({"cancelled", "node_failure", "preempted"})),
}
MOMENTS = ("starting", "stepping", "saving", "committed")
# Before the ranks have met, only torchrun's own time-out (two minutes) tells a node that the other's agent is dead.
NOT_AT_THE_START = ("agent killed",)


@dataclass
class Driver:
    orch: Orch
    cluster: Cluster
    run: str
    chance: random.Random
    told: list[str] = field(default_factory=list)

    @property
    def dir(self) -> Path:
        return self.orch.run_dir(self.run)

    def sidecar(self) -> dict[str, Any]:
        path = self.dir / "sidecar.json"
        sidecar: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"status": "", "attempts": []}
        return sidecar

    def job(self) -> str:
        return str(self.sidecar()["job_id"])

    def processes(self) -> dict[str, list[int]]:
        agents, ranks = [], []
        for pid in self.cluster.processes():
            process = Path(f"/proc/{pid}")
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if b"python" in words[0] and b"orchestrator.worker.agent" in words and str(self.dir).encode() in words:
                    agents.append(pid)
                elif self._is_rank(process) and not self._is_rank(_parent(process)):
                    ranks.append(pid)
        return {"agent": agents, "rank": ranks}

    def _is_rank(self, process: Path) -> bool:
        """A rank or one of its loader's workers."""
        try:
            environ = (process / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended, or none of ours
            return False
        return f"ORCH_RUN_DIR={self.dir}".encode() in environ and any(word.startswith(b"RANK=") for word in environ)

    def deliver(self, name: str, moment: str) -> None:
        kind = KINDS[name]
        attempt = self._at(moment)
        began = time.monotonic()
        self.told.append(f"attempt {attempt}: {name}, {moment} (step {self.orch.step(self.run)})")
        kind.deliver(self)
        if name == "cancelled":
            self._resume()
        entry = self.cluster.wait(f"attempt {attempt} to end", lambda: self._end_of(attempt), timeout=DEADLINE_S)
        self.told[-1] += (
            f" -> {entry['exit_reason']} {entry['outcome']}, steps {entry['step_start']}..{entry['step_end']},"
            f" {time.monotonic() - began:.1f} s"
        )
        assert entry["exit_reason"] in kind.reasons, entry
        if name != "cancelled":
            self._go_on(attempt)
        self.told[-1] += f" {time.monotonic() - began:.1f} s"

    def _at(self, moment: str) -> int:
        attempt = int(self.cluster.wait("the next attempt", self._open_attempt, timeout=DEADLINE_S)["attempt"])
        come = getattr(self, f"_{moment}")(attempt)
        until = time.monotonic() + DEADLINE_S
        while not come():
            assert self._end_of(attempt) is None, f"attempt {attempt} ended by itself:\n{self.orch.story(self.run)}"
            assert time.monotonic() < until, f"attempt {attempt} never came to {moment}"
            time.sleep(0.002)  # a save takes a few of these
        return attempt

    def _open_attempt(self) -> dict[str, Any] | None:
        return next((entry for entry in self.sidecar()["attempts"] if entry["ended"] is None), None)

    def _end_of(self, attempt: int) -> dict[str, Any] | None:
        return next((e for e in self.sidecar()["attempts"] if e["attempt"] == attempt and e["ended"]), None)

    # --- moments: looked up when the attempt begins, asked until they have come
    def _starting(self, attempt: int) -> Callable[[], bool]:
        at = time.monotonic() + self.chance.uniform(0, START_S)
        return lambda: time.monotonic() >= at

    def _stepping(self, attempt: int) -> Callable[[], bool]:
        at: list[float] = []

        def now() -> bool:
            if not at and self.orch.attempt(self.run) == attempt:
                at.append(time.monotonic() + self.chance.uniform(0, 2))
            return bool(at) and time.monotonic() >= at[0]

        return now

    def _saving(self, attempt: int) -> Callable[[], bool]:
        return self._new_file(".step-*")

    def _committed(self, attempt: int) -> Callable[[], bool]:
        return self._new_file("step-*.json")

    def _new_file(self, pattern: str) -> Callable[[], bool]:
        directory = self.dir / "checkpoints"

        def files() -> set[str]:
            return {path.name for path in directory.glob(pattern)}

        before = files()
        return lambda: bool(files() - before)

    # --- afterwards
    def _go_on(self, attempt: int) -> None:
        """Resume where the run waits for a person, which may now be for a crash loop only."""

        def decided() -> dict[str, Any] | None:
            sidecar = self.sidecar()
            newer = sidecar["attempts"][-1]["attempt"] > attempt
            return sidecar if newer or sidecar["status"] not in ("running", "preempted") else None

        sidecar = self.cluster.wait(f"what follows attempt {attempt}", decided, timeout=DEADLINE_S)
        if sidecar["status"] == "running":
            return
        assert (sidecar["status"], sidecar["exit_reason"]) == ("failed", "no_progress"), sidecar
        self._resume()

    def _resume(self) -> None:
        self.cluster.wait("the job to leave", lambda: not self.orch.status(self.run)["alive"], timeout=60, interval=1)
        assert self.orch.json("resume", self.run)["action"] == "resumed"

    def story(self) -> str:
        return "\n".join([f"ORCH_CHAOS_SEED={SEED} draws these stops again.", *self.told])


def _parent(process: Path) -> Path:
    return Path("/proc") / (process / "stat").read_text().rpartition(")")[2].split()[1]


def plan(chance: random.Random) -> list[tuple[str, str]]:
    """Every kind twice, the others by chance; in random order, each at a random moment."""
    names = (2 * list(KINDS))[:STOPS]
    names += chance.choices(list(KINDS), k=STOPS - len(names))
    chance.shuffle(names)
    return [(name, chance.choice(MOMENTS[1:] if name in NOT_AT_THE_START else MOMENTS)) for name in names]


def test_twenty_random_stops_leave_no_trace(
    orch: Orch,
    cluster: Cluster,
    digits: Path,  # noqa: F811
    workspace: Path,  # noqa: F811
) -> None:
    code = shutil.copytree(workspace, orch.directory / "code")
    shutil.copy(Path(__file__).with_name("held_back_pretrain.py"), code)
    spec = main_job(cluster, digits, code, nodes=2, nproc=1, runtime="docker", epochs=EPOCHS)
    small = {"batch_size": BATCH, "model_args": {"width": 4}, "method_args": {"hidden_dim": 32, "output_dim": 16}}
    spec["job"] = {"script": "code/held_back_pretrain.py", "args": spec["job"]["args"] | small}
    spec["checkpoint"] = {"every_steps": 5, "every_epochs": None}
    spec["retry"] = {"failure": 10 * STOPS, "node_failure": 10 * STOPS, "backoff": "1s"}
    chance = random.Random(SEED)
    driver = Driver(orch, cluster, orch.submit(spec)["run_id"], chance)
    run = driver.run
    try:
        for name, moment in plan(chance):
            driver.deliver(name, moment)
        (driver.dir / "unbound").touch()
        orch.wait_for_state(run, "completed", timeout=600)
        history = History(driver.dir)
        history.assert_attempts_are_complete()
        history.assert_nothing_committed_was_lost()
        history.assert_checkpoints_are_tidy(keep_last=3)
        assert cluster.containers() == []
        calm = Orch(cluster, orch.directory)
        calm.root = orch.directory / "calm"
        assert calm.submit(spec)["run_id"] == run
        (calm.run_dir(run) / "unbound").touch()
        calm.wait_for_state(run, "completed", timeout=600)
        assert_same_run(calm.run_dir(run), driver.dir)
    except BaseException as error:
        error.add_note(driver.story() + "\n" + orch.story(run))
        raise
    print(driver.story())

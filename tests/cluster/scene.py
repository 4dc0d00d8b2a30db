"""One run that is stopped in one way, followed to its end, and what is said of it in docs/preemption.md."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster import processes
from tests.cluster.handle import Cluster
from tests.cluster.orch import TERMINAL, Orch
from tests.cluster.programs import TRAIN, said, script_spec

EVERY_STEPS = 40  # of the programs
ALL_RUNTIMES = ("none", "docker", "podman")


@dataclass(frozen=True)
class Stop:
    """One way to be stopped: what happens, and what must come of it.

    `state` is what the stop leads to by itself; a run that does not come back by itself is resumed by hand afterwards,
    so that every row ends with a run that completes and a count of the steps it had to repeat.
    """

    name: str
    act: Callable[[Scene], None]
    reasons: tuple[str, ...]  # exit reason of each attempt up to the stop's end
    state: str = "completed"
    lost: int = 0  # steps at most
    words: str = ""  # of the status
    settings: tuple[str, ...] = ()  # of slurm.conf
    runtimes: tuple[str, ...] = ("none", "docker")
    program: str = TRAIN
    spec: Mapping[str, Any] = field(default_factory=dict)
    resume: tuple[str, ...] = ()  # options of `orch resume`
    begin_at: int = 5  # the step before which nothing happens; 0: the stop does not wait
    takeover: bool = False  # two attempts live at once for a while
    by_engine: bool = False  # the engine has a say in it: `make test` runs it on every runtime
    by_slurm: bool = False  # Slurm itself decides what comes of it: `make test` repeats it on the other release


class Scene:
    """A stop under way."""

    def __init__(self, stop: Stop, orch: Orch, runtime: str) -> None:
        self.stop = stop
        self.orch = orch
        self.cluster: Cluster = orch.cluster
        self.runtime = runtime
        self.run = ""
        self.started_at = 0.0
        self.step_at_stop = 0

    # --- what happens
    def submit(self) -> None:
        """Start the run and let it work."""
        container: dict[str, Any] = {"runtime": "none"}
        if self.runtime != "none":
            container = {"runtime": self.runtime, "image": self.cluster.image}
        changes = json.loads(json.dumps(self.stop.spec).replace("{directory}", str(self.orch.directory)))
        spec = script_spec(self.orch, self.stop.program, container=container, **changes)
        self.run = self.orch.submit(spec)["run_id"]
        if self.stop.begin_at:
            self.orch.wait_for_step(self.run, self.stop.begin_at)

    @property
    def directory(self) -> Path:
        return self.orch.run_dir(self.run)

    @property
    def job(self) -> str:
        return str(self.orch.status(self.run)["job_id"])

    def mark(self) -> None:
        """The clock of the row starts here: everything before was preparation."""
        self.started_at = time.monotonic()
        self.step_at_stop = self.orch.step(self.run)

    def wait_paused(self) -> None:
        """Until the program stands at the point that PAUSE_AT names."""
        self.cluster.wait("the program to pause", (self.directory / "paused").exists, timeout=90)

    def go(self) -> None:
        (self.directory / "go").touch()

    def notice(self, *names: str) -> None:
        """Signals to the agents, as a scheduler would send them; each is heard before the next one is sent.

        For a program that stands still (`PAUSE_AT`): one that works may end in between, and scancel would try again
        until it finds the next attempt.
        """
        step = f"{self.job}.0"
        for count, name in enumerate(names, 1):
            self.cluster.run("scancel", f"--signal={name}", step)
            self.wait_signalled(count)

    def wait_signalled(self, count: int = 1) -> None:
        """Until an agent has recorded a notice, or so many signals."""
        self.wait_event("signalled")
        self.cluster.wait(f"signal {count}", lambda: len(self.signals()) >= count, timeout=60)

    def signals(self) -> list[str]:
        """What the agents have recorded of them."""
        return [name for event in self.orch.events(self.run, "signalled") for name in event["signals"]]

    def wait_event(self, kind: str, *, timeout: float = 60) -> None:
        needle = f'"event": "{kind}"'
        self.cluster.wait(
            f"the event {kind}",
            lambda: any(needle in path.read_text() for path in (self.directory / "events").glob("*.jsonl")),
            timeout=timeout,
        )

    def agent(self) -> int:
        """pid of the run's only agent."""
        (pid,) = processes.agents(self.directory)
        return pid

    def kill_agent(self) -> None:
        os.kill(self.agent(), signal.SIGKILL)

    def kill_pid_1(self) -> None:
        if self.runtime == "docker":
            self.cluster.run("docker", "kill", *self.containers())
        else:
            (pid,) = processes.pythons(f"launch.py /dev/shm/orch-{os.getuid()}/{self.run}.")
            os.kill(pid, signal.SIGKILL)

    def ranks(self) -> list[int]:
        """pids of the training processes."""
        return processes.of_run(self.run, "train.py")

    def containers(self) -> list[str]:
        return self.cluster.containers(f"label=orch.run_id={self.run}")

    # --- what comes of it
    def settle(self) -> Any:
        """The status once the run works again in a new attempt, or has ended."""
        if self.stop.state == "completed" and len(self.stop.reasons) > 1:
            attempt = len(self.stop.reasons) - 1
            self.orch.wait_for_step(self.run, 1, attempt=attempt, timeout=300)
            return self.orch.status(self.run)
        return self.orch.wait_for_state(self.run, self.stop.state, timeout=300)

    def finish(self) -> None:
        """Let the newest attempt work a little, then end the run and see that nothing is left of it."""
        (self.directory / "go").touch()
        if self.orch.status(self.run)["state"] not in TERMINAL:
            attempt = self.orch.attempt(self.run)
            self.orch.wait_for_step(self.run, self.orch.step(self.run) + 3, attempt=max(attempt, 0))
        (self.directory / "enough").touch()
        self.orch.wait_for_state(self.run, "completed", timeout=120)
        self.cluster.wait("its processes to end", lambda: processes.of_run(self.run) == [], timeout=60)
        if self.runtime == "docker":
            assert self.containers() == []

    def steps_lost(self) -> int:
        """Steps made more than once, over all attempts."""
        lines = [(int(attempt), int(step)) for attempt, step, _ in said(self.orch, self.run)]
        lost, newest, end = 0, 0, 0
        for attempt, step in lines:
            if attempt > newest:
                end = self.step_at_stop if self.stop.takeover else end
                lost += max(0, end - step + 1)
                newest = attempt
            if attempt == newest:
                end = step
        return lost

    def first_step(self, attempt: int) -> int:
        """The first step that this attempt made."""
        return next(int(step) for number, step, _ in said(self.orch, self.run) if int(number) == attempt)

    def assert_no_step_was_skipped(self) -> None:
        made = {int(step) for _, step, _ in said(self.orch, self.run)}
        assert made == set(range(1, len(made) + 1))

    def assert_attempts_never_mixed(self) -> None:
        numbers = [int(number) for number, _, _ in said(self.orch, self.run)]
        assert numbers == sorted(numbers)


def record(scene: Scene, *, seconds: float, state: str, resumed: Any, lost: int) -> None:
    """Append the row to the file that $ORCH_STOPS names, from which `make stop-table` makes the page."""
    target = os.environ.get("ORCH_STOPS")
    if not target:
        return
    row = {
        "slurm": scene.cluster.slurm_version,
        "stop": scene.stop.name,
        "runtime": scene.runtime,
        "state": state,
        "reasons": [attempt["exit_reason"] for attempt in scene.orch.attempts(scene.run)],
        "lost": lost,
        "resumed_from": None if resumed is None else resumed["step"],
        "seconds": round(seconds, 1),
    }
    with Path(target).open("a") as table:
        table.write(json.dumps(row) + "\n")

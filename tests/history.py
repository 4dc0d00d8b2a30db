"""What must hold of any run's history, however often and however it was stopped: read from its own files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import PosixStore
from orchestrator.paths import RunPaths
from orchestrator.registry import read_events


@dataclass(frozen=True)
class Damage:
    """A checkpoint that a test has damaged between two attempts."""

    name: str
    before_attempt: int
    fallback_step: int  # of the next good one


class History:
    """The attempts of a run that has ended; the methods assert."""

    def __init__(self, run_dir: Path) -> None:
        self.paths = RunPaths(run_dir)
        self.sidecar: dict[str, Any] = json.loads(self.paths.sidecar.read_text())
        self.attempts: list[dict[str, Any]] = self.sidecar["attempts"]
        self._events = read_events(self.paths)

    def events(self, kind: str) -> Iterator[dict[str, Any]]:
        return (event for event in self._events if event["event"] == kind)

    def resumed(self) -> dict[int, dict[str, Any]]:
        """The `resumed` event of each attempt that found a checkpoint."""
        found = [(int(event["attempt"]), event) for event in self.events("resumed")]
        assert len(found) == len(dict(found)), "an attempt resumed twice"
        return dict(found)

    def assert_attempts_are_complete(self) -> None:
        """Numbered without a gap, each with an end and a reason, none begun twice, the last one completed."""
        assert [entry["attempt"] for entry in self.attempts] == list(range(len(self.attempts)))
        unfinished = [entry for entry in self.attempts if entry["ended"] is None or entry["exit_reason"] is None]
        assert unfinished == []
        began = sorted(int(event["attempt"]) for event in self.events("attempt_started"))
        assert began == list(range(len(self.attempts)))
        reasons = [entry["exit_reason"] for entry in self.attempts]
        assert (self.sidecar["status"], reasons[-1]) == ("completed", "completed")
        for before, after in itertools.pairwise(self.attempts):
            assert before["ended"] is not None
            assert before["started"] <= after["started"]

    def assert_nothing_committed_was_lost(self, damaged: Sequence[Damage] = ()) -> None:
        """Every attempt resumed from the newest commit of all before it; after a stop that saved, from that very step.

        What was damaged in between must have been set aside, and the run gone on from the one before.
        """
        floors = {damage.before_attempt: damage.fallback_step for damage in damaged}
        named = {damage.name for damage in damaged}
        resumed, newest, damaged_now = self.resumed(), -1, False
        for number in range(len(self.attempts)):
            newest, damaged_now = floors.get(number, newest), damaged_now or number in floors
            event = resumed.get(number)
            if event is not None:
                assert {Path(skip["path"]).name for skip in event["skipped"]} <= named, event
                # "At least": a kill between a commit and its event leaves a commit that nobody told of.
                assert event["step"] >= newest, f"attempt {number} lost commits up to {newest}: {event}"
                assert event["step"] == newest or not damaged_now, (number, event)
                newest, damaged_now = int(event["step"]), False
            newest = max([newest, *self._committed(number)])
            verdict = self._verdict(number)
            if verdict is not None and verdict["outcome"] == "saved":
                assert newest == verdict["step"], (newest, verdict)
        missing = [name for name in named if not (self.paths.checkpoints / f"{name}.corrupt").exists()]
        assert missing == [], "damaged checkpoints that nobody has set aside"

    def _committed(self, attempt: int) -> list[int]:
        return [int(event["step"]) for event in self.events("checkpoint_committed") if event["attempt"] == attempt]

    def _verdict(self, attempt: int) -> dict[str, Any] | None:
        path = self.paths.verdict(attempt)
        verdict: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return verdict

    def assert_checkpoints_are_tidy(self, keep_last: int) -> None:
        """At least two and at most `keep_last` checkpoints are left, and nothing half written by a dead attempt."""
        store = PosixStore(self.paths.checkpoints)
        found = store.find()
        assert found is not None
        assert found.skipped == ()
        assert 2 <= len(store.manifests()) <= keep_last
        names = [path.name for path in self.paths.checkpoints.iterdir()]
        assert [name for name in names if name.endswith(".tmp")] == []
        assert (self.paths.checkpoints / "last.ckpt").resolve() == found.path


def assert_lines_never_mix(said: list[tuple[int, int]], steps: int) -> None:
    """`said`: (attempt, step) in the order written. Attempts follow each other, each goes forward step by step, and all
    of them together made every step."""
    assert [attempt for attempt, _ in said] == sorted(attempt for attempt, _ in said)
    for (attempt, step), (next_attempt, next_step) in itertools.pairwise(said):
        assert next_attempt != attempt or next_step == step + 1, (attempt, step, next_step)
        assert next_step <= step + 1, f"attempt {next_attempt} left out steps after {step}"
    assert said[0][1] == 1
    assert said[-1][1] == steps

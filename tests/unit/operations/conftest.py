"""A small workspace with a spec, a fake backend, and a state directory of the test's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrator import operations
from orchestrator.backends.base import SchedulerState
from orchestrator.operations.results import RunStatus, Submitted
from orchestrator.paths import RunPaths
from tests.fakes.backend import FakeAgent, FakeBackend

SPEC = """\
name: job
backend: slurm
root: {root}
job: {{script: train.py, args: {{lr: 0.1}}}}
container: {{runtime: none}}
secrets: [TOKEN]
"""


@dataclass
class World:
    """One user with one spec and one scheduler."""

    folder: Path
    spec: Path
    root: Path
    backend: FakeBackend = field(default_factory=FakeBackend)
    environ: dict[str, str] = field(default_factory=dict)

    def submit(self, spec: Any = None, **options: Any) -> Submitted:
        given = self.spec if spec is None else spec
        return operations.submit(given, environ=self.environ, open_backend=self.backend.open, **options)

    def status(self, run: str) -> RunStatus:
        return operations.status(str(self.root / "runs" / run), open_backend=self.backend.open)

    def resume(self, run: str, **options: Any) -> Submitted:
        place = str(self.root / "runs" / run)
        options.setdefault("environ", self.environ)
        return operations.resume(place, open_backend=self.backend.open, **options)

    def cancel(self, run: str) -> Any:
        return operations.cancel(str(self.root / "runs" / run), open_backend=self.backend.open)

    def paths(self, run: str) -> RunPaths:
        return RunPaths(self.root / "runs" / run)

    def running(self, **environ: str) -> tuple[str, FakeAgent]:
        """Submit and let the job start."""
        done = self.submit()
        assert done.job_id is not None
        self.backend.set(done.job_id, SchedulerState.RUNNING)
        agent = FakeAgent(self.paths(done.run_id))
        agent.begin(0, job_id=done.job_id)
        return done.run_id, agent

    def ended(self, status: str, reason: str, **fields: Any) -> str:
        """A run whose only attempt has ended as told."""
        run, agent = self.running()
        agent.end(status, reason, **fields)
        self.backend.set("101", SchedulerState.ENDED, "COMPLETED")
        return run


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "train.py").write_text("print('hello')\n")
    root = tmp_path / "root"
    (folder / "spec.yaml").write_text(SPEC.format(root=root))
    state = str(tmp_path / "state")
    monkeypatch.setenv("ORCH_STATE_DIR", state)
    monkeypatch.setenv("ORCH_SITE_CONFIG", "")
    environ: Mapping[str, str] = {"ORCH_STATE_DIR": state, "HOME": str(tmp_path), "TOKEN": "s3cret-value"}
    return World(folder, folder / "spec.yaml", root, environ=dict(environ))


def owned_by_another(theirs: Path, patch: pytest.MonkeyPatch) -> None:
    """Let a file look as if another user had written it."""
    real = os.stat

    def stat(path: object, **options: bool) -> os.stat_result:
        found = real(path, **options)  # type: ignore[call-overload]
        if path != theirs:
            return found
        fields = list(found)
        fields[4] += 1  # st_uid
        return os.stat_result(fields)

    patch.setattr(os, "stat", stat)

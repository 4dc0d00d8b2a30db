"""`orch` as a user of the test cluster calls it: real commands, real files, deadlines everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cluster.handle import Cluster
from tests.cluster.service import ClusterError

REPOSITORY = Path(__file__).resolve().parents[2]
TERMINAL = ("completed", "failed", "cancelled", "lost", "needs_resume")


class Orch:
    """The command line against one cluster and one root."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory
        self.root = directory / "orch"

    def call(
        self, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """One command; the caller looks at its exit code."""
        state = {"XDG_STATE_HOME": str(self.directory / "state"), "XDG_CONFIG_HOME": str(self.directory / "config")}
        argv = [sys.executable, "-m", "orchestrator", *arguments]
        return self.cluster.run(*argv, env={**state, **(env or {})}, cwd=self.directory, timeout=timeout, check=False)

    def json(self, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 120) -> Any:
        """The document of a command that must succeed."""
        done = self.call(*arguments, "--json", env=env, timeout=timeout)
        assert done.returncode == 0, f"orch {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}"
        return json.loads(done.stdout)

    def write_spec(self, spec: Mapping[str, Any], name: str = "spec.yaml") -> Path:
        """JSON is YAML (without its surrogate pairs), and it carries every hostile string unharmed."""
        path = self.directory / name
        path.write_text(json.dumps({"root": str(self.root), **spec}, ensure_ascii=False))
        return path

    def submit(self, spec: Mapping[str, Any], *options: str, env: Mapping[str, str] | None = None) -> Any:
        """Write the spec and submit it."""
        return self.json("submit", str(self.write_spec(spec)), *options, env=env)

    def status(self, run: str) -> Any:
        """`orch status --json`."""
        return self.json("status", run, "--root", str(self.root))

    def run_dir(self, run: str) -> Path:
        return self.root / "runs" / run

    def step(self, run: str) -> int:
        """Steps done, from the file rank 0 writes; cheaper than asking the scheduler."""
        try:
            return int(json.loads((self.run_dir(run) / "progress.json").read_text())["step"])
        except FileNotFoundError:
            return 0

    def attempt(self, run: str) -> int:
        """Number of the attempt that last reported a step; -1 before the first."""
        try:
            return int(json.loads((self.run_dir(run) / "progress.json").read_text())["attempt"])
        except FileNotFoundError:
            return -1

    def wait_for_step(self, run: str, step: int, *, attempt: int = 0, timeout: float = 400) -> None:
        """Until that attempt has made that step; fails at once when the run has ended before."""

        def reached() -> bool:
            if self.attempt(run) >= attempt and self.step(run) >= step:
                return True
            path = self.run_dir(run) / "sidecar.json"
            sidecar = json.loads(path.read_text()) if path.exists() else {"status": "queued", "attempts": []}
            if len(sidecar["attempts"]) > attempt:  # else it still tells of the submission before
                ended = sidecar["status"] in TERMINAL
                assert not ended, f"{run} is {sidecar['status']} before step {step}:\n{self.story(run)}"
            return False

        try:
            self.cluster.wait(f"step {step} of attempt {attempt} of {run}", reached, timeout=timeout)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self.story(run)}\n{self.cluster.story()}") from None

    def wait_for_state(self, run: str, *states: str, timeout: float = 300) -> Any:
        """The status once the run is in one of `states`."""

        def there() -> Any:
            status = self.status(run)
            if status["state"] in states:
                return status
            assert status["state"] not in TERMINAL, f"{run} is {status['state']}:\n{self.story(run)}"
            return None

        return self.cluster.wait(f"{run} to be {'/'.join(states)}", there, timeout=timeout, interval=1.0)

    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        """All events of one kind, oldest first."""
        return [event for event in self.status(run)["events"] if event["event"] == kind]

    def attempts(self, run: str) -> list[dict[str, Any]]:
        """The sidecar's records of the attempts; none before the first."""
        path = self.run_dir(run) / "sidecar.json"
        records: list[dict[str, Any]] = json.loads(path.read_text())["attempts"] if path.exists() else []
        return records

    def story(self, run: str) -> str:
        """Everything a person would look at when a test fails."""
        directory = self.run_dir(run)
        files = [*directory.glob("*.json"), *directory.glob("events/*"), *directory.glob("logs/**/*.log")]
        return "\n".join(f"--- {path.relative_to(directory)}\n{path.read_text()[-3000:]}" for path in sorted(files))

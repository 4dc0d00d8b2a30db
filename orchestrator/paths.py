"""The only place that knows a file name under an orch root or inside a run directory (PROTOCOLS 2)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

DEFAULT_ROOT = "orch_runs"
"""The root where none is named, below the directory of the spec (or the current one)."""


def parse_url(text: str) -> SplitResult | None:
    """The parts of `scheme://…`; None for a path (pure). Raises ValueError for a malformed URL."""
    return urlsplit(text) if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) else None


def is_object_store(uri: str | None) -> bool:
    """Whether `checkpoint.uri` names an object store, not a directory; None is the run directory (pure)."""
    url = parse_url(uri or "")
    return url is not None and url.scheme != "file"


def url_fault(text: str) -> str | None:
    """What is wrong with a text that looks like a URL and is none, such as `s3:/bucket/p`; as a path, it would become
    a directory that nobody asked for (pure)."""
    start = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text)
    if start is None:
        return None
    scheme, rest = start.group().lower(), text[start.end() :].lstrip("/")
    if "::" in text:
        last = text.rpartition("::")[2]
        right = last if "://" in last and "@" not in last else "s3://bucket/prefix"
        return f"a chain of file systems (`::`) is not supported; write {right}"
    if parse_url(text) is not None:
        return None
    right = f"{scheme}{'///' if scheme == 'file:' else '//'}{rest if rest and '@' not in rest else 'bucket/prefix'}"
    return f"looks like a URL, but is none; write {right} (for a directory with a colon, ./ before its name)"


@dataclass(frozen=True)
class RootPaths:
    """Layout of an orch root, shared by all runs."""

    root: Path

    @property
    def code(self) -> Path:
        return self.root / "code"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def sweeps(self) -> Path:
        return self.root / "sweeps"

    @property
    def caches(self) -> Path:
        """Where downloads of programs go, unless the spec or the site profile names another place."""
        return self.root / "caches"

    @property
    def images(self) -> Path:
        """Imported image files. No container sees them: one could exchange what the next run starts from."""
        return self.root / "images"

    def snapshot(self, code_hash: str) -> Path:
        return self.code / code_hash

    def run(self, run_id: str) -> RunPaths:
        return RunPaths(self.runs / run_id)


@dataclass(frozen=True)
class RunPaths:
    """Layout of one run directory. Each file has one owner; see PROTOCOLS 2."""

    run_dir: Path

    @property
    def root(self) -> RootPaths:
        return RootPaths(self.run_dir.parents[1])

    # --- written by `orch submit`
    @property
    def spec(self) -> Path:
        return self.run_dir / "spec.yaml"

    @property
    def plan_dir(self) -> Path:
        return self.run_dir / "plan"

    @property
    def script(self) -> Path:
        """The exact bytes given to sbatch (Slurm)."""
        return self.plan_dir / "submit.sbatch"

    @property
    def agent_plan(self) -> Path:
        """What the agent on each node reads: program, container, torchrun, caps (JSON, no secrets)."""
        return self.plan_dir / "agent.json"

    @property
    def submit_lock(self) -> Path:
        return self.run_dir / ".submit.lock"

    @property
    def secrets(self) -> Path:
        return self.run_dir / "secrets.json"

    # --- owner: the agent of node 0
    @property
    def sidecar(self) -> Path:
        return self.run_dir / "sidecar.json"

    @property
    def local_agent(self) -> Path:
        """pid and start time of a local run's agent."""
        return self.run_dir / "local-agent.json"

    def notified(self, job_id: str, state: str) -> Path:
        """Created exclusively by whoever tells that this submission has ended so: nobody else tells it again."""
        return self.run_dir / f"notified-{job_id}-{state}"

    # --- owner: people
    @property
    def labels(self) -> Path:
        return self.run_dir / "labels.json"

    @property
    def tombstone(self) -> Path:
        return self.run_dir / "cancelled"

    # --- owner: `orch preempt --verify`
    @property
    def drills(self) -> Path:
        return self.run_dir / "drills"

    def drill(self, attempt: int) -> Path:
        """Certificate of the drill that stopped this attempt."""
        return self.drills / f"drill-{attempt:03d}.json"

    def certificates(self) -> list[Path]:
        """Of all drills, oldest first."""
        return sorted(self.drills.glob("drill-*.json"))

    # --- owner: rank 0
    @property
    def progress(self) -> Path:
        return self.run_dir / "progress.json"

    @property
    def heartbeat(self) -> Path:
        return self.run_dir / "heartbeat"

    @property
    def metrics(self) -> Path:
        return self.run_dir / "metrics.csv"

    @property
    def environment(self) -> Path:
        return self.run_dir / "environment.json"

    @property
    def train_log(self) -> Path:
        return self.run_dir / "train.log"

    def verdict(self, attempt: int, rank: int | None = None) -> Path:
        """Rank 0's verdict of an attempt, or a failing rank's own."""
        suffix = "" if rank is None else f".rank{rank}"
        return self.run_dir / f"verdict-{attempt:03d}{suffix}.json"

    def node_verdict(self, attempt: int, node: int) -> Path:
        """A failing node's record, written by its agent: peers stop waiting for it."""
        return self.run_dir / f"verdict-{attempt:03d}.node{node}.json"

    def rank_verdicts(self, attempt: int) -> list[Path]:
        """Verdicts of failing ranks, in rank order."""
        return sorted(self.run_dir.glob(f"verdict-{attempt:03d}.rank*.json"))

    def node_verdicts(self, attempt: int) -> list[Path]:
        """Records of failing nodes, in node order."""
        return sorted(self.run_dir.glob(f"verdict-{attempt:03d}.node*.json"))

    # --- one file per writer
    @property
    def events_dir(self) -> Path:
        return self.run_dir / "events"

    def events(self, writer: str) -> Path:
        return self.events_dir / f"{writer}.jsonl"

    def logs(self, attempt: int) -> Path:
        return self.run_dir / "logs" / f"attempt-{attempt:03d}"

    def node_log(self, attempt: int, node: int) -> Path:
        return self.logs(attempt) / f"node-{node}.log"

    def rank_log(self, attempt: int, rank: int) -> Path:
        return self.logs(attempt) / f"rank-{rank}.log"

    @property
    def scheduler_log(self) -> Path:
        """Output of the batch script itself."""
        return self.run_dir / "logs" / "batch.log"

    @property
    def checkpoints(self) -> Path:
        """Default of `checkpoint.uri`."""
        return self.run_dir / "checkpoints"

    @property
    def exported_model(self) -> Path:
        """What a finished `jobs.pretrain` leaves for others."""
        return self.run_dir / "exported_models" / "exported_last.pt"

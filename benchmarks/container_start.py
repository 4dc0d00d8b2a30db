"""From `srun` to the first line of user code in a container: ours, and `srun docker run` of the same torchrun command.

    python benchmarks/container_start.py [--json] [--rounds 7] [--engine docker|podman]

Both run in the test cluster (real Slurm, real engine; root on Debian or Ubuntu), in the same image, and take turns.
Ours does more on the way: it starts an agent, looks for leftovers, checks the image, writes the orders of PID 1 and
starts that first.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests.cluster

from tests.cluster.handle import Cluster
from tests.cluster.orch import Orch
from tests.cluster.requirements import why_not

TARGET = 1.3
PROGRAM = """\
import time
now = time.time()
import os
with open(os.environ["FIRST_LINE"] + ".new", "w") as file:
    file.write(repr(now))
os.rename(os.environ["FIRST_LINE"] + ".new", os.environ["FIRST_LINE"])
"""
# In front of srun on PATH, for both alike; only the first call of a job counts (ours makes one).
SRUN = """\
#!/bin/sh
[ -e "$SRUN_AT" ] || date +%s.%N >"$SRUN_AT"
exec {srun} "$@"
"""


class Bench:
    """One cluster and one directory; every start is a job of its own."""

    def __init__(self, cluster: Cluster, directory: Path, engine: str) -> None:
        self.cluster, self.directory, self.engine = cluster, directory, engine
        self.orch = Orch(cluster, directory)
        self.code = directory / "code"
        self.code.mkdir()
        (self.code / "train.py").write_text(PROGRAM)
        self.programs = directory / "bin"
        self.programs.mkdir()
        srun = shutil.which("srun", path=cluster.env["PATH"])
        (self.programs / "srun").write_text(SRUN.format(srun=srun))
        (self.programs / "srun").chmod(0o755)

    def places(self, name: str) -> tuple[Path, Path]:
        """Where the two moments of a start are written."""
        folder = self.directory / name
        folder.mkdir()
        return folder / "srun", folder / "first-line"

    def seconds(self, job: str, started: Path, first: Path) -> float:
        """Between the two, once the job has left them."""
        self.cluster.wait("the first line of user code", first.exists, timeout=120, interval=0.1)
        self.cluster.wait_end(job)
        return float(first.read_text()) - float(started.read_text())

    def ours(self, number: int) -> float:
        started, first = self.places(f"ours-{number}")
        spec = {
            "name": "start",
            "backend": "slurm",
            "job": {"script": "code/train.py"},
            "workspace": {"path": "code"},
            "resources": {"mem": "2G", "cpus_per_task": 2, "time": "00:10:00"},
            "slurm": {"setup": [f"export PATH={self.programs}:$PATH SRUN_AT={started}"], "partition": "low"},
            "torchrun": {"nproc_per_node": 1},
            "container": {
                "runtime": self.engine,
                "image": self.cluster.image,
                "mounts": [{"source": str(first.parent), "target": str(first.parent)}],
            },
            "env": {"FIRST_LINE": str(first)},
        }
        run = self.orch.submit(spec)["run_id"]
        return self.seconds(str(self.orch.status(run)["job_id"]), started, first)

    def by_hand(self, number: int) -> float:
        started, first = self.places(f"by-hand-{number}")
        mounts = [f"--volume={path}:{path}" for path in (self.code, first.parent)]
        torchrun = ["python3", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        limits = ["--memory=2g", "--cpus=2", f"--env=FIRST_LINE={first}", "--env=OMP_NUM_THREADS=2"]
        user = f"--user={os.getuid()}:{os.getgid()}"  # else the image's own, who may not write here
        container = ["srun", self.engine, "run", "--rm", user, *limits, *mounts, str(self.cluster.image)]
        command = [*container, *torchrun, str(self.code / "train.py")]
        job = self.cluster.sbatch(
            "--partition=low", "--mem=2G", "--cpus-per-task=2", "--time=10",
            wrap=f"export PATH={self.programs}:$PATH SRUN_AT={started}; {shlex.join(command)}",
        )  # fmt: skip
        return self.seconds(job, started, first)


def measure(engine: str, rounds: int) -> dict[str, list[float]]:
    """Seconds per way, after one start of each that nobody counts."""
    seconds: dict[str, list[float]] = {"orch": [], f"srun {engine} run": []}
    cluster = Cluster.start()
    try:
        with tempfile.TemporaryDirectory(prefix="orch-bench-") as name:
            bench = Bench(cluster, Path(name), engine)
            for number in range(rounds + 1):
                for values, start in zip(seconds.values(), (bench.ours, bench.by_hand), strict=True):
                    values.append(start(number))
    finally:
        cluster.end()
    return {name: values[1:] for name, values in seconds.items()}


def main(argv: list[str]) -> int:
    """Print a table, or with --json one object of figures; exit code 1 when a figure misses its target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--engine", choices=("docker", "podman"), default="docker")
    options = parser.parse_args(argv)
    if reason := why_not():
        sys.exit(reason)
    seconds = measure(options.engine, options.rounds)
    ours, theirs = (statistics.median(values) for values in seconds.values())
    ratio = round(ours / theirs, 3)
    figures: dict[str, dict[str, Any]] = {
        f"{options.engine}_start_over_srun_{options.engine}_run": {
            "value": ratio,
            "target": TARGET,
            "ok": ratio <= TARGET,
        }
    }
    if options.json:
        print(json.dumps(figures))
    else:
        print(f"{'':<20} {'median':>9} {'fastest':>9} {'slowest':>9}")
        for name, values in seconds.items():
            print(f"{name:<20} {statistics.median(values):>7.2f} s {min(values):>7.2f} s {max(values):>7.2f} s")
        for name, entry in figures.items():
            print(f"\n{name}: {entry['value']} (≤ {entry['target']}): {'ok' if entry['ok'] else 'MISSED'}")
    return 0 if all(entry["ok"] for entry in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

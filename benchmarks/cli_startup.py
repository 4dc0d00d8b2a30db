"""What starting `orch` costs, as ratios to `python -c "import typer"` measured in the same run.

    python benchmarks/cli_startup.py [--json] [--rounds N]

The programs are run in turn, round after round, so that a busy moment of the machine hits all of them; figures are
medians of CPU time (user + system of the process and its children), wall time is shown beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = {"help": 1.5, "status_json": 2.5}

PROGRAM = """
import time
print("hello", flush=True)
"""

SPEC = """
name: startup
backend: local
job: {script: program.py}
"""


def measure(argv: list[str], environ: dict[str, str]) -> tuple[float, float]:
    """CPU and wall seconds of one run; raises if it fails."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(argv, env=environ, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def finished_run(folder: Path, environ: dict[str, str]) -> str:
    """Submit a run on this machine and wait for its end; returns its id."""
    (folder / "program.py").write_text(PROGRAM)
    (folder / "spec.yaml").write_text(SPEC)
    orch = [sys.executable, "-m", "orchestrator"]
    done = subprocess.run(
        [*orch, "submit", str(folder / "spec.yaml"), "--json"], env=environ, check=True, capture_output=True
    )
    run_id = str(json.loads(done.stdout)["run_id"])
    subprocess.run([*orch, "wait", run_id, "--timeout", "120"], env=environ, check=True, stdout=subprocess.DEVNULL)
    return run_id


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        environ = {**os.environ, "ORCH_STATE_DIR": f"{name}/state"}
        run_id = finished_run(Path(name), environ)
        programs = {
            "typer": [sys.executable, "-c", "import typer"],
            "help": [sys.executable, "-m", "orchestrator", "--help"],
            "status_json": [sys.executable, "-m", "orchestrator", "status", run_id, "--json"],
        }
        taken: dict[str, list[tuple[float, float]]] = {key: [] for key in programs}
        for _ in range(arguments.rounds + 1):
            for key, argv in programs.items():
                taken[key].append(measure(argv, environ))
    cpu = {
        key: statistics.median(value[0] for value in values[1:]) for key, values in taken.items()
    }  # first: cold files
    wall = {key: statistics.median(value[1] for value in values[1:]) for key, values in taken.items()}
    figures = {
        key: {"value": round(cpu[key] / cpu["typer"], 2), "target": target, "ok": cpu[key] / cpu["typer"] <= target}
        for key, target in TARGETS.items()
    }
    if arguments.json:
        print(json.dumps(figures))
    else:
        print(f"import typer: {1000 * cpu['typer']:.0f} ms CPU, {1000 * wall['typer']:.0f} ms wall")
        for key, figure in figures.items():
            print(
                f"{key}: {figure['value']}× (at most {figure['target']}×), {1000 * cpu[key]:.0f} ms CPU, "
                f"{wall[key] / wall['typer']:.2f}× wall"
            )
    return 0 if all(figure["ok"] for figure in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

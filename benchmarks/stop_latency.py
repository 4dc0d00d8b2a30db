"""How long a stop takes (PROTOCOLS 3.6): signal → verdict, and verdict → end of the attempt.

    python benchmarks/stop_latency.py [--json] [--runs N]

Each run is a real one on the local backend: torchrun, two ranks that agree on every step, a stop at a random moment.
Both figures are ratios to a budget of the same run: two of its steps plus its save plus 0.5 s; and 3 s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEP_S = 0.2
STATE_BYTES = 20_000_000
AFTER_VERDICT_S = 3.0
LONGEST_S = 180.0

PROGRAM = f"""
import json, time
import torch, torch.distributed as dist
from orchestrator.worker.session import Session

dist.init_process_group("gloo")
session = Session.start()
session.install_signal_handlers()
with session.guard():
    session.resume()
    for step in range(1, 10_000):
        time.sleep({STEP_S})
        flag = torch.tensor([int(session.stop_requested)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        session.report(step, 0, 10_000)
        if flag.item():
            if session.is_chief:
                session.commit(lambda out: out.write(bytes({STATE_BYTES})), step=step, epoch=0)
            dist.barrier()
            session.stopped(step=step, epoch=0)
"""


def orch(*arguments: str) -> Any:
    """One `orch` command as a user's script would call it."""
    done = subprocess.run([sys.executable, "-m", "orchestrator", *arguments, "--json"], capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def poll(question: Any, what: str) -> Any:
    """The first true answer; ends the benchmark when none comes."""
    until = time.monotonic() + LONGEST_S
    while time.monotonic() < until:
        answer = question()
        if answer:
            return answer
        time.sleep(0.05)
    sys.exit(f"{what}: not within {LONGEST_S:.0f} s")


def measure(root: Path, number: int) -> dict[str, float]:
    """One run, stopped once: seconds from signal to verdict, from verdict to the end, and of the save."""
    work = root / f"work-{number}"
    work.mkdir()
    (work / "train.py").write_text(PROGRAM)
    (work / "spec.yaml").write_text(
        f"name: stop-{number}\nbackend: local\nroot: {json.dumps(str(root / 'orch'))}\njob: {{script: train.py}}\n"
        "torchrun: {nproc_per_node: 2}\npreemption: {max_requeues: 0, lead_time: 60s}\n"
    )
    run = orch("submit", str(work / "spec.yaml"))["run_id"]
    poll(lambda: ((orch("status", run)["progress"] or {}).get("step") or 0) >= 3, "the third step")
    time.sleep(random.uniform(0, 2 * STEP_S))  # somewhere inside a step, not right after one
    sent = time.time()
    orch("preempt", run)
    orch("wait", run)
    status = orch("status", run)
    by_name = {event["event"]: event for event in status["events"]}
    verdict = json.loads((Path(status["run_dir"]) / "verdict-000.json").read_text())
    told = by_name["signalled"]["at"]
    if not sent <= told or verdict["outcome"] != "saved":
        sys.exit(f"run {run} did not stop as it should: {verdict}")
    return {
        "verdict": verdict["time"] - told,
        "end": by_name["finished"]["time"] - verdict["time"],
        "save": by_name["checkpoint_committed"]["seconds"],
    }


def main() -> int:
    """Print a table, or with --json one object of figures; exit code 1 when a figure misses its target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="orch-bench-") as directory:
        samples = [measure(Path(directory), number) for number in range(arguments.runs)]
    verdict = statistics.median(s["verdict"] / (2 * STEP_S + s["save"] + 0.5) for s in samples)
    end = statistics.median(s["end"] / AFTER_VERDICT_S for s in samples)
    figures = {
        "signal_to_verdict_over_budget": {"value": round(verdict, 3), "target": 1.0, "ok": verdict <= 1.0},
        "verdict_to_end_over_3s": {"value": round(end, 3), "target": 1.0, "ok": end <= 1.0},
    }
    if arguments.json:
        print(json.dumps(figures))
    else:
        print("run   signal→verdict   save      verdict→end")
        for number, sample in enumerate(samples):
            print(f"{number:<5} {sample['verdict']:.3f} s          {sample['save']:.3f} s   {sample['end']:.3f} s")
        for name, figure in figures.items():
            print(f"{name:<32} {figure['value']:<7} target ≤ {figure['target']}  {'ok' if figure['ok'] else 'MISSED'}")
    return 0 if all(figure["ok"] for figure in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

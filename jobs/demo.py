"""`python -m jobs.demo`: the main job on this machine, preempted once on purpose in the middle of an epoch.

It does what a person would do at a terminal, through the same `orch` commands, and prints what happened.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.data.digits import write_digits

EPOCHS = 4
BATCH_SIZE = 64
STOP_AT = 40  # 28 steps an epoch: in the middle of the second one
LONGEST_S = 900.0

SPEC = """\
name: demo
backend: local
root: {root}
job:
  module: jobs.pretrain
  args: {{data: {data}, method: simclr, model: orch/resnet9, epochs: {epochs}, batch_size: {batch}, seed: 0,
         num_workers: 1, log_every_n_steps: 1}}
resources: {{cpus_per_task: 1}}
checkpoint: {{every_steps: 50}}
preemption: {{lead_time: 60s}}
"""


def orch(arguments: Sequence[str], *, expect: Sequence[int] = (0,)) -> Any:
    """Run one `orch` command with --json and return its document; a failure ends the demo with orch's own words."""
    done = subprocess.run([sys.executable, "-m", "orchestrator", *arguments, "--json"], capture_output=True, text=True)
    if done.returncode not in expect:
        sys.exit(f"orch {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def wait_for_step(run: str, step: int) -> dict[str, Any]:
    """Poll `orch status` until the run has made `step` steps; show progress meanwhile."""
    until, shown = time.monotonic() + LONGEST_S, ""
    while time.monotonic() < until:
        status: dict[str, Any] = orch(["status", run])
        progress = status["progress"]
        at = (progress or {}).get("step") or 0
        total = (progress or {}).get("max_steps")
        now = f"   {status['state']}, " + (f"step {at} / {total}" if total else "starting")
        if sys.stdout.isatty() and now != shown:
            print(f"\r{now:<50}", end="", flush=True)
        shown = now
        if at >= step or status["state"] in ("completed", "failed", "lost", "needs_resume", "cancelled"):
            print(f"\r{now:<50}".rstrip() if sys.stdout.isatty() else now)
            return status
        time.sleep(0.3)
    sys.exit(f"the run did not reach step {step} within {LONGEST_S:.0f} s; see: orch logs {run}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo below `--root`; exit code 0 only if the run was stopped in mid-epoch, resumed and completed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("demo_runs"))
    arguments = parser.parse_args(argv)
    root = arguments.root.absolute()
    print(f"1. scikit-learn's scanned digits as PNG files: {write_digits(root / 'digits')} images in {root / 'digits'}")
    spec = root / "demo.yaml"
    spec.write_text(
        SPEC.format(root=json.dumps(str(root)), data=json.dumps(str(root / "digits")), epochs=EPOCHS, batch=BATCH_SIZE)
    )
    print(f"2. orch submit {spec}")
    submitted = orch(["submit", str(spec), "--new"])
    run = submitted["run_id"]
    print(f"   {run}  {submitted['action']}")
    before = wait_for_step(run, STOP_AT)
    print(f"3. orch preempt {run}          (the signal a cluster would send)")
    orch(["preempt", run])
    after = wait_for_step(run, 10**9)
    return report(after, before)


def report(status: dict[str, Any], before: dict[str, Any]) -> int:
    """Print what happened, from the run's own events; 0 if it is what the demo promises."""
    events = status["events"]
    saved = next((e for e in events if e["event"] == "verdict" and e.get("outcome") == "saved"), None)
    resumed = next((e for e in events if e["event"] == "resumed"), None)
    metrics = final_metrics(Path(status["run_dir"]) / "metrics.csv")
    print("\nWhat happened")
    print(f"  state              {status['state']} after {status['attempt'] + 1} attempts")
    print(f"  told to stop at    step {before['progress']['step']}")
    if saved is not None and resumed is not None:
        print(f"  saved at           step {saved['step']}, in mid-epoch")
        print(f"  resumed from       step {resumed['step']}: {saved['step'] - resumed['step']} steps lost")
        print(f"  checkpoint used    {resumed['checkpoint']}")
    print(f"  finished at        step {status['progress']['step']}")
    for name, value in metrics.items():
        print(f"  {name:<18} {float(value):.4g}")
    print(f"  run directory      {status['run_dir']}")
    print(f"\nLook around:  .venv/bin/orch status {status['run_id']}        .venv/bin/orch logs {status['run_id']}")
    ok = status["state"] == "completed" and saved is not None and resumed is not None
    ok = ok and saved["step"] == resumed["step"]
    if not ok:
        print("\nThis is not what the demo promises: please look at the run directory.", file=sys.stderr)
    return 0 if ok else 1


def final_metrics(path: Path) -> dict[str, str]:
    """The last value of each metric."""
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
    return {name: value for _, _, name, value in rows}


if __name__ == "__main__":
    sys.exit(main())

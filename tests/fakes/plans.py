"""Plans without a spec behind them."""

from __future__ import annotations

from pathlib import Path

from orchestrator.plan import Plan


def slurm_plan(
    run_dir: Path, *, token: str = "orch:run:1", script: str | None = None, secrets: list[str] | None = None
) -> Plan:
    """A plan whose script lies where `operations` would have written it."""
    text = script or f"#!/bin/bash\n#SBATCH --comment={token}\n#SBATCH --partition=low\ntrue\n"
    (run_dir / "plan").mkdir(parents=True)
    (run_dir / "plan" / "submit.sbatch").write_text(text)
    agent = {"attempt_base": 0, "secrets": secrets or []}
    return Plan(run_id=run_dir.name, backend="slurm", run_dir=run_dir, script=text, agent=agent, token=token)

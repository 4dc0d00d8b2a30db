"""From a JobSpec to the exact bytes that will be submitted: pure, no clock, no network, no Slurm."""

from orchestrator.plan.render import Plan, render_plan

__all__ = ["Plan", "render_plan"]

"""Batch script templates. Only loops and ifs: every value is quoted before it gets here (orchestrator/plan)."""

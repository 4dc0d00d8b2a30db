"""What a machine can do for a run, measured by doing it: `orch doctor` starts this here and, as a job, on a node.

python -m orchestrator.worker.probe REQUEST    REQUEST and the answer are JSON; see `__main__`

A process of its own, so that a dead file server hangs it and not `orch`. Nothing is judged here.
"""

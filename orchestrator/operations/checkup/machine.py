"""The interpreter that will run the agent, and the limits that this shell hands on to jobs."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.backends.process import Runner
from orchestrator.errors import BackendError
from orchestrator.operations.checkup.findings import Family, Finding, Level
from orchestrator.operations.checkup.target import Target
from orchestrator.words import size

OLDEST_PYTHON = (3, 11)
PYTHON_FIX = "slurm.python (site profile: python) must name a Python >= 3.11 that has this orch, on every node"
_FEW_FILES = 1024
_QUESTION_S = 20.0
# Without what `-c` adds to the path, which is the current directory: on a node that is another one.
_ASK = """\
import json, sys
sys.path[:] = [place for place in sys.path if place]
try:
    import orchestrator
    error = ""
except ImportError as fault:
    error = str(fault)
print(json.dumps([list(sys.version_info[:3]), error]))
"""


@dataclass(frozen=True)
class Interpreter:
    """`error`: it cannot be started at all. `import_error`: it starts, but has no orch."""

    version: tuple[int, ...] = ()
    error: str = ""
    import_error: str = ""


def ask_interpreter(python: str, run: Runner) -> Interpreter:
    """Start it once. Blocks for at most 20 seconds; raises nothing."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # jobs do not get it
    try:
        answer = run([python, "-c", _ASK], timeout_s=_QUESTION_S, environ=environ)
        version, import_error = json.loads(answer.stdout.splitlines()[-1])
    except BackendError as error:
        return Interpreter(error=error.message)
    except (ValueError, IndexError):
        return Interpreter(error=f"it does not work: {answer.stderr.strip()[-200:] or answer.stdout.strip()[-200:]}")
    return Interpreter(tuple(version), import_error=import_error)


def python_finding(target: Target, found: Interpreter) -> Finding:
    """The agent needs Python 3.11 and orch on every node."""
    python = target.python
    which = "slurm.python" if target.own_python else "the one that runs orch"
    if found.error and target.backend == "slurm" and target.own_python:
        message = f"{python} ({which}) does not run on this machine: {found.error}"
        return Finding("python", Level.WARN, message, f"{PYTHON_FIX}; `orch doctor --node` tries it there")
    if found.error:
        return Finding("python", Level.BAD, f"{python} ({which}): {found.error}", PYTHON_FIX)
    version = ".".join(map(str, found.version))
    if found.version[:2] < OLDEST_PYTHON:
        return Finding("python", Level.BAD, f"{python} ({which}) is Python {version}; the agent needs 3.11", PYTHON_FIX)
    if found.import_error:
        return Finding("python", Level.BAD, f"{python} ({which}) has no orch: {found.import_error}", PYTHON_FIX)
    return Finding("python", Level.OK, f"{python} ({which}): Python {version}, has orch")


def limit_findings() -> Iterator[Finding]:
    """Only what is too low: Slurm hands the limits of the submitting shell on to the job (PropagateResourceLimits)."""
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _FEW_FILES:
        message = f"this shell allows {files} open files, and jobs inherit that; data loaders need more"
        yield Finding("ulimit", Level.WARN, message, f"ulimit -n {most_files}")
    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest != resource.RLIM_INFINITY:
        message = f"this shell allows files of at most {size(largest)}, and jobs inherit that: a larger save is cut off"
        yield Finding("ulimit", Level.WARN, message, "ulimit -f unlimited", Family.DISK)

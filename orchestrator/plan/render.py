"""`render_plan`: JobSpec → Plan. The same input gives the same bytes; `submit` adds nothing to it."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import SpecError
from orchestrator.identity import AGENT_PLAN_VERSION
from orchestrator.paths import RootPaths, RunPaths
from orchestrator.spec import program_args

if TYPE_CHECKING:
    from orchestrator.spec import JobSpec

# The login environment does not leak into jobs (`--export=ALL` would); these few are needed to find programs and the
# engine. SLURM_* always travel.
EXPORTED = (
    "APPTAINER_CACHEDIR",
    "APPTAINER_CONFIGDIR",
    "APPTAINER_TMPDIR",
    "CONTAINERS_CONF",
    "CONTAINERS_REGISTRIES_CONF",
    "CONTAINERS_STORAGE_CONF",
    "DOCKER_HOST",
    "ENROOT_CACHE_PATH",
    "ENROOT_CONFIG_PATH",
    "ENROOT_DATA_PATH",
    "ENROOT_RUNTIME_PATH",
    "ENROOT_TEMP_PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "LOGNAME",
    "MODULEPATH",
    "PATH",
    "REGISTRY_AUTH_FILE",
    "SHELL",
    "TZ",
    "USER",
    "XDG_RUNTIME_DIR",
)
_READY = "-m orchestrator.worker.agent ready "

# How long other nodes may take once the first one's agent has ended: to notice that, and to end their containers.
_SRUN_GRACE_S = 60


@dataclass(frozen=True)
class Plan:
    """What will be submitted. `str(plan)` is what `--dry-run` prints: the script, and the agent's orders."""

    run_id: str
    backend: str
    run_dir: Path
    script: str  # "" on the local backend, where the agent's orders are everything
    agent: dict[str, Any]
    token: str  # unique per submission: found again in the queue when sbatch's answer was lost

    @property
    def agent_json(self) -> str:
        """The exact text of plan/agent.json."""
        return json.dumps(self.agent, indent=1, ensure_ascii=False) + "\n"

    def __str__(self) -> str:
        paths = RunPaths(self.run_dir)
        orders = f"# {paths.agent_plan}\n{self.agent_json}"
        return orders if not self.script else f"# {paths.script}\n{self.script}\n{orders}"


def render_plan(
    spec: JobSpec,
    *,
    run_id: str,
    root: Path,
    code_hash: str,
    library_hash: str,
    python: str,
    attempt_base: int = 0,
    nonce: str = "0",
    after_jobs: Sequence[str] = (),
    allow_drift: Sequence[str] = (),
) -> Plan:
    """Render everything a submission consists of.

    `python` is the interpreter that runs `orch`, used on the nodes unless `slurm.python` names another; `nonce` tells
    two submissions of the same attempt apart; `after_jobs` are the jobs of the runs in `after` that go on;
    `allow_drift` names what the training code may find changed since its checkpoint.
    Raises SpecError where a value cannot be carried by an `#SBATCH` line.
    """
    paths = RootPaths(root).run(run_id)
    python = spec.slurm.python or python
    agent = render_agent_plan(
        spec,
        run_id=run_id,
        root=root,
        code_hash=code_hash,
        library_hash=library_hash,
        attempt_base=attempt_base,
        python=python,
    )
    if allow_drift:
        agent["allow_drift"] = sorted(allow_drift)
    content = hashlib.sha256(json.dumps(agent, sort_keys=True).encode() + nonce.encode()).hexdigest()
    token = f"orch:{run_id}:{content[:16]}"
    script = ""
    if spec.backend == "slurm":
        script = render_script(
            spec, paths, token=token, attempt_base=attempt_base, python=python, after_jobs=after_jobs
        )
    return Plan(run_id=run_id, backend=spec.backend, run_dir=paths.run_dir, script=script, agent=agent, token=token)


def render_agent_plan(
    spec: JobSpec, *, run_id: str, root: Path, code_hash: str, library_hash: str, attempt_base: int, python: str
) -> dict[str, Any]:
    """Orders for the agents and for the session inside the job; secrets by name only."""
    paths = RootPaths(root).run(run_id)
    resources, no_progress = spec.resources, spec.watchdog.no_progress
    return {
        "version": AGENT_PLAN_VERSION,
        "run_id": run_id,
        "name": spec.name,
        "backend": spec.backend,
        "run_dir": str(paths.run_dir),
        "code_dir": str(RootPaths(root).snapshot(code_hash)),
        "code_hash": code_hash,
        "library_dir": str(RootPaths(root).snapshot(library_hash)),
        "library_hash": library_hash,
        "attempt_base": attempt_base,
        "python": python,
        "program": {"kind": spec.job.kind, "argv": program_argv(spec)},
        "torchrun": None if spec.job.kind == "command" else spec.torchrun.model_dump(),
        "nodes": resources.nodes,
        "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": resources.gpus_per_node,
        "mem_bytes": None if resources.mem is None else int(resources.mem),
        "container": {
            "runtime": spec.container.runtime,
            "image": spec.container.image,
            "mounts": [mount.model_dump() for mount in spec.container.mounts],
        },
        "checkpoint": {**spec.checkpoint.model_dump(), "uri": checkpoint_uri(spec, paths)},
        "signal": spec.preemption.signal,
        "lead_time_s": int(spec.preemption.lead_time),
        "caps": {"max_requeues": spec.preemption.max_requeues, **spec.retry.model_dump(exclude={"backoff"})},
        "backoff_s": int(spec.retry.backoff),
        "watchdog": {"no_progress_s": None if no_progress is None else int(no_progress)},
        "env": dict(spec.env),
        "secrets": list(spec.secrets),
        "notify": None if spec.notify is None else spec.notify.model_dump(mode="json"),
        "after": list(spec.after),
    }


def program_argv(spec: JobSpec) -> list[str]:
    """The program and its arguments; the interpreter, where one is needed, is added on the node."""
    job = spec.job
    if job.command is not None:
        return [*job.command, *program_args(job)]
    if job.module is not None:
        return ["-m", job.module, *program_args(job)]
    return [str(job.script), *program_args(job)]


def checkpoint_uri(spec: JobSpec, paths: RunPaths) -> str:
    """Where this run's checkpoints lie: the run directory, or `<checkpoint.uri>/<run_id>`."""
    if spec.checkpoint.uri is None:
        return str(paths.checkpoints)
    return f"{spec.checkpoint.uri.rstrip('/')}/{paths.run_dir.name}"


# --- the batch script ------------------------------------------------------------------------------------------------
def render_script(
    spec: JobSpec, paths: RunPaths, *, token: str, attempt_base: int, python: str, after_jobs: Sequence[str] = ()
) -> str:
    """The batch script. Every value is quoted here; the template holds loops and ifs only."""
    signals = list(dict.fromkeys([spec.preemption.signal, "USR1", "TERM"]))
    context = {
        "run_id": paths.run_dir.name,
        "directives": sbatch_directives(spec, paths, token, after_jobs),
        "python": shlex.quote(python),
        "run_dir": shlex.quote(str(paths.run_dir)),
        "attempt_base": str(attempt_base),
        "setup": list(spec.slurm.setup),
        "after": list(spec.after),
        "signal": spec.preemption.signal,
        "signals": " ".join(signals),
        "srun_args": shlex.join(srun_args(spec)),
        "srun_grace_s": str(_SRUN_GRACE_S),
    }
    script = _fill_template(spec.slurm.template, context)
    if spec.after and _READY not in script:
        raise SpecError(
            f"slurm.template: {spec.slurm.template} does not look whether the runs in `after` are completed",
            hint="Take over the lines below `{% if after %}` from slurm_templates/run.sbatch.j2.",
        )
    return script


def _fill_template(path: str | None, context: Mapping[str, object]) -> str:
    """Fill the packaged template, or the user's own. Raises SpecError for one that cannot be read or filled."""
    import jinja2

    import slurm_templates

    # trim_blocks/lstrip_blocks: lines that hold only a `for` or `if` leave no trace in the script.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    file = Path(path) if path is not None else Path(slurm_templates.__file__).parent / "run.sbatch.j2"
    try:
        return environment.from_string(file.read_text(encoding="utf-8")).render(context)
    except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
        raise SpecError(
            f"slurm.template: {file}: {error}", hint="Start from a copy of slurm_templates/run.sbatch.j2."
        ) from error


def sbatch_directives(spec: JobSpec, paths: RunPaths, token: str, after_jobs: Sequence[str] = ()) -> list[str]:
    """`#SBATCH` lines without the prefix, in a fixed order."""
    resources = spec.resources
    options: dict[str, object] = {
        "job-name": spec.name,
        "comment": token,
        "output": _log_path(str(paths.scheduler_log)),
        "open-mode": "append",  # a requeued job would truncate the log of its earlier attempts
        "chdir": "/",  # the directory of submission may be gone by then
        "export": ",".join(EXPORTED),
        "requeue": True,
        "signal": f"B:{spec.preemption.signal}@{int(spec.preemption.lead_time)}",
        "nodes": resources.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": resources.cpus_per_task,
        "mem": None if resources.mem is None else f"{-(-int(resources.mem) // 1024**2)}M",
        "time": None if resources.time is None else _minutes_and_seconds(int(resources.time)),
        "gpus-per-node": resources.gpus_per_node or None,
    }
    given = {key: value for key, value in options.items() if value is not None}
    given.update({key: True if value is None else value for key, value in spec.slurm.options().items()})
    if after_jobs:  # whether they have completed, the job itself looks up: Slurm only keeps it from starting in vain
        asked = [spec.slurm.dependency, f"afterany:{':'.join(after_jobs)}"]
        given["dependency"] = ",".join(part for part in asked if part)
    return [
        f"--{key}" if value is True else f"--{key}={_directive_value(key, str(value))}" for key, value in given.items()
    ]


def _minutes_and_seconds(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    return f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"


def _log_path(path: str) -> str:
    """Slurm reads `%` and backslash in this one value as a pattern, and nothing escapes them (22.05, measured)."""
    if "%" in path or "\\" in path:
        raise SpecError(
            f"root: Slurm cannot write its log to {path!r}", hint="Choose a root without `%` and backslash in its path."
        )
    return path


def _directive_value(key: str, text: str) -> str:
    """Quote a value for sbatch's own parser of `#SBATCH` lines (quotes, backslash; `#` starts a comment)."""
    if any(char in text for char in "\n\r\0"):
        raise SpecError(f"{key}: {text!r} cannot stand on an #SBATCH line", hint="It must be a single line of text.")
    plain = text.replace("-", "").replace("_", "")
    if plain.isascii() and all(char.isalnum() or char in ".:/@,=+%[]" for char in plain):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def srun_args(spec: JobSpec) -> Sequence[str]:
    """Arguments of the one srun of the script.

    srun does not inherit `--cpus-per-task` (FACTS 2) nor the whole environment of the batch shell (`--export`), and a
    task that has saved first must not make srun end its peers.
    """
    resources = spec.resources
    return [
        f"--nodes={resources.nodes}",
        f"--ntasks={resources.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={resources.cpus_per_task}",
        "--export=ALL",
        "--kill-on-bad-exit=0",
        *spec.slurm.srun_args,
    ]

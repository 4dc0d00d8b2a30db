"""Which sbatch options `slurm.extra_sbatch` passes through, and where the others are set instead."""

from __future__ import annotations

import re

_ONE_TASK = "orch starts one task per node; set resources.nodes, resources.cpus_per_task and torchrun.nproc_per_node"
_CHANNEL = "orch reads the job id from sbatch's answer"
_LOGS = "the scheduler's output belongs to the run directory; read it with: orch logs RUN"

OWNED: dict[str, str] = {
    "account": "set slurm.account",
    "array": "orch makes arrays itself, from a sweep",
    "begin": "set slurm.begin",
    "chdir": "the job runs in its code snapshot; set workspace.path",
    "clusters": "orch speaks to one cluster",
    "comment": "orch finds its own submissions by the comment; write notes: instead",
    "constraint": "set slurm.constraint",
    "cores-per-socket": "set resources.cpus_per_task",
    "cpus-per-gpu": "set resources.cpus_per_task",
    "cpus-per-task": "set resources.cpus_per_task",
    "dependency": "set slurm.dependency",
    "error": _LOGS,
    "exclude": "set slurm.exclude",
    "exclusive": "set slurm.exclusive",
    "export": "the job's environment is env: and secrets:, nothing else is exported",
    "export-file": "the job's environment is env: and secrets:, nothing else is exported",
    "gpus": "set resources.gpus_per_node",
    "gpus-per-node": "set resources.gpus_per_node",
    "gpus-per-socket": "set resources.gpus_per_node",
    "gpus-per-task": "set resources.gpus_per_node",
    "gres": "set slurm.gres (and resources.gpus_per_node for GPUs)",
    "help": _CHANNEL,
    "input": "the batch script reads no input",
    "job-name": "set name",
    "kill-on-invalid-dep": "orch decides what becomes of a job whose dependency failed",
    "licenses": "set slurm.licenses",
    "mail-type": "set slurm.mail_type",
    "mail-user": "set slurm.mail_user",
    "mem": "set resources.mem",
    "mem-per-cpu": "set resources.mem",
    "mem-per-gpu": "set resources.mem",
    "nice": "set slurm.nice",
    "no-kill": "a lost node ends the attempt, and orch requeues it; set retry.node_failure",
    "no-requeue": "orch owns requeueing; set preemption.max_requeues and retry",
    "nodelist": "set slurm.nodelist",
    "nodes": "set resources.nodes",
    "ntasks": _ONE_TASK,
    "ntasks-per-core": _ONE_TASK,
    "ntasks-per-gpu": _ONE_TASK,
    "ntasks-per-node": _ONE_TASK,
    "ntasks-per-socket": _ONE_TASK,
    "open-mode": _LOGS,
    "output": _LOGS,
    "parsable": _CHANNEL,
    "partition": "set slurm.partition",
    "qos": "set slurm.qos",
    "quiet": _CHANNEL,
    "requeue": "orch owns requeueing; set preemption.max_requeues and retry",
    "reservation": "set slurm.reservation",
    "signal": "set preemption.signal and preemption.lead_time",
    "test-only": "use orch submit --dry-run",
    "time": "set resources.time",
    "usage": _CHANNEL,
    "verbose": _CHANNEL,
    "version": _CHANNEL,
    "wait": "use orch wait RUN",
    "wckey": "set slurm.wckey",
    "wrap": "the script is orch's; set job.command or slurm.template",
}

SHORT: dict[str, str] = {
    "A": "account", "a": "array", "b": "begin", "B": "extra-node-info", "C": "constraint", "c": "cpus-per-task",
    "D": "chdir", "d": "dependency", "e": "error", "F": "nodefile", "G": "gpus", "H": "hold", "h": "help",
    "I": "immediate", "i": "input", "J": "job-name", "k": "no-kill", "L": "licenses", "M": "clusters",
    "m": "distribution",
    "N": "nodes", "n": "ntasks", "O": "overcommit", "o": "output", "p": "partition", "Q": "quiet", "q": "qos",
    "S": "core-spec", "s": "oversubscribe", "t": "time", "V": "version", "v": "verbose", "W": "wait",
    "w": "nodelist", "x": "exclude",
}  # fmt: skip

_NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")


def normal_name(key: str) -> str:
    """`--mem-bind`, `mem_bind` and `mem-bind` are one option."""
    return key.removeprefix("--").replace("_", "-")


def refusal(key: str) -> str | None:
    """Why `slurm.extra_sbatch` does not take this key, or None when it does."""
    bare = key.removeprefix("-")
    if len(bare) == 1:
        long = SHORT.get(bare)
        if long is None:
            return "write sbatch's long option name"
        return f"is sbatch's --{long}: {OWNED[long]}" if long in OWNED else f"write the long name, {long}"
    name = normal_name(key)
    if not _NAME.fullmatch(name):
        return "is not the name of an sbatch option; write its long name without dashes in front, such as mem-bind"
    if name in OWNED:
        return f"is not passed through: {OWNED[name]}"
    # sbatch accepts any unambiguous beginning of a long name: `job-n` would set --job-name behind our back
    whole = [owned for owned in OWNED if owned.startswith(name)]
    if whole:
        return f"sbatch would read this as --{whole[0]}, which is not passed through: {OWNED[whole[0]]}"
    return None


# What orch itself says to the one srun of the script: a second value would win and break the one-task-per-node rule,
# or take the logs and the environment away.
_STEP_LONG = (
    "cpus-per-task", "error", "export", "input", "job-name", "jobid", "kill-on-bad-exit", "nodes", "ntasks",
    "ntasks-per-node", "output",
)  # fmt: skip
_STEP_SHORT = "NnceioJK"


def owned_by_step(word: str) -> bool:
    """True when a word of `slurm.srun_args` sets something that orch sets."""
    if word.startswith("--"):
        return word[2:].partition("=")[0] in _STEP_LONG
    return len(word) > 1 and word[0] == "-" and word[1] in _STEP_SHORT

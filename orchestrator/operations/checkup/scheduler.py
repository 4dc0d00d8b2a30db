"""From Slurm's configuration to findings: who is told what, how long a save has, how a job comes back (FACTS 1, 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.operations.checkup.findings import Finding, Level, SaveSeconds, listed
from orchestrator.operations.checkup.slurm_text import (
    ClusterAnswers,
    Fields,
    clock,
    number,
    requeue_delay_s,
    seconds,
    words,
)
from orchestrator.operations.checkup.target import Target

SHORT_SAVE_S = 15  # two steps, one save and the way of the signal; less leaves no room for a slow disk
_OLDEST = (22, 5)
_SLOW_DISCOVERY_S = 1800


@dataclass(frozen=True)
class Preempted:
    """What a preemption does to a job of ours. `by`: who can do it; empty = nobody."""

    mode: str  # OFF | REQUEUE | CANCEL | SUSPEND
    grace_s: int
    by: tuple[str, ...]

    @property
    def happens(self) -> bool:
        return self.mode != "OFF" and bool(self.by)


def chosen_partitions(target: Target, answers: ClusterAnswers) -> tuple[str, ...]:
    """Those that were asked for, else the cluster's default; may name some that do not exist."""
    default = tuple(name for name, row in answers.partitions.items() if row.get("Default") == "YES")
    return target.partitions or default


def preempted(partition: Fields, target: Target, answers: ClusterAnswers) -> Preempted:
    """The rule in force for jobs of this partition."""
    kind = answers.config.get("PreemptType", "")
    if kind.endswith("/partition_prio"):
        tier = number(partition.get("PriorityTier")) or 0
        above = [name for name, row in answers.partitions.items() if (number(row.get("PriorityTier")) or 0) > tier]
        return Preempted(_mode(partition.get("PreemptMode")), seconds(partition.get("GraceTime")) or 0, tuple(above))
    if kind.endswith("/qos"):
        return _preempted_by_qos(target, answers)
    return Preempted("OFF", 0, ())


def _preempted_by_qos(target: Target, answers: ClusterAnswers) -> Preempted:
    """By QOS: mode and grace are those of our QOS, and its mode may be the cluster's (sacctmgr(1))."""
    table = answers.accounting.qos if answers.accounting is not None else {}
    name = own_qos(target, answers)
    row = table.get(name, {})
    mode = row.get("PreemptMode", "cluster")
    above = tuple(f"QOS {other}" for other, fields in table.items() if name in words(fields.get("Preempt")))
    unknown = ("a QOS that may preempt yours",) if not table else ()
    chosen = answers.config.get("PreemptMode") if mode in ("", "cluster") else mode
    return Preempted(_mode(chosen), seconds(row.get("GraceTime")) or 0, above or unknown)


def own_qos(target: Target, answers: ClusterAnswers) -> str:
    """The QOS the job gets: the spec's, the association's default, Slurm's `normal`."""
    rows = answers.accounting.associations if answers.accounting is not None else ()
    fitting = [row for row in rows if target.account in (None, row.get("Account"))]
    default = next((row["Def QOS"] for row in fitting if row.get("Def QOS")), None)
    return target.qos or default or "normal"


def _mode(text: str | None) -> str:
    """`GANG,SUSPEND` → SUSPEND; a partition of GANG alone preempts nothing."""
    given = [word.upper() for word in words(text)]
    return next((word for word in ("SUSPEND", "REQUEUE", "CANCEL") if word in given), "OFF")


def save_seconds(target: Target, answers: ClusterAnswers) -> SaveSeconds:
    """The shortest of the partitions in question."""
    kill_wait = seconds(answers.config.get("KillWait"))
    budgets: list[int] = []
    limited = False
    for name in chosen_partitions(target, answers):
        partition = answers.partitions.get(name, {})
        rule = preempted(partition, target, answers)
        if rule.happens and rule.mode != "SUSPEND":
            budgets.append(rule.grace_s or kill_wait or 0)
        limited = limited or time_limit_s(partition, target) is not None
    return SaveSeconds(min(budgets, default=None), target.lead_time_s if limited else None, kill_wait)


def time_limit_s(partition: Fields, target: Target) -> int | None:
    """Wall time an attempt gets: the spec's, the partition's default, its maximum."""
    default = seconds(partition.get("DefaultTime"))
    return target.time_s or default or seconds(partition.get("MaxTime"))


# --- findings, in the order in which they are told ------------------------------------------------------------------
def scheduler_findings(target: Target, answers: ClusterAnswers) -> Iterator[Finding]:
    """Everything Slurm's configuration means for a run."""
    yield _version(answers.config)
    names = chosen_partitions(target, answers)
    if not names:
        fix = f"give slurm.partition (or --partition); there are: {listed(answers.partitions)}"
        yield Finding("partition", Level.BAD, "this cluster has no default partition and none was named", fix)
    for name in names:
        partition = answers.partitions.get(name)
        if partition is None:
            known = listed(answers.partitions, nothing="none that you may see")
            yield Finding("partition", Level.BAD, f"there is no partition `{name}`", f"slurm.partition: one of {known}")
            continue
        yield from _partition_findings(name, partition, target, answers)
    yield from _return_findings(answers.config)


def _version(config: Fields) -> Finding:
    text = config.get("SLURM_VERSION", "")
    message = f"Slurm {text or 'of unknown version'}, cluster {config.get('ClusterName', 'without a name')}"
    parts = text.split(".")
    if len(parts) >= 2 and parts[0].isdigit() and parts[1].isdigit() and (int(parts[0]), int(parts[1])) >= _OLDEST:
        return Finding("slurm", Level.OK, message)
    return Finding(
        "slurm", Level.WARN, f"{message}: orch was tested with none older than 22.05", "drill: orch preempt RUN"
    )


def _partition_findings(name: str, partition: Fields, target: Target, answers: ClusterAnswers) -> Iterator[Finding]:
    rule = preempted(partition, target, answers)
    kill_wait_s = seconds(answers.config.get("KillWait")) or 0
    default = "" if target.partitions else " (the default)"
    by_qos = f" · QOS `{own_qos(target, answers)}`" if answers.config.get("PreemptType", "").endswith("/qos") else ""
    heading = f"partition `{name}`{default}{by_qos} · PreemptMode={rule.mode} · GraceTime={rule.grace_s} s"
    state = partition.get("State", "UP")
    if state == "UP":
        yield Finding("partition", Level.OK, f"{heading} · KillWait={kill_wait_s} s")
    else:
        yield Finding("partition", Level.BAD, f"partition `{name}` is {state}", "wait, or choose another partition")
    yield from _access(name, partition, target)
    yield _who_is_told(name, rule, target, answers.config)
    if rule.happens:
        yield from _after_preemption(rule, target, answers)
    yield from _save_time(partition, rule, kill_wait_s, target)
    yield _wall_time(name, partition, target)


def _access(name: str, partition: Fields, target: Target) -> Iterator[Finding]:
    for key, what, value in (("AllowAccounts", "account", target.account), ("AllowQos", "qos", target.qos)):
        allowed = partition.get(key, "ALL")
        if value is not None and allowed != "ALL" and value not in words(allowed):
            message = f"partition `{name}` does not take {what} `{value}` ({key}={allowed})"
            yield Finding("partition", Level.BAD, message, f"slurm.{what}: one of {listed(words(allowed))}")


def _who_is_told(name: str, rule: Preempted, target: Target, config: Fields) -> Finding:
    if not rule.happens:
        why = "PreemptMode=OFF" if rule.mode == "OFF" else "no partition has a higher PriorityTier"
        if config.get("PreemptType", "").endswith("/none"):
            why = "PreemptType=preempt/none"
        elif config.get("PreemptType", "").endswith("/qos"):
            why = "no QOS may preempt yours" if rule.mode != "OFF" else why
        return Finding("preemption", Level.OK, f"jobs of `{name}` are not preempted ({why})")
    by = f"jobs of `{name}` can be preempted by those of {listed(rule.by)}"
    if rule.mode == "SUSPEND":
        return _suspended(by, target)
    forwarded = "preempt_send_user_signal" in words(config.get("SlurmctldParameters"))
    if rule.grace_s == 0:
        told = "SIGTERM goes to the batch script and to the steps at once (there is no grace)"
    elif forwarded:
        told = (
            f"SIG{target.signal} goes to the batch script and nothing to the steps (preempt_send_user_signal, and orch "
            f"asks for --signal=B:{target.signal}); the script hands it to the agents"
        )
    else:
        told = "SIGTERM goes to the steps and nothing to the batch script (your --signal is not used for this)"
    return Finding("preemption", Level.OK, f"{by}: {told}; orch handles it")


def _suspended(by: str, target: Target) -> Finding:
    message = f"{by} with PreemptMode=SUSPEND: the job is not told to save, it stands still where it is"
    if target.contained:
        message += "; its container escapes that, and goes on computing on the GPU that was given to the other job"
    fix = "use a partition with PreemptMode=REQUEUE"
    return Finding("preemption", Level.BAD if target.contained else Level.WARN, message, fix)


def _after_preemption(rule: Preempted, target: Target, answers: ClusterAnswers) -> Iterator[Finding]:
    if rule.mode != "CANCEL":
        return
    better = [name for name, row in answers.partitions.items() if _mode(row.get("PreemptMode")) == "REQUEUE"]
    fix = f"where you have the choice, use a partition with PreemptMode=REQUEUE: {listed(better)}" if better else None
    message = (
        "PreemptMode=CANCEL: Slurm does not requeue the job; orch does, after the save (Slurm accepts that, with and "
        "without grace). A save that outlasts its time ends the job: then `orch resume RUN` goes on"
    )
    yield Finding("preemption", Level.WARN, message, fix)


def _save_time(partition: Fields, rule: Preempted, kill_wait_s: int, target: Target) -> Iterator[Finding]:
    if rule.happens and rule.mode != "SUSPEND":
        budget, source = (rule.grace_s, "GraceTime") if rule.grace_s else (kill_wait_s, "KillWait")
        message = f"a save has {budget} s at a preemption ({source})"
        fix = None
        if budget < SHORT_SAVE_S:
            message += "; one that does not fit is given up, and the previous checkpoint stands"
            fix = "save often (checkpoint.every_minutes), drill with `orch preempt RUN`, or ask for a longer GraceTime"
        yield Finding("save", Level.OK if fix is None else Level.WARN, message, fix)
    limit = time_limit_s(partition, target)
    if limit is not None and limit <= target.lead_time_s:
        message = (
            f"an attempt gets {clock(limit)}, and preemption.lead_time ({target.lead_time_s} s) is no shorter: each "
            "one would be told to stop at its start"
        )
        yield Finding("save", Level.BAD, message, "ask for more in resources.time, or set a shorter lead_time")
    elif limit is not None:
        message = (
            f"a save has {target.lead_time_s} s before the time limit (preemption.lead_time): SIG{target.signal} goes "
            "to the batch script, which hands it to the agents"
        )
        yield Finding("save", Level.OK, message)
    message = f"a save has {kill_wait_s} s when an administrator requeues the job, and after scancel (KillWait)"
    yield Finding("save", Level.OK, message)


def _wall_time(name: str, partition: Fields, target: Target) -> Finding:
    longest, default = seconds(partition.get("MaxTime")), seconds(partition.get("DefaultTime"))
    bound = "without limit" if longest is None else f"up to {clock(longest)}"
    if target.time_s is None:
        given = default or longest
        gets = "has no limit, so no notice of one" if given is None else f"gets {clock(given)}"
        return Finding("time", Level.OK, f"without resources.time an attempt {gets} (`{name}` allows jobs {bound})")
    if longest is not None and target.time_s > longest:
        message = f"resources.time {clock(target.time_s)} is longer than `{name}` allows ({clock(longest)})"
        return Finding(
            "time", Level.BAD, message, f"resources.time: {clock(longest)} or less; a run goes on afterwards"
        )
    return Finding("time", Level.OK, f"resources.time {clock(target.time_s)} fits `{name}` (jobs {bound})")


def _return_findings(config: Fields) -> Iterator[Finding]:
    """How a job comes back, and what may keep it from that."""
    setting = (
        "is off here, but counts only for jobs that do not ask" if config.get("JobRequeue") == "0" else "is on, too"
    )
    message = (
        f"after a save the job goes back into the queue under its own number: orch asks for --requeue (JobRequeue "
        f"{setting}). It can start again after about {requeue_delay_s(config)} s (cred_expire)"
    )
    yield Finding("requeue", Level.OK, message)
    if (launches := _batch_requeues(config)) is not None:
        message = (
            f"after {launches} starts in a row that fail (MaxBatchRequeue) Slurm holds the job (JobHeldAdmin); "
            "`scontrol release JOB` lets it go. Requeues after a save do not count"
        )
        yield Finding("requeue", Level.OK, message)
    if (size := number(config.get("MaxArraySize"))) is not None:
        message = f"job arrays go to index {size - 1} (MaxArraySize={size}); a run is one job and uses none"
        yield Finding("arrays", Level.OK, message)
    yield _dead_node(seconds(config.get("SlurmdTimeout")))


def _batch_requeues(config: Fields) -> int | None:
    """MaxBatchRequeue: of its own in newer versions, a scheduler parameter where a site has set it in older ones."""
    for word in words(config.get("SchedulerParameters")):
        key, _, value = word.partition("=")
        if key.lower() in ("max_batch_requeue", "maxbatchrequeue"):
            return number(value)
    return number(config.get("MaxBatchRequeue"))


def _dead_node(timeout_s: int | None) -> Finding:
    if not timeout_s:
        message = "a node that dies is never given up (SlurmdTimeout=0): its job stays where it is"
        return Finding("dead node", Level.WARN, message, "if a run shows no new steps: scontrol requeue JOB")
    message = (
        f"a node that dies is noticed after {timeout_s} s (SlurmdTimeout), then its job is requeued. Should the old "
        "container still run, it is harmless: a newer attempt's checkpoints are the ones that count"
    )
    return Finding("dead node", Level.OK if timeout_s <= _SLOW_DISCOVERY_S else Level.WARN, message)

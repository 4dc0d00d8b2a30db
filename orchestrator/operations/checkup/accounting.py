"""From sacctmgr's tables to findings: may this user use this account and QOS, and within which limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from orchestrator.operations.checkup.findings import Finding, Level, listed
from orchestrator.operations.checkup.slurm_text import Accounting, ClusterAnswers, Fields, clock, seconds, words
from orchestrator.operations.checkup.target import Target

# Each of these makes Slurm refuse a job without an association (slurm.conf(5), AccountingStorageEnforce).
_NEEDS_ASSOCIATION = {"associations", "limits", "qos", "safe", "wckeys", "all"}
_KEEPS_LIMITS = {"limits", "safe", "all"}
_KEEPS_QOS = {"qos", "safe", "all"}


def has_database(config: Fields) -> bool:
    """Whether the cluster writes accounting records somewhere sacctmgr can read."""
    return config.get("AccountingStorageType", "").endswith("slurmdbd")


def accounting_findings(target: Target, answers: ClusterAnswers) -> Iterator[Finding]:
    """Accounts, QOS, limits."""
    if not has_database(answers.config):
        message = "no accounting database: orch asks squeue, and its own files"
        yield Finding("accounting", Level.OK, message)
        return
    if answers.accounting is None:
        message = f"the accounting database does not answer ({answers.accounting_error}); jobs run without it"
        yield Finding("accounting", Level.WARN, message, "accounts, QOS and their limits were not looked at")
        return
    enforced = set(words(answers.config.get("AccountingStorageEnforce")))
    rows = answers.accounting.associations
    accounts = [row["Account"] for row in rows if row.get("Account")]
    if not accounts and enforced & _NEEDS_ASSOCIATION:
        message = "you have no account on this cluster, and Slurm refuses jobs without one"
        yield Finding("accounting", Level.BAD, message, "ask the administrator: sacctmgr add user NAME account=…")
        return
    yield from _account(target, accounts, enforced)
    fitting = [row for row in rows if target.account in (None, row.get("Account"))]
    yield from _qos(target, fitting, answers.accounting, enforced)
    yield from _limits(target, fitting, answers.accounting, enforced)


def _account(target: Target, accounts: Sequence[str], enforced: set[str]) -> Iterator[Finding]:
    if target.account is not None and target.account not in accounts:
        level = Level.BAD if enforced & _NEEDS_ASSOCIATION else Level.WARN
        refused = "Slurm refuses it" if level is Level.BAD else "this cluster does not check"
        message = f"account `{target.account}` is not one of yours ({refused})"
        yield Finding("accounting", level, message, f"slurm.account: one of {listed(accounts)}")
    else:
        yield Finding("accounting", Level.OK, f"the accounting database answers; your accounts: {listed(accounts)}")


def _qos(target: Target, rows: Sequence[Fields], tables: Accounting, enforced: set[str]) -> Iterator[Finding]:
    allowed = [name for row in rows for name in words(row.get("QOS"))]
    if target.qos is None or target.qos in allowed:
        yield Finding("qos", Level.OK, f"QOS you may use: {listed(allowed)}")
        return
    if target.qos not in tables.qos:
        message = f"there is no QOS `{target.qos}`"
        yield Finding("qos", Level.BAD, message, f"slurm.qos: one of {listed(allowed or tables.qos)}")
        return
    level = Level.BAD if enforced & _KEEPS_QOS else Level.WARN
    message = f"QOS `{target.qos}` is not one of yours"
    yield Finding("qos", level, message, f"slurm.qos: one of {listed(allowed)}")


def _limits(target: Target, rows: Sequence[Fields], tables: Accounting, enforced: set[str]) -> Iterator[Finding]:
    """One line per account or QOS that bounds anything."""
    used = [row for name, row in tables.qos.items() if name == target.qos]
    named = [(f"account `{row.get('Account')}`", row) for row in rows] + [
        (f"QOS `{row.get('Name')}`", row) for row in used
    ]
    for who, row in named:
        jobs = row.get("MaxJobs") or row.get("MaxJobsPU")
        longest = seconds(row.get("MaxWall"))
        bounds = [f"at most {jobs} jobs at once"] if jobs else []
        bounds += [f"none longer than {clock(longest)} (MaxWall)"] if longest is not None else []
        if not bounds:
            continue
        message = f"{who}: {listed(bounds)}"
        if longest is not None and target.time_s is not None and target.time_s > longest:
            level = Level.BAD if enforced & _KEEPS_LIMITS else Level.WARN
            yield Finding("limits", level, f"{message}; resources.time is {clock(target.time_s)}", "ask for less time")
        else:
            yield Finding("limits", Level.OK, message)

"""`doctor`: ask everybody, each with a deadline, and put the findings in their order."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.backends.process import CommandMissing, Runner, run_command
from orchestrator.backends.slurm import scheduler_words
from orchestrator.errors import BackendError, SchedulerUnavailable
from orchestrator.operations.checkup.accounting import accounting_findings, has_database
from orchestrator.operations.checkup.disk import (
    Sight,
    cache_finding,
    cache_places,
    disk_findings,
    place_finding,
    quota_findings,
)
from orchestrator.operations.checkup.engine import engine_findings
from orchestrator.operations.checkup.findings import Examined, Family, Finding, Level, SaveSeconds
from orchestrator.operations.checkup.machine import ask_interpreter, limit_findings, python_finding
from orchestrator.operations.checkup.node import NodeAnswer, ask_node, node_findings
from orchestrator.operations.checkup.scheduler import chosen_partitions, save_seconds, scheduler_findings
from orchestrator.operations.checkup.slurm_text import (
    Accounting,
    ClusterAnswers,
    parse_config,
    parse_partitions,
    parse_table,
)
from orchestrator.operations.checkup.store import store_findings
from orchestrator.operations.checkup.target import Target, target_of_site, target_of_spec
from orchestrator.operations.submission import SpecLike, load
from orchestrator.worker.probe.disk import DiskFacts
from orchestrator.worker.probe.engine import EngineFacts
from orchestrator.worker.probe.store import StoreFacts

_SLURM_S = 15.0  # per question; after the first without an answer no other is asked
_ACCOUNTING_S = 10.0
_DISK_S = 20.0  # a dead file server never answers
_ENGINE_S = 30.0
_STORE_S = 60.0
_QUOTA_S = 5.0
_LEFT_OUT = "partitions, signals and accounting were not looked at"


def doctor(
    spec: SpecLike | None = None,
    *,
    overrides: Iterable[str] = (),
    root: str | Path | None = None,
    partition: str | None = None,
    node: bool = False,
    start_s: float = 120.0,
    environ: Mapping[str, str] = os.environ,
    run: Runner = run_command,
) -> Examined:
    """Examine cluster, engine, disk and interpreter for this spec, or for one that says nothing of its own.

    `node`: also by a job on a compute node, given `start_s` seconds to start. Blocks for less than a minute and a half
    besides. Raises SpecError; everything else that is wrong is a finding. Leaves nothing behind.
    """
    target = _target(spec, overrides, root, partition, environ)
    answers, silence = _ask_slurm(target, run)
    disks = _try_disks(target, run)
    on_node = None
    if node and answers is not None:
        on_node = ask_node(target, disks["root"], start_s=start_s, run=run)
    findings = [*silence]
    if answers is not None:
        findings += [*scheduler_findings(target, answers), *accounting_findings(target, answers)]
    findings.append(python_finding(target, ask_interpreter(target.python, run)))
    findings += _examine_engine(target, run)
    findings += _judge_disks(target, disks, answers, on_node, run)
    findings += _examine_store(target, run)
    findings.append(_examine_caches(target, run))
    findings += limit_findings()
    if on_node is not None:
        findings += node_findings(target, on_node)
    elif node and target.backend == "local":
        findings.append(Finding("node", Level.WARN, "backend: local has no compute nodes", "leave --node out"))
    saves = SaveSeconds(preemption=target.lead_time_s) if target.backend == "local" else SaveSeconds()
    return Examined(tuple(findings), saves if answers is None else save_seconds(target, answers))


def _target(
    spec: SpecLike | None,
    overrides: Iterable[str],
    root: str | Path | None,
    partition: str | None,
    environ: Mapping[str, str],
) -> Target:
    from orchestrator.spec import load_site, resolve_root

    if spec is not None:
        loaded, _ = load(spec, overrides, root=root, environ=environ)
        return target_of_spec(loaded, resolve_root(root or loaded.root, environ), partition, environ)
    site = load_site(environ)
    return target_of_site(site, resolve_root(root or site.root, environ), partition, environ)


# --- Slurm ----------------------------------------------------------------------------------------------------------
def _ask_slurm(target: Target, run: Runner) -> tuple[ClusterAnswers | None, list[Finding]]:
    """What the cluster says; None and one finding when it cannot be asked."""
    if target.backend == "local":
        return None, [Finding("slurm", Level.OK, "backend: local: the run stays on this machine, Slurm is not asked")]
    try:
        config = parse_config(_question(run, ["scontrol", "show", "config"]))
        partitions = parse_partitions(_question(run, ["scontrol", "show", "partition", "--oneliner", "--all"]))
        answers = ClusterAnswers(config, partitions)
        names = ",".join(name for name in chosen_partitions(target, answers) if name in partitions)
        hosts = _question(run, ["sinfo", "--noheader", f"--partition={names}", "--format=%n"]) if names else ""
        return _with_accounting(replace(answers, hosts=frozenset(hosts.split())), run), []
    except CommandMissing:
        return None, [_no_slurm(target, "Slurm is not installed on this machine (no scontrol in PATH)")]
    except BackendError as error:
        if "configuration" in error.message:  # "Could not establish a configuration source", "… configuration file"
            return None, [
                _no_slurm(target, "this machine belongs to no Slurm cluster (no slurm.conf; SLURM_CONF names it)")
            ]
        message = f"Slurm does not answer: {error.message}; {_LEFT_OUT}"
        fix = "is slurmctld up? `scontrol ping` tells; running jobs are not affected"
        return None, [Finding("slurm", Level.BAD, message, fix)]


def _no_slurm(target: Target, message: str) -> Finding:
    if target.from_spec:
        fix = "use a login node of the cluster, or set `backend: local` in the spec"
        return Finding("slurm", Level.BAD, f"{message}, and the spec says backend: slurm", fix)
    return Finding("slurm", Level.OK, f"{message}: `backend: local` is what works here")


def _question(run: Runner, argv: Sequence[str], timeout_s: float = _SLURM_S) -> str:
    answer = run(argv, timeout_s=timeout_s)
    if answer.returncode != 0:
        words = scheduler_words(answer.stderr or answer.stdout) or f"exit code {answer.returncode}"
        raise SchedulerUnavailable(f"{argv[0]}: {words}")
    return answer.stdout


def _with_accounting(answers: ClusterAnswers, run: Runner) -> ClusterAnswers:
    if not has_database(answers.config):
        return answers
    mine = ["user=" + _user_name(), f"cluster={answers.config.get('ClusterName', '')}"]
    columns = "format=account,partition,qos,maxjobs,maxwall,defaultqos"
    try:
        associations = _question(run, ["sacctmgr", "-P", "show", "associations", *mine, columns], _ACCOUNTING_S)
        columns = "format=name,gracetime,preemptmode,preempt,maxwall,maxjobspu"
        qos = _question(run, ["sacctmgr", "-P", "show", "qos", columns], _ACCOUNTING_S)
    except BackendError as error:
        return replace(answers, accounting_error=error.message)
    table = {row["Name"]: row for row in parse_table(qos) if "Name" in row}
    return replace(answers, accounting=Accounting(parse_table(associations), table))


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


# --- this machine ---------------------------------------------------------------------------------------------------
def _probe(request: Mapping[str, Any], run: Runner, timeout_s: float) -> dict[str, Any]:
    """The probe in a process of its own, which a dead file server may hang. Raises BackendError."""
    argv = [sys.executable, "-m", "orchestrator.worker.probe", json.dumps(request)]
    answer = run(argv, timeout_s=timeout_s)
    if answer.returncode != 0:
        raise BackendError(f"the probe failed: {(answer.stderr.strip().splitlines() or ['without a word'])[-1]}")
    facts: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return facts


def _examine_engine(target: Target, run: Runner) -> Iterator[Finding]:
    if target.runtime == "none":
        return
    try:
        wanted = {"runtime": target.runtime or "docker", "image": target.image}
        facts = EngineFacts(**_probe({"engine": wanted}, run, _ENGINE_S)["engine"])
    except BackendError as error:
        facts = EngineFacts(error=f"the container engine gave no answer: {error.message}")
    yield from engine_findings(target, facts)


def _try_disks(target: Target, run: Runner) -> dict[str, DiskFacts | None]:
    """By topic; None where the file system gave no answer."""
    places = {"root": target.root} | ({} if target.checkpoints is None else {"checkpoints": target.checkpoints})
    facts: dict[str, DiskFacts | None] = {}
    for topic, path in places.items():
        try:
            facts[topic] = DiskFacts(**_probe({"disks": [str(path)]}, run, _DISK_S)["disks"][0])
        except BackendError:
            facts[topic] = None
    return facts


def _judge_disks(
    target: Target,
    disks: Mapping[str, DiskFacts | None],
    answers: ClusterAnswers | None,
    on_node: NodeAnswer | None,
    run: Runner,
) -> Iterator[Finding]:
    hosts = frozenset() if answers is None else answers.hosts
    here = os.uname().nodename.partition(".")[0]
    sight = Sight(here, frozenset(host.partition(".")[0] for host in hosts), None if on_node is None else on_node.host)
    for topic, facts in disks.items():
        if facts is None:
            path = target.root if topic == "root" else target.checkpoints
            message = f"{path}: the file system gave no answer within {_DISK_S:.0f} s"
            yield Finding(
                topic, Level.BAD, message, "is the file server up? `df` hangs, too, if it is not", Family.DISK
            )
            continue
        yield from disk_findings(topic, facts)
        if answers is not None and (found := place_finding(topic, facts, target, sight)) is not None:
            yield found
    yield from quota_findings(_quota(run), {topic: facts for topic, facts in disks.items() if facts is not None})


def _quota(run: Runner) -> str:
    """What quota(1) says; nothing where it is not installed, knows nothing, or hangs at a file server."""
    try:
        return run(["quota", "-w", "-p"], timeout_s=_QUOTA_S).stdout
    except BackendError:
        return ""


def _examine_store(target: Target, run: Runner) -> Iterator[Finding]:
    if target.object_store is None:
        return
    try:
        answer = _probe({"store": target.object_store}, run, _STORE_S)["store"]
    except BackendError as error:
        facts = StoreFacts(str(target.object_store["uri"]), error=f"the object store gave no answer: {error.message}")
    else:
        facts = StoreFacts(**{**answer, "weaknesses": tuple(answer["weaknesses"])})
    yield from store_findings(facts)


def _examine_caches(target: Target, run: Runner) -> Finding:
    places = list(dict.fromkeys(cache_places(target).values()))
    try:
        spaces = _probe({"spaces": places}, run, _DISK_S)["spaces"]
    except BackendError as error:
        return Finding("caches", Level.WARN, f"{', '.join(places)}: {error.message}", None, Family.DISK)
    return cache_finding(target, {place: (free, mount) for place, (free, mount) in zip(places, spaces, strict=True)})

"""Reading Slurm's answers: one question to squeue (and sacct for what squeue has forgotten) for any number of jobs.

Measured on 22.05 and 24.11: a lone unknown id makes squeue leave with 1, unknown ids among known ones vanish
silently, finished jobs vanish after MinJobAge, sacct fails on a cluster without slurmdbd.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from orchestrator.backends.base import JobStatus, SchedulerState
from orchestrator.backends.process import CommandMissing, Finished, Runner
from orchestrator.errors import BackendError, SchedulerUnavailable

QUESTION_TIMEOUT_S = 15.0

_ALIVE = {
    "PENDING": SchedulerState.PENDING,
    "REQUEUED": SchedulerState.PENDING,
    "REQUEUE_FED": SchedulerState.PENDING,
    "REQUEUE_HOLD": SchedulerState.PENDING,
    "SPECIAL_EXIT": SchedulerState.PENDING,
    "CONFIGURING": SchedulerState.RUNNING,
    "RUNNING": SchedulerState.RUNNING,
    "RESIZING": SchedulerState.RUNNING,
    "SIGNALING": SchedulerState.RUNNING,
    "SUSPENDED": SchedulerState.RUNNING,
    "STOPPED": SchedulerState.RUNNING,
    "COMPLETING": SchedulerState.COMPLETING,
    "STAGE_OUT": SchedulerState.COMPLETING,
}

# Order of the fields asked for; the comment may hold anything, so it comes last and takes the rest of the line.
_SQUEUE_FORMAT = "%i|%T|%S|%e|%N|%r"
_SACCT_FIELDS = "JobID,State,Start,End,NodeList,Reason"


def squeue_command(job_ids: Iterable[str]) -> list[str]:
    """Ask for these jobs, finished ones included, array elements one per line."""
    ids = ",".join(sorted(job_ids))
    return ["squeue", "--noheader", "--states=all", "--array", f"--jobs={ids}", f"--format={_SQUEUE_FORMAT}"]


def read_squeue(text: str) -> dict[str, JobStatus]:
    """Rows of `squeue_command` (or of `sacct_command`, which asks for the same fields), by job id."""
    found: dict[str, JobStatus] = {}
    for line in text.splitlines():
        fields = line.strip().split("|", 5)
        if len(fields) == 6 and "." not in fields[0]:
            found[fields[0]] = _status(*fields[1:])
    return found


def _status(state: str, start: str, end: str, nodes: str, reason: str) -> JobStatus:
    word = state.split()[0] if state.split() else ""  # sacct says "CANCELLED by 1000"
    known = _ALIVE.get(word.rstrip("+"), SchedulerState.ENDED)
    shown = reason if known is SchedulerState.PENDING else word
    return JobStatus(
        state=known,
        reason="" if shown in ("None", "(null)") else shown,
        nodes=tuple(expand_nodes(nodes)),
        start=_unix(start),
        end=_unix(end),
    )


def _unix(text: str) -> float | None:
    """Seconds since 1970, or None for Slurm's N/A, Unknown, NONE."""
    return float(text) if text.isdigit() and int(text) > 0 else None


def expand_nodes(text: str) -> list[str]:
    """`n[1-2,05],m7` → n1 n2 n05 m7; text that is no node list (`(null)`) gives nothing."""
    if text.startswith("(") or " " in text:  # "(null)", "None assigned"
        return []
    names: list[str] = []
    for group in _split_outside_brackets(text):
        head, bracket, rest = group.partition("[")
        inner, _, tail = rest.partition("]")
        parts = inner.split(",") if bracket else [""]
        names += [f"{head}{index}{tail}" for part in parts for index in _indices(part)]
    return [name for name in names if name]


def _split_outside_brackets(text: str) -> list[str]:
    groups, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            groups.append("")
        else:
            groups[-1] += letter
    return groups


def _indices(part: str) -> list[str]:
    low, dash, high = part.partition("-")
    if not (dash and low.isdigit() and high.isdigit()):
        return [part]
    return [f"{index:0{len(low)}d}" for index in range(int(low), int(high) + 1)]


def sacct_command(job_ids: Iterable[str]) -> list[str]:
    """Ask the accounting database for the jobs squeue has forgotten."""
    ids = ",".join(sorted(job_ids))
    return ["sacct", "--noheader", "--parsable2", "--allocations", f"--format={_SACCT_FIELDS}", f"--jobs={ids}"]


def ask(run: Runner, job_ids: Sequence[str]) -> dict[str, JobStatus]:
    """What the scheduler knows of these jobs; ids it does not know are missing. Blocks up to two deadlines."""
    if not job_ids:
        return {}
    answer = run(squeue_command(job_ids), timeout_s=QUESTION_TIMEOUT_S, environ=unix_times())
    if answer.returncode != 0 and "Invalid job id" not in answer.stderr:
        raise no_answer("squeue", answer)
    found = read_squeue(answer.stdout)
    missing = [job_id for job_id in job_ids if job_id not in found]
    if missing:
        found.update(_ask_accounting(run, missing))
    return found


class StatusBook:
    """Latest answers, and the rule: *seen, then missing → ended; never seen → unknown* (FACTS 7)."""

    def __init__(self, run: Runner) -> None:
        self._run = run
        self._latest: dict[str, JobStatus] = {}

    def update(self, job_ids: Iterable[str]) -> None:
        """Ask about these jobs now. Raises SchedulerUnavailable."""
        wanted = sorted(set(job_ids))
        answered = ask(self._run, wanted)
        gone = [job_id for job_id in wanted if job_id in self._latest and job_id not in answered]
        self._latest.update({job_id: _ended(self._latest[job_id]) for job_id in gone})
        self._latest.update(answered)

    def status(self, job_id: str) -> JobStatus:
        """The latest answer about a job, without asking."""
        return self._latest.get(job_id, JobStatus(SchedulerState.UNKNOWN))


def _ended(last: JobStatus) -> JobStatus:
    reason = last.reason if last.state is SchedulerState.ENDED else ""
    return JobStatus(SchedulerState.ENDED, reason, last.nodes, last.start, last.end)


def _ask_accounting(run: Runner, job_ids: Sequence[str]) -> dict[str, JobStatus]:
    """Records of jobs that have left slurmctld's memory; empty where there is no accounting database."""
    try:
        answer = run(sacct_command(job_ids), timeout_s=QUESTION_TIMEOUT_S, environ=unix_times())
    except (SchedulerUnavailable, CommandMissing):
        return {}  # squeue has answered; accounting would only have added the reason
    if answer.returncode != 0:
        return {}
    # slurmctld does not know these jobs: whatever a stale accounting row says, they do not run.
    return {
        job_id: JobStatus(SchedulerState.ENDED, status.reason, status.nodes, status.start, status.end)
        for job_id, status in read_squeue(answer.stdout).items()
        if job_id in job_ids
    }


def unix_times() -> dict[str, str]:
    """The caller's environment with Slurm's clocks set to unix seconds (local times are ambiguous)."""
    return {**os.environ, "SLURM_TIME_FORMAT": "%s"}


def no_answer(command: str, answer: Finished) -> BackendError:
    """The error for a question to which the scheduler answered with a failure."""
    words = " ".join((answer.stderr or answer.stdout).split()) or f"exit code {answer.returncode}"
    return SchedulerUnavailable(
        f"{command} failed: {words}", hint="is slurmctld up? `scontrol ping` tells; running jobs are not affected"
    )

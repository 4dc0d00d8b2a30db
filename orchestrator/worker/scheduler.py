"""What an agent asks of the scheduler from inside an allocation; each question has a deadline, silence is an answer."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Protocol

from orchestrator.containers.process import stop_signals_held
from orchestrator.states import ExitReason

_QUESTION_S = 5.0
_START_PATIENCE_S = 30.0  # at the start of an attempt, which a wrong address would end
_PATIENCE_S = 60.0  # at the end of an attempt: slurmctld may be restarting, and nothing is left to be lost meanwhile
_PAUSE_S = 2.0
_DEFAULT_KILL_WAIT_S = 30.0  # slurm.conf(5)
_GRACE_SLACK_S = 2.0  # Slurm counts whole seconds
_LEAST_S = 1.0
_RESERVE_S = 2.0  # kept back from KillWait for PID 1, the agent and the batch script


@dataclass(frozen=True)
class Notice:
    """Why we are being stopped and until when (unix seconds). cause None: nobody could say."""

    cause: ExitReason | None
    deadline: float
    words: str = ""  # what the scheduler said, for the record
    grace_end: float | None = None  # when a preempted job will be ended, by the scheduler's own clock


@dataclass(frozen=True)
class Requeued:
    """Answer to a requeue request."""

    ok: bool
    message: str = ""
    cancelled: bool = False  # somebody has cancelled the job since we learned why it stops


class Scheduler(Protocol):
    """The agent's view of whoever started it."""

    job_id: str

    def why(self, lead_time_s: float, told: float | None = None) -> Notice:
        """Ask why a stop signal has come. `told`: when it came, unix seconds; None: just now."""

    def why_ended(self, *, noticed: bool, lead_time_s: float) -> ExitReason | None:
        """Why an attempt has ended that no notice explains; None when the scheduler did not end it, or does not say.

        `noticed`: a stop signal came, but nobody could say why.
        """

    def requeue(self, delay_s: float = 0.0, grace_end: float | None = None) -> Requeued:
        """Ask for another attempt, to begin after `delay_s`. Called once, after everything is saved and written.

        `grace_end`: as the notice had it.
        """

    def holds(self, job_id: str) -> bool | None:
        """Whether another job is still queued or running; None when nobody could say."""


def process_identity(pid: int) -> dict[str, int]:
    """pid and start time (clock ticks since boot, proc(5) field 22): a reused pid has another start time."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return {"pid": pid, "start_time": int(stat.rpartition(")")[2].split()[19])}


def local_job_id(identity: Mapping[str, int]) -> str:
    """How a local job is named in events and on the command line."""
    return f"{identity['pid']}.{identity['start_time']}"


def local_pid(job_id: str) -> int | None:
    """The agent's pid if that very process is alive; a zombie is not."""
    pid = int(job_id.partition(".")[0])
    try:
        alive = local_job_id(process_identity(pid)) == job_id
        return pid if alive and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" else None
    except (FileNotFoundError, ProcessLookupError):
        return None


class LocalScheduler:
    """The local backend: a signal is a preemption with the spec's lead time, and the agent itself starts again."""

    def __init__(self, job_id: str, tombstone: Path) -> None:
        self.job_id = job_id
        self._tombstone = tombstone

    def why(self, lead_time_s: float, told: float | None = None) -> Notice:
        """A cancellation (the tombstone comes first), which waits no longer than a cluster would; else preemption."""
        now = time.time()
        if self._tombstone.exists():
            return Notice(ExitReason.CANCELLED, _in(min(lead_time_s, _DEFAULT_KILL_WAIT_S), told, now))
        return Notice(ExitReason.PREEMPTED, _in(lead_time_s, told, now))

    def why_ended(self, *, noticed: bool, lead_time_s: float) -> ExitReason | None:
        """A signal is a preemption; nobody else ends a local attempt."""
        return ExitReason.PREEMPTED if noticed else None

    def requeue(self, delay_s: float = 0.0, grace_end: float | None = None) -> Requeued:
        """The caller loops, and pauses."""
        return Requeued(ok=True)

    def holds(self, job_id: str) -> bool | None:
        """True while that very agent is among the processes of this machine."""
        return local_pid(job_id) is not None


RUNNING = frozenset({"RUNNING", "SIGNALING", "RESIZING", "SUSPENDED", "STOPPED"})
"""What scontrol calls a job that runs: SIGNALING replaces RUNNING while a signal is on its way (22.05, measured). One
that is suspended has not ended either, and was cancelled by nobody."""

_HELD = RUNNING | {"PENDING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD"}

Runner = Callable[[Sequence[str], float], "tuple[int, str]"]


def run_command(argv: Sequence[str], timeout_s: float) -> tuple[int, str]:
    """(return code, stdout and stderr); 124 when it did not end in time, 127 when there is no such program.

    A second notice, which Slurm sends to every process of the step, does not end it.
    """
    # Seconds since 1970: a user's own format may be unreadable, and local time is ambiguous for one hour in autumn.
    environ = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
    try:
        with stop_signals_held():
            process = subprocess.Popen(
                argv, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
    except OSError as error:
        return 127, f"{argv[0]}: {error.strerror}"
    with process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return 124, f"{argv[0]} gave no answer within {timeout_s:g} s"
        finally:
            process.kill()  # nothing where it has ended
    return process.returncode, output.decode(errors="replace")


_NO_ANSWER = ("Unable to contact slurm controller", "Connection refused", "timed out", "Zero Bytes")


class SlurmScheduler:
    """Slurm, through scontrol, for the job this process runs in (FACTS 2)."""

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        run: Runner = run_command,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._run = run
        self._clock = clock
        self._sleep = sleep
        # One element's SLURM_JOB_ID can equal the array's id; requeueing that would requeue every running sibling.
        array = environ.get("SLURM_ARRAY_JOB_ID")
        self.job_id = f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ["SLURM_JOB_ID"]
        self.restart_count = int(environ.get("SLURM_RESTART_COUNT", "0"))

    def _ask(self, argv: Sequence[str], patience_s: float) -> tuple[int, str]:
        """Run a command again until slurmctld answers, for so long; the last (code, output)."""
        until = self._clock() + patience_s
        while True:
            code, output = self._run(argv, _QUESTION_S)
            answered = code != 124 and not (code != 0 and any(words in output for words in _NO_ANSWER))
            if answered or self._clock() + _PAUSE_S > until:
                return code, output
            self._sleep(_PAUSE_S)

    def show_job(self, patience_s: float = 0.0) -> dict[str, str] | None:
        """`scontrol show job -o` as a mapping; None when there is no answer."""
        code, output = self._ask(["scontrol", "show", "job", "-o", self.job_id], patience_s)
        # The job of an array element comes with its pending siblings; the line of this element names its restarts.
        lines = [line for line in output.splitlines() if line.startswith("JobId=")] if code == 0 else []
        return parse_fields(lines[0]) if lines else None

    def kill_wait_s(self) -> float:
        """KillWait of the cluster; Slurm's default when it cannot be asked."""
        code, output = self._run(["scontrol", "show", "config"], _QUESTION_S)
        found = re.search(r"^KillWait\s*=\s*(\d+)", output, re.MULTILINE) if code == 0 else None
        return float(found[1]) if found else _DEFAULT_KILL_WAIT_S

    def grace_s(self, partition: str) -> float | None:
        """GraceTime of a partition; None when it cannot be asked."""
        code, output = self._run(["scontrol", "show", "partition", "-o", partition], _QUESTION_S)
        grace = parse_fields(output).get("GraceTime", "") if code == 0 else ""
        return float(grace) if grace.isdigit() else None

    def why(self, lead_time_s: float, told: float | None = None) -> Notice:
        """Tell preemption, time limit, an administrator's requeue and a user's scancel apart."""
        now = time.time()
        job = self.show_job()
        if job is None:
            return Notice(None, _in(min(lead_time_s, _DEFAULT_KILL_WAIT_S), told, now))
        notice = read_notice(
            job,
            now=now,
            told=told,
            lead_time_s=lead_time_s,
            restarts=self.restart_count,
            kill_wait_s=self.kill_wait_s,
            grace_s=lambda: self.grace_s(job.get("Partition", "")),
        )
        shown = ("JobState", "Reason", "Restarts", "EndTime", "PreemptTime")
        return replace(
            notice,
            words=" ".join(f"{key}={job[key]}" for key in shown if key in job),
            grace_end=_time(job.get("EndTime")) if _in_grace(job) else None,
        )

    def why_ended(self, *, noticed: bool, lead_time_s: float) -> ExitReason | None:
        """What Slurm says at the end: a job that still runs was ended by its program."""
        job = self.show_job(_PATIENCE_S)
        if job is None or (not noticed and job.get("JobState") in RUNNING):
            return None
        if not noticed and int(job.get("Restarts", "0")) > self.restart_count:
            return ExitReason.NODE_FAILURE  # whoever else requeues a job has its processes told first
        return self.why(lead_time_s).cause

    def holds(self, job_id: str) -> bool | None:
        """`scontrol show job`: an ended job is known for a while, then it is not."""
        code, output = self._ask(["scontrol", "show", "job", "-o", job_id], _PATIENCE_S)
        if code != 0:
            return False if "Invalid job id" in output else None
        return any(parse_fields(line).get("JobState") in _HELD for line in output.splitlines())

    def wait_for(self, job_ids: Sequence[str]) -> Requeued:
        """Back into the queue until these jobs have ended, without an attempt. Measured on 22.05 and 24.11.

        A running job takes no dependency. After the requeue this script still runs, so the job cannot start before it
        has its dependency.
        """
        asked = self.requeue()
        if not asked.ok:
            return asked
        dependency = f"dependency=afterany:{':'.join(job_ids)}"
        code, output = self._run(["scontrol", "update", f"jobid={self.job_id}", dependency], _QUESTION_S)
        # Without it the job only comes back too early, and looks again.
        return Requeued(ok=True, message="" if code == 0 else output.strip())

    def node_names(self, nodelist: str) -> list[str]:
        """The names in a list such as `n[1-3]`; the list itself when Slurm cannot be asked."""
        code, names = self._ask(["scontrol", "show", "hostnames", nodelist], _START_PATIENCE_S)
        return names.split() if code == 0 else [nodelist]

    def node_addresses(self, *names: str) -> list[str]:
        """Addresses of nodes as Slurm knows them; their names when Slurm cannot be asked."""
        code, output = self._ask(["scontrol", "show", "node", "-o", ",".join(dict.fromkeys(names))], _START_PATIENCE_S)
        nodes = [parse_fields(line) for line in output.splitlines()] if code == 0 else []
        known = {node["NodeName"]: node["NodeAddr"] for node in nodes if {"NodeName", "NodeAddr"} <= node.keys()}
        return [known.get(name, name) for name in names]

    def requeue(self, delay_s: float = 0.0, grace_end: float | None = None) -> Requeued:
        """`scontrol requeue`; that Slurm was faster counts as success.

        A second look comes first: after a scancel the request would bring the job back to life, and after Slurm's own
        requeue it would end the next attempt, which may run already.
        """
        job = self.show_job(_PATIENCE_S)
        if job is not None and int(job.get("Restarts", "0")) > self.restart_count:
            return Requeued(ok=True)
        cause = None if job is None else _cause_of(job, self.restart_count)
        if job is not None and (cause is ExitReason.CANCELLED or _cut_short(job, grace_end)):
            return Requeued(ok=False, message="the job was cancelled", cancelled=True)
        code, output = self._ask(["scontrol", "requeue", self.job_id], 0.0 if job is None else _PATIENCE_S)
        words = output.strip()
        if code != 0 and "pending execution" not in words:
            return Requeued(ok=False, message=words or f"scontrol requeue ended with {code}")
        if delay_s > 0:
            # Slurm may end this process any moment now; without the pause the next attempt only comes sooner.
            self._run(["scontrol", "update", f"jobid={self.job_id}", f"starttime=now+{delay_s:.0f}"], _QUESTION_S)
        return Requeued(ok=True)


def parse_fields(line: str) -> dict[str, str]:
    """`Key=value …` of scontrol's one-line output. Values with spaces lose their tail; none of ours has any."""
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


def read_notice(
    job: Mapping[str, str],
    *,
    now: float,
    told: float | None = None,
    lead_time_s: float,
    restarts: int,
    kill_wait_s: Callable[[], float],
    grace_s: Callable[[], float | None] = lambda: None,
) -> Notice:
    """FACTS 2 as a function of `scontrol show job`."""
    state = job.get("JobState", "")
    preempted = _time(job.get("PreemptTime")) is not None
    if state in RUNNING:
        end = _time(job.get("EndTime"))
        if end is not None and end <= now:
            # Our clock is ahead of slurmctld's, or OverTimeLimit lets it run on: a deadline that has passed would end
            # the program before it can save.
            over = _in(kill_wait_s() - _RESERVE_S, told, now)
            return Notice(ExitReason.PREEMPTED if preempted else ExitReason.TIME_LIMIT, over)
        if preempted:
            if end is None:  # a job without a time limit has none, during its grace, too
                grace = grace_s()
                end = _in(lead_time_s if grace is None else min(grace, lead_time_s), told, now)
            return Notice(ExitReason.PREEMPTED, end)
        if end is not None and end - now <= lead_time_s + 60:  # Slurm signals up to 60 s early (FACTS 1)
            return Notice(ExitReason.TIME_LIMIT, end)
        return Notice(ExitReason.PREEMPTED, _in(lead_time_s, told, now))  # a drill: somebody sent the signal by hand
    deadline = _in(kill_wait_s() - _RESERVE_S, told, now)
    if int(job.get("Restarts", "0")) > restarts:
        return Notice(ExitReason.PREEMPTED if preempted else ExitReason.REQUEUED_BY_ADMIN, deadline)
    if job.get("Reason") == "TimeLimit" or state == "TIMEOUT":
        return Notice(ExitReason.TIME_LIMIT, deadline)
    if state == "PREEMPTED" or preempted:
        return Notice(ExitReason.PREEMPTED, deadline)
    if state == "NODE_FAIL":
        return Notice(ExitReason.NODE_FAILURE, deadline)
    if state == "OUT_OF_MEMORY":
        return Notice(ExitReason.OUT_OF_MEMORY, deadline)
    return Notice(ExitReason.CANCELLED, deadline)


def _in(seconds: float, told: float | None, now: float) -> float:
    """So long after the signal, but never in the past: that would end a program before it can save."""
    return max((now if told is None else min(told, now)) + seconds, now + _LEAST_S)


def _in_grace(job: Mapping[str, str]) -> bool:
    return job.get("JobState") in RUNNING and _time(job.get("PreemptTime")) is not None


def _cut_short(job: Mapping[str, str], grace_end: float | None) -> bool:
    """Whether a preempted job ended within its grace: Slurm waits for the end of it, a person's scancel does not."""
    end = _time(job.get("EndTime")) if job.get("JobState") in ("COMPLETING", "CANCELLED") else None
    return end is not None and grace_end is not None and end < grace_end - _GRACE_SLACK_S


def _cause_of(job: Mapping[str, str], restarts: int) -> ExitReason | None:
    return read_notice(job, now=0.0, lead_time_s=0.0, restarts=restarts, kill_wait_s=lambda: 0.0).cause


def _time(text: str | None) -> float | None:
    """A time of scontrol's in unix seconds; None for `None`, `Unknown`, `N/A` or a field that is not there."""
    if text is None or not text[:1].isdigit():
        return None
    return float(text) if text.isdigit() else datetime.fromisoformat(text).timestamp()

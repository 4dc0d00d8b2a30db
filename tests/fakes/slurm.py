"""A Slurm small enough to read: jobs in memory behind the port of the real commands (`backends.process.Runner`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.backends.process import CommandMissing, Finished
from orchestrator.errors import SchedulerUnavailable


@dataclass
class FakeJob:
    """One job as slurmctld holds it."""

    job_id: str
    comment: str
    state: str = "RUNNING"
    nodes: str = "n1"
    reason: str = "None"
    start: str = "1000"
    end: str = "4600"


@dataclass
class FakeSlurm:
    """Answers sbatch, squeue, sacct, scancel, sinfo like Slurm 22.05; faults are switched on by the tests."""

    jobs: dict[str, FakeJob] = field(default_factory=dict)
    forgotten: dict[str, FakeJob] = field(default_factory=dict)  # ended longer than MinJobAge ago: only sacct knows
    accounting: bool = True
    missing: bool = False  # no Slurm on this machine
    down: bool = False  # slurmctld does not answer
    refuse: str = ""  # what sbatch says instead of queueing
    lose_answers: int = 0  # so many sbatch calls queue the job, then time out
    drop_requests: int = 0  # so many sbatch calls time out without queueing
    first_state: str = "RUNNING"
    commands: list[list[str]] = field(default_factory=list)
    environ: Mapping[str, str] = field(default_factory=dict)  # of the latest sbatch
    next_id: int = 101

    def __call__(self, argv: Sequence[str], *, timeout_s: float, environ: Mapping[str, str] | None = None) -> Finished:
        self.commands.append(list(argv))
        if self.missing:
            raise CommandMissing(f"{argv[0]}: command not found")
        if self.down and argv[0] != "sacct":
            raise SchedulerUnavailable(f"{argv[0]} gave no answer within {timeout_s:g} s")
        return {
            "sbatch": self._sbatch,
            "squeue": self._squeue,
            "sacct": self._sacct,
            "scancel": self._scancel,
            "sinfo": self._sinfo,
        }[argv[0]](list(argv), environ or {})

    def queue(self, comment: str = "") -> str:
        """Put a job into the queue."""
        job_id = str(self.next_id)
        self.next_id += 1
        self.jobs[job_id] = FakeJob(job_id, comment, self.first_state)
        return job_id

    def forget(self, job_id: str) -> None:
        """MinJobAge has passed."""
        self.forgotten[job_id] = self.jobs.pop(job_id)

    def _sbatch(self, argv: list[str], environ: Mapping[str, str]) -> Finished:
        self.environ = environ
        if self.refuse:
            return Finished(1, "", self.refuse)
        if self.drop_requests:
            self.drop_requests -= 1
            raise SchedulerUnavailable("sbatch gave no answer within 60 s")
        comments = [
            line.partition("--comment=")[2] for line in Path(argv[-1]).read_text().splitlines() if "--comment=" in line
        ]
        job_id = self.queue(comments[0] if comments else "")
        if self.lose_answers:
            self.lose_answers -= 1
            raise SchedulerUnavailable("sbatch gave no answer within 60 s")
        return Finished(0, f"{job_id}\n", "")

    def _squeue(self, argv: list[str], environ: Mapping[str, str]) -> Finished:
        assert "--states=all" in argv  # without it a job that has just ended looks unknown
        if "--format=%i|%k" in argv:
            return Finished(0, "".join(f"{job.job_id}|{job.comment}\n" for job in self.jobs.values()), "")
        assert environ["SLURM_TIME_FORMAT"] == "%s"
        wanted = next(arg for arg in argv if arg.startswith("--jobs=")).partition("=")[2].split(",")
        known = [self.jobs[job_id] for job_id in wanted if job_id in self.jobs]
        if len(wanted) == 1 and not known:
            return Finished(1, "", "slurm_load_jobs error: Invalid job id specified\n")
        return Finished(0, "".join(map(_row, known)), "")

    def _sacct(self, argv: list[str], environ: Mapping[str, str]) -> Finished:
        if not self.accounting:
            return Finished(1, "", "Slurm accounting storage is disabled\n")
        wanted = next(arg for arg in argv if arg.startswith("--jobs=")).partition("=")[2].split(",")
        return Finished(0, "".join(_row(self.forgotten[job]) for job in wanted if job in self.forgotten), "")

    def _scancel(self, argv: list[str], environ: Mapping[str, str]) -> Finished:
        job = self.jobs.get(argv[-1])
        if job is None:
            return Finished(1, "", f"scancel: error: Kill job error on job id {argv[-1]}: Invalid job id specified\n")
        if not any(arg.startswith("--signal") for arg in argv):
            job.state = "CANCELLED"
        return Finished(0, "", "")

    def _sinfo(self, argv: list[str], environ: Mapping[str, str]) -> Finished:
        return Finished(0, "low\nhigh\n", "")


def _row(job: FakeJob) -> str:
    return f"{job.job_id}|{job.state}|{job.start}|{job.end}|{job.nodes}|{job.reason}\n"

"""Slurm: our rendered script given to sbatch exactly once; squeue and scancel behind deadlines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.backends import squeue
from orchestrator.backends.base import Command, JobHandle, JobStatus, SchedulerState
from orchestrator.backends.process import CommandMissing, Finished, Runner, run_command
from orchestrator.errors import BackendError, SchedulerUnavailable

if TYPE_CHECKING:
    from orchestrator.backends.handles import QueueWatcher, TrackedJob
    from orchestrator.plan import Plan

SUBMIT_TIMEOUT_S = 60.0  # sbatch waits up to MessageTimeout × retries of a busy slurmctld
SUBMIT_TRIES = 3
STEP_WAIT_S = 30  # for a step beside a running job; it needs no resource of its own, so it starts at once
STEP_EXPORTED = ("COLORTERM", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "TERM", "TZ", "USER")
LOOK_AGAIN_S = (1.0, 2.0, 4.0)  # a slow slurmctld may show a job seconds after sbatch gave up

# Words of sbatch after which the job may be queued all the same.
_AMBIGUOUS = (
    "timed out",
    "Zero Bytes",
    "Unable to contact slurm controller",
    "connect failure",
    "Resource temporarily unavailable",
    "Unexpected message received",
    "Slurm backup controller in standby",
)

# Words of sbatch → what the person can do.
_HINTS = (
    (
        "nvalid account",
        "slurm.account: `sacctmgr show associations user=$USER format=account,partition,qos` lists yours",
    ),
    ("artition", "slurm.partition: `sinfo -o %P` lists the partitions; this cluster has: {partitions}"),
    ("qos", "slurm.qos: `sacctmgr show associations user=$USER format=account,partition,qos` lists yours"),
    ("QOS", "slurm.qos: `sacctmgr show associations user=$USER format=account,partition,qos` lists yours"),
    ("eature", "slurm.constraint: `sinfo -o '%n %f'` lists the features of each node"),
    ("gres", "resources.gpus_per_node: `sinfo -o '%P %G'` lists the GPUs of each partition"),
    ("time limit", "resources.time: `sinfo -o '%P %l'` lists the longest time of each partition"),
    ("node configuration", "resources: no node has this many CPUs, GPUs or this much memory; see `sinfo -N -l`"),
    ("node count", "resources.nodes: `sinfo -o '%P %D'` lists the nodes of each partition"),
    ("emory", "resources.mem: `sinfo -o '%P %m'` lists the memory of the nodes (MiB)"),
    ("rror: unrecognized option", "slurm.extra_sbatch: this Slurm does not know the option"),
    ("configuration file", "this machine has no working slurm.conf: use a login node, or point SLURM_CONF at the file"),
    ("dependency", "slurm.dependency: the job it names is not known to Slurm"),
)


class SlurmBackend:
    """sbatch, squeue, scancel behind deadlines. `run` and `sleep` are ports for tests."""

    name = "slurm"

    def __init__(self, *, run: Runner = run_command, sleep: Callable[[float], None] = time.sleep) -> None:
        self._run = run
        self._sleep = sleep
        self._book = squeue.StatusBook(run)
        self._watcher: QueueWatcher | None = None

    def submit(self, plan: Plan, *, environ: Mapping[str, str]) -> JobHandle:
        """sbatch the script in the run directory. Blocks; a time-out is resolved by looking for the token."""
        script = plan.run_dir / "plan" / "submit.sbatch"
        command = ["sbatch", "--parsable", str(script)]
        environ = submission_environment(environ, script=plan.script, secrets=plan.agent.get("secrets", ()))
        problem: BackendError | None = None
        for _ in range(SUBMIT_TRIES):
            try:
                handle = self._sbatch(command, environ)
            except SchedulerUnavailable as error:
                problem = error
                if (found := self._look_for(plan.token)) is not None:
                    return found
                continue
            return handle if problem is None else self._keep_one(plan.token, handle)
        assert problem is not None
        raise problem

    def _sbatch(self, command: Sequence[str], environ: Mapping[str, str]) -> JobHandle:
        try:
            answer = self._run(command, timeout_s=SUBMIT_TIMEOUT_S, environ=environ)
        except CommandMissing:
            raise BackendError(
                "sbatch is not on PATH: this machine cannot submit to Slurm",
                hint="run `orch submit` on a login node of the cluster, or set `backend: local` in the spec",
            ) from None
        if answer.returncode != 0:
            raise self._refused(answer)
        job_id = answer.stdout.strip().splitlines()[-1].split(";")[0] if answer.stdout.strip() else ""
        if not job_id.isdigit():
            # rc 0 without an id: a wrapper around sbatch. The job may be queued, so the token decides.
            raise SchedulerUnavailable(f"sbatch printed no job id: {answer.stdout.strip()!r}")
        return JobHandle(self.name, job_id)

    def _refused(self, answer: Finished) -> BackendError:
        words = scheduler_words(answer.stderr or answer.stdout) or f"exit code {answer.returncode}"
        if any(phrase.lower() in words.lower() for phrase in _AMBIGUOUS):
            return SchedulerUnavailable(f"sbatch: {words}", hint="is slurmctld up? `scontrol ping` tells")
        hint = next((hint for phrase, hint in _HINTS if phrase in words), None)
        if hint and "{partitions}" in hint:
            hint = hint.format(partitions=", ".join(self._partitions()) or "none that sinfo shows")
        return BackendError(
            f"Slurm refused the job: {words}", hint=hint or "`orch submit --dry-run` prints the script Slurm refused"
        )

    def _partitions(self) -> list[str]:
        """Names for a hint; a cluster too ill to answer gives none, and the refusal is reported all the same."""
        try:
            answer = self._run(["sinfo", "--noheader", "--format=%R"], timeout_s=squeue.QUESTION_TIMEOUT_S)
        except BackendError:
            return []
        return sorted(set(answer.stdout.split()))

    def find(self, token: str) -> JobHandle | None:
        """The job queued with this token in --comment; one that has just ended counts: it was submitted."""
        found = self._find_all(token)
        return found[0] if found else None

    def _find_all(self, token: str) -> list[JobHandle]:
        answer = self._run(
            ["squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%i|%k"],
            timeout_s=squeue.QUESTION_TIMEOUT_S,
        )
        if answer.returncode != 0:
            raise squeue.no_answer("squeue", answer)
        rows = [line.strip().partition("|") for line in answer.stdout.splitlines()]
        ids = [job_id for job_id, _, comment in rows if token in comment.split()]
        return [JobHandle(self.name, job_id) for job_id in sorted(ids, key=_numeric)]

    def _look_for(self, token: str) -> JobHandle | None:
        """Several looks at the queue; a queue that cannot be read leaves the question open, so it raises."""
        problem: BackendError | None = None
        for pause_s in LOOK_AGAIN_S:
            self._sleep(pause_s)
            try:
                problem = None
                if (found := self.find(token)) is not None:
                    return found
            except SchedulerUnavailable as error:
                problem = error
        if problem is not None:
            raise SchedulerUnavailable(
                f"{problem.message}; whether the job was queued is not known",
                hint="run the same `orch submit` again when Slurm answers: it looks for this job before submitting",
            ) from problem
        return None

    def _keep_one(self, token: str, handle: JobHandle) -> JobHandle:
        """After a retry two jobs may carry the token (the first came late): keep the oldest, cancel the others."""
        found = self._find_all(token) or [handle]
        for extra in found[1:]:
            self.cancel(extra)
        return found[0]

    def job(self, handle: JobHandle, folder: Path | str = ".") -> TrackedJob:
        """submitit's handle on the job; all handles of this backend share one batched watcher."""
        from orchestrator.backends.handles import QueueWatcher, TrackedJob  # 100 ms that `orch status` need not pay

        if self._watcher is None:
            self._watcher = QueueWatcher(self._book)
        return TrackedJob(folder, handle.job_id, watcher=self._watcher, stop=lambda: self.cancel(handle))

    def poll(self, handles: Sequence[JobHandle]) -> dict[JobHandle, JobStatus]:
        """One squeue (and one sacct for what squeue forgot) for all handles."""
        self._book.update({handle.job_id for handle in handles})
        return {handle: self._book.status(handle.job_id) for handle in handles}

    def cancel(self, handle: JobHandle) -> None:
        """scancel; a job that has ended or is unknown is not an error."""
        _control(self._run, ["scancel", handle.job_id])

    def signal(self, handle: JobHandle, signal: str) -> None:
        """scancel --signal to every step of the job: the agents on its nodes hand it on to the processes."""
        status = self.poll([handle])[handle]
        if status.state is not SchedulerState.RUNNING:
            raise BackendError(
                f"job {handle.job_id} is not running (Slurm: {status.state.value})",
                hint="a signal needs a running job; `orch status` shows where it is",
            )
        _control(self._run, ["scancel", f"--signal={signal}", handle.job_id])

    def beside(
        self,
        handle: JobHandle,
        argv: Sequence[str],
        *,
        nodes: Sequence[str],
        environ: Mapping[str, str],
        terminal: bool = False,
    ) -> Command:
        """An overlapping step: it shares CPUs, memory and GPUs with the agents' step instead of waiting for its own."""
        step = [
            "srun",
            f"--jobid={handle.job_id}",
            "--overlap",
            f"--immediate={STEP_WAIT_S}",  # else srun asks for ever where the job takes no more steps
            f"--nodes={len(nodes)}",
            f"--ntasks={len(nodes)}",
            "--ntasks-per-node=1",
            f"--nodelist={','.join(nodes)}",
            "--mpi=none",
            "--quiet",
            "--chdir=/",  # the directory we are in need not exist there
            f"--export={','.join(name for name in STEP_EXPORTED if name in environ) or 'NONE'}",
        ]
        return Command((*step, *(["--pty"] if terminal else []), *argv), outside_of_jobs(environ))


def _control(run: Runner, command: Sequence[str]) -> None:
    """scancel with one retry; "invalid job id" and "already completed" mean there is nothing left to do."""
    try:
        answer = run(command, timeout_s=squeue.QUESTION_TIMEOUT_S)
    except SchedulerUnavailable:
        answer = run(command, timeout_s=squeue.QUESTION_TIMEOUT_S)
    except CommandMissing as error:
        raise BackendError(error.message, hint="run this on a login node of the cluster") from None
    if answer.returncode != 0 and any(phrase in answer.stderr for phrase in _AMBIGUOUS):
        raise squeue.no_answer("scancel", answer)
    ended = ("Invalid job id", "already completing or completed")
    if answer.returncode != 0 and not any(phrase in answer.stderr for phrase in ended):
        raise BackendError(
            f"scancel: {scheduler_words(answer.stderr) or f'exit code {answer.returncode}'}",
            hint="`squeue --me` shows the job; the request can be repeated",
        )


def submission_environment(environ: Mapping[str, str], *, script: str, secrets: Iterable[str] = ()) -> dict[str, str]:
    """What sbatch gets: no secrets, nothing of an outer job, and no SBATCH_* that would beat the script's own lines."""
    hidden = set(secrets)
    own = {line.split()[1].split("=")[0] for line in script.splitlines() if line.startswith("#SBATCH --")}
    return {name: value for name, value in environ.items() if name not in hidden and not _overrides_script(name, own)}


def outside_of_jobs(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a srun of ours: without what an outer job's variables, or a person's, would ask for."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(("SRUN_", "SBATCH_")) and not _of_an_outer_job(name)
    }


def _overrides_script(name: str, own_options: set[str]) -> bool:
    if name.startswith("SBATCH_"):
        return "--" + name.removeprefix("SBATCH_").lower().replace("_", "-") in own_options
    return _of_an_outer_job(name)


def _of_an_outer_job(name: str) -> bool:
    """Inside an interactive job SLURM_CPUS_PER_TASK, SLURM_MEM_PER_NODE … would be taken as options."""
    return name.startswith("SLURM_") and name not in ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


def scheduler_words(text: str) -> str:
    """Slurm's own sentence without its prefixes, the last (most general) line last."""
    lines = [line.split("error:", 1)[-1].strip() for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def _numeric(job_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in job_id.replace("_", " ").split() if part.isdigit())

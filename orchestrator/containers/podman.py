"""Runtime `podman`, through short commands of its client (podman has no daemon whose API could be asked).

No client lives as long as the container: Slurm's signals hit every process of the step, and podman's client leaves its
container running at the first one. Between start and end only the container's first process is watched.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.containers.failures import pull_error, require_registry, retried, start_error
from orchestrator.containers.payload import (
    LABEL_ATTEMPT,
    LABEL_DIRECTORY,
    LABEL_NODE,
    LABEL_RUN,
    SIGKILLED,
    About,
    Labelled,
    Mount,
    Payload,
    PayloadRequest,
    PullReport,
)
from orchestrator.containers.process import run_client, scratch_directory, words_of
from orchestrator.errors import ContainerError

_COMMAND_S = 60
_PULL_S = 1800
_END_RECORDED_S = 20.0  # from the death of the first process until conmon has written it down
_KILL_WAIT_S = 20.0
_PIDFILE = "conmon.pid"


class Podman:
    """One command of the client at a time."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = dict(environ)

    def run(
        self,
        *arguments: str,
        cwd: Path | None = None,
        timeout_s: float = _COMMAND_S,
        environ: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Its result, whatever the exit code. Raises ContainerError where it cannot be run, or does not answer."""
        hint = "Look at the disk of podman's store: `podman info`."
        argv = ["podman", *arguments]
        return run_client(argv, environ={**self._environ, **(environ or {})}, timeout_s=timeout_s, hint=hint, cwd=cwd)

    def ask(self, *arguments: str, timeout_s: float = _COMMAND_S) -> str:
        """What a command that must succeed says. Raises ContainerError."""
        done = self.run(*arguments, timeout_s=timeout_s)
        if done.returncode != 0:
            raise ContainerError(f"podman {arguments[0]}: {words_of(done.stderr)}")
        return done.stdout

    def state(self, container: str) -> dict[str, Any]:
        """State of a container as podman knows it; empty where there is none. Raises ContainerError."""
        done = self.run("container", "inspect", "--format={{json .State}}", container)
        if done.returncode != 0 and "no such container" in done.stderr.lower():
            return {}
        if done.returncode != 0:  # a store that is locked is no ended container
            raise ContainerError(f"podman inspect: {words_of(done.stderr)}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found


class PodmanPayload:
    """A container, watched through its first process and through conmon, which writes down how that one ended."""

    def __init__(self, podman: Podman, container: str, scratch: Path) -> None:
        self._podman = podman
        self.container = container
        self._scratch = scratch
        self._monitor = _open_process(int((scratch / _PIDFILE).read_text()))
        self._process = _open_process(int(podman.state(container).get("Pid", 0)))
        self._code: int | None = None

    def poll(self) -> int | None:
        """Exit code once ended, else None."""
        if self._code is None and _has_ended(self._process, 0):
            self._code = self._recorded_code()
        return self._code

    def _recorded_code(self) -> int:
        """What conmon has written down once it has ended, and with it the last output; a killed one wrote nothing."""
        _has_ended(self._monitor, _END_RECORDED_S)
        state = self._state()  # none: removed from outside
        code = int(state.get("ExitCode", -1)) if state.get("Status") in ("exited", "stopped") else -1
        return code if code >= 0 else SIGKILLED

    def _state(self) -> dict[str, Any]:
        """Asked again for a while: an exit code is not given up for a question that failed once."""
        until = time.monotonic() + _END_RECORDED_S
        while True:
            try:
                return self._podman.state(self.container)
            except ContainerError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)

    def kill(self) -> None:
        """SIGKILL its first process, with which the kernel ends all others; wait until it is dead."""
        if self._code is not None or self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signal.SIGKILL)
        if not _has_ended(self._process, _KILL_WAIT_S):
            raise ContainerError(
                f"container {self.container[:12]} did not end within {_KILL_WAIT_S:g} s of SIGKILL",
                hint="Look for a process in uninterruptible sleep.",
            )

    def close(self) -> None:
        """Remove the container."""
        for process in (self._process, self._monitor):
            if process is not None:
                os.close(process)
        self._process = self._monitor = None
        _remove(self._podman, self.container)

    def early_output(self) -> str:
        """What PID 1 said before it opened its own log."""
        done = self._podman.run("logs", self.container)  # with --tail podman 4.3 loses lines that came in pieces
        return "".join((done.stdout + done.stderr).splitlines(keepends=True)[-50:])

    def out_of_memory(self) -> bool:
        """True when podman says so, or conmon: under cgroups v1 it leaves its word where it was started, unread."""
        return bool(self._podman.state(self.container).get("OOMKilled")) or (self._scratch / "oom").exists()

    def describe(self) -> dict[str, object]:
        """The container's id."""
        return {"runtime": "podman", "container": self.container}


def _open_process(pid: int) -> int | None:
    """A descriptor of a process (pidfd_open(2)), None when it has ended; a bare pid might be another's later."""
    try:
        return os.pidfd_open(pid) if pid > 0 else None
    except ProcessLookupError:
        return None


def _has_ended(process: int | None, timeout_s: float) -> bool:
    if process is None:
        return True
    watch = select.poll()
    watch.register(process, select.POLLIN)
    return bool(watch.poll(timeout_s * 1000))


def _remove(podman: Podman, container: str) -> None:
    """End and remove a container; that somebody else has done so is fine."""
    podman.ask("rm", "--force", "--time=0", "--ignore", "--volumes", container)


class PodmanRuntime:
    """podman of this node, as root or rootless."""

    name = "podman"

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        if not hasattr(os, "pidfd_open"):
            raise ContainerError(
                "this Python was built without pidfd_open(2), by which podman's containers are watched",
                hint="Use another interpreter for the agents (`slurm.python`), or container.runtime: docker.",
            )
        self._podman = Podman(environ)

    def remove_leftovers(self, run_dir: str, node: str, before_attempt: int) -> Sequence[str]:
        """Containers of this run, this node and an older attempt: an agent that died badly leaves one behind."""
        try:
            old = [
                found.id
                for found in self.labelled()
                if (found.run_dir, found.node) == (run_dir, node) and found.attempt < before_attempt
            ]
            for container in old:
                _remove(self._podman, container)
        except ContainerError as error:
            raise ContainerError(
                f"a container of an older attempt of {run_dir} cannot be removed: {error.message}",
                hint="Two attempts must not run at once. Remove it by hand: podman rm --force",
            ) from error
        return old

    def prepare(self, request: PayloadRequest) -> None:
        """Pull the image."""
        self.ensure_image(request.image or "")

    def start(self, request: PayloadRequest) -> Payload:
        """Create and start the container; a failure names the image, the mount or the entrypoint."""
        # Of a container that has ended already, podman itself no longer tells conmon's pid.
        monitored = f"--conmon-pidfile={request.scratch / _PIDFILE}"
        arguments = create_arguments(request, rootless=os.geteuid() != 0)
        done = self._podman.run("create", monitored, *arguments, timeout_s=_PULL_S)  # rootless: may copy the image
        if done.returncode != 0:
            raise start_error(self.name, request, words_of(done.stderr))
        container = done.stdout.split()[-1]
        try:
            done = self._podman.run("start", container, cwd=request.scratch)
            if done.returncode != 0:
                raise start_error(self.name, request, words_of(done.stderr))
            return PodmanPayload(self._podman, container, request.scratch)
        except BaseException as error:
            try:
                _remove(self._podman, container)
            except ContainerError as second:  # must not hide the first
                error.add_note(f"and it could not be removed: {second.message}")
            raise

    def about(self) -> About:
        """Version and store of this node's podman."""
        info = json.loads(self._podman.ask("info", "--format=json"))
        return About(f"podman {info['version']['Version']}", str(info["store"]["graphRoot"]))

    def labelled(self) -> Sequence[Labelled]:
        """See Engine.labelled; of this user's store. Compared here: podman reads a filter's value as CSV."""
        entries = json.loads(self._podman.ask("ps", "--all", f"--filter=label={LABEL_RUN}", "--format=json") or "[]")
        found = [Labelled.of(str(e["Id"]), e["Labels"], running=e["State"] == "running") for e in entries]
        return [labelled for labelled in found if labelled is not None]

    def has_image(self, image: str) -> bool:
        """Whether this node has it. Raises ContainerError."""
        done = self._podman.run("image", "exists", image)
        if done.returncode not in (0, 1):
            raise ContainerError(
                f"podman cannot say whether it has {image}: {words_of(done.stderr)}",
                hint="Look at podman on this machine: `podman info`.",
            )
        return done.returncode == 0

    def ensure_image(self, image: str, report: PullReport | None = None) -> None:
        """Pull a digest-pinned image that this node does not have yet; podman does not say how far it is."""
        if self.has_image(image):
            return
        require_registry(image)
        self._pull(image)

    def _layers(self) -> Path:
        """Where layers are while they come: podman's own word, because TMPDIR overrides a site's containers.conf."""
        info = json.loads(self._podman.ask("info", "--format=json"))
        return Path(info["store"].get("imageCopyTmpDir") or "/var/tmp")

    @retried
    def _pull(self, image: str) -> None:
        with scratch_directory(self._layers()) as scratch:
            done = self._podman.run("pull", "--quiet", image, timeout_s=_PULL_S, environ={"TMPDIR": str(scratch)})
        if done.returncode != 0 or not self.has_image(image):  # one that is told to stop leaves with 0 (4.3)
            raise pull_error(self.name, image, words_of(done.stderr) or "podman left before it had come")


def create_arguments(request: PayloadRequest, *, rootless: bool) -> list[str]:
    """Arguments of podman-create(1): pure, and nothing secret in it (it shows in `ps` and `inspect`)."""
    uid, gid = os.getuid(), os.getgid()
    labels = {
        LABEL_RUN: request.run_id,
        LABEL_DIRECTORY: request.run_dir,
        LABEL_ATTEMPT: str(request.attempt),
        LABEL_NODE: request.node,
    }
    environment = {**request.environ, "HOME": "/tmp/home", "USER": f"uid{uid}", "LOGNAME": f"uid{uid}"}
    arguments = [
        "--pull=never",
        "--http-proxy=false",  # else the host's variables are copied into it, with their passwords
        f"--workdir={request.cwd}",
        f"--user={uid}:{gid}",
        f"--network={'host' if request.host_network else 'private' if rootless else 'bridge'}",
        "--tmpfs=/tmp/home:mode=1777",  # without a passwd entry HOME would be `/`
        "--log-driver=k8s-file",
        "--log-opt=max-size=1mb",
        f"--entrypoint={json.dumps([request.argv[0]])}",
    ]
    if rootless:
        # The user is the same one inside; supplementary groups, which own shared directories, stay (crun).
        arguments += ["--userns=keep-id", "--group-add=keep-groups"]
    else:
        arguments += [f"--group-add={group}" for group in os.getgroups() if group != gid]
    arguments += [f"--label={name}={value}" for name, value in labels.items()]
    arguments += [f"--env={name}={value}" for name, value in environment.items()]
    arguments += [f"--ulimit={name}={limit}:{limit}" for name, limit in request.limits.items()]
    for mount in request.mounts:
        arguments += ["--mount", _mount(mount)]
    if request.mem_bytes is not None:
        # podman's own 64 MiB of shared memory break DataLoader batches; it counts as memory.
        arguments += [
            f"--memory={request.mem_bytes}b",
            f"--memory-swap={request.mem_bytes}b",
            f"--shm-size={request.mem_bytes // 2}b",
        ]
    arguments += [f"--device={device}" for device in request.devices]
    arguments += [f"--device=nvidia.com/gpu={gpu}" for gpu in request.gpus]  # CDI: exactly the ones Slurm gave
    if request.cpuset:
        arguments.append(f"--cpuset-cpus={request.cpuset}")
    if request.cpus is not None:
        arguments.append(f"--cpus={min(request.cpus, os.cpu_count() or request.cpus)}")
    return [*arguments, str(request.image), *request.argv[1:]]


def exec_command(container: str, argv: Sequence[str], *, terminal: bool) -> list[str]:
    """A command beside PID 1, with our own standard streams (podman-exec(1))."""
    options = ["--interactive", *(["--tty"] if terminal else []), f"--user={os.getuid()}:{os.getgid()}"]
    options += [f"--env=TERM={os.environ.get('TERM', 'dumb')}"]
    return ["podman", "exec", *options, container, *argv]


def _mount(mount: Mount) -> str:
    """--mount is read as CSV, so every character of a path survives in quotes; `--volume` splits at colons."""
    fields = ["type=bind", f"source={mount.source}", f"target={mount.target}"]
    if mount.read_only:
        fields.append("readonly=true")
    return ",".join('"' + field.replace('"', '""') + '"' for field in fields)

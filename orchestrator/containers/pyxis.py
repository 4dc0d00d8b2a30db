"""Runtime `pyxis` (experimental): what Slurm's plugin of that name does with enroot, done by the agent.

The plugin starts containers as steps of their own, and a step below the agent's ends at Slurm's first signal, without a
save (docs/decisions/0022). So the image is unpacked (`enroot create`) and PID 1 started in it (`enroot start`) as a
child of the agent. An image that is started without being unpacked would live by two FUSE processes of the step, which
Slurm signals as well. All of it follows enroot's documentation; nobody has run it on a real one yet.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.containers.failures import full_store
from orchestrator.containers.image_cache import image_path
from orchestrator.containers.payload import Mount, Payload, PayloadRequest
from orchestrator.containers.process import run_client, spawn, words_of
from orchestrator.errors import ContainerError
from orchestrator.spec.images import mount_refusal

_CREATE_S = 1800.0  # unpacks gigabytes
_COMMAND_S = 300.0
_REMOVE_S = 15.0  # at the end, when a save may have left little time; the next attempt removes what is left
_COMMAND_SCRIPT = '#!/bin/sh\nexec "$@"\n'


class PyxisRuntime:
    """enroot of this node."""

    name = "pyxis"

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ

    def remove_leftovers(self, run_dir: str, node: str, before_attempt: int) -> Sequence[str]:
        """File systems of older attempts; their processes have ended with their agent (by the leash).

        One that cannot be removed takes room and nothing else.
        """
        before = container_name(run_dir, node, 0)[: -len("0")]
        names = self._ask("list").split()
        attempts = {name: name.removeprefix(before) for name in names if name.startswith(before)}
        old = [name for name, attempt in attempts.items() if attempt.isdigit() and int(attempt) < before_attempt]
        return [name for name in old if self._removed(name)]

    def _removed(self, name: str) -> bool:
        try:
            self._ask("remove", "--force", name)
        except ContainerError as error:
            print(f"orch: {error}", file=sys.stderr, flush=True)
            return False
        return True

    def prepare(self, request: PayloadRequest) -> None:
        """Import the image, or compare the pinned file; then unpack it."""
        for mount in request.mounts:
            if reason := mount_refusal(mount.source, self.name) or mount_refusal(mount.target, self.name):
                raise ContainerError(reason, hint="Take another root or workspace, or another runtime.")
        path = image_path(request, self.name, self._environ, verify=request.verify_image)
        name = container_name(request.run_dir, request.node, request.attempt)
        try:
            self._ask("create", f"--name={name}", str(path), timeout_s=_CREATE_S)
        except ContainerError:
            self._removed(name)  # half of one fills the disk as well
            raise

    def start(self, request: PayloadRequest) -> Payload:
        """Start PID 1 in what has been unpacked."""
        name = container_name(request.run_dir, request.node, request.attempt)
        try:
            script = request.scratch / "rc"
            script.write_text(_COMMAND_SCRIPT)
            environ = {**self._environ, **environment(request), "ENROOT_LOGIN_SHELL": "no"}
            hint = "Install enroot on the compute nodes, or use another runtime."
            child = spawn("enroot", start_command(request, name, script), request, environ, hint)
        except BaseException:
            self._removed(name)
            raise
        return PyxisPayload(self, child, name)

    def remove(self, name: str) -> None:
        """Remove an unpacked image, if that is soon done. Raises ContainerError."""
        self._ask("remove", "--force", name, timeout_s=_REMOVE_S)

    def _ask(self, *arguments: str, timeout_s: float = _COMMAND_S) -> str:
        hint = "Look at the disk of ENROOT_DATA_PATH on that node."
        done = run_client(["enroot", *arguments], environ=self._environ, timeout_s=timeout_s, hint=hint)
        if done.returncode != 0:
            words = words_of(done.stderr)
            raise full_store("enroot", words) or ContainerError(f"enroot {arguments[0]}: {words}", hint=hint)
        return done.stdout


class PyxisPayload:
    """PID 1 as a child, and the unpacked image that goes with it."""

    def __init__(self, runtime: PyxisRuntime, child: Payload, name: str) -> None:
        self._runtime = runtime
        self._child = child
        self._name = name

    def poll(self) -> int | None:
        """See Payload.poll."""
        return self._child.poll()

    def kill(self) -> None:
        """See Payload.kill."""
        self._child.kill()

    def close(self) -> None:
        """Remove the unpacked image."""
        self._runtime.remove(self._name)

    def early_output(self) -> str:
        """Nothing: it went to the node's log."""
        return self._child.early_output()

    def out_of_memory(self) -> bool:
        """No engine that could say; PID 1's own report is all there is."""
        return self._child.out_of_memory()

    def describe(self) -> dict[str, object]:
        """pid of the child, and the name by which enroot knows the image."""
        return {**self._child.describe(), "runtime": "pyxis", "container": self._name}


def container_name(run_dir: str, node: str, attempt: int) -> str:
    """Unique where two nodes have one ENROOT_DATA_PATH; enroot's names are those of directories (pure)."""
    return f"orch-{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:16]}-{node}-{attempt}"


def environment(request: PayloadRequest) -> dict[str, str]:
    """What travels into the container by name. The GPUs are asked for even if there are none: images say `all`.

    HOME is the container's /tmp, which is memory: enroot sets none where it runs no login shell.
    """
    devices = ",".join(request.gpus) or "void"
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(request.gpus)} if request.gpus else {}
    return {"HOME": "/tmp", **request.environ, **visible, "NVIDIA_VISIBLE_DEVICES": devices}


def start_command(request: PayloadRequest, name: str, script: Path) -> list[str]:
    """Pure. `--rc` takes the place of the image's own entrypoint; values travel beside the list, by `--env NAME`."""
    command = ["enroot", "start", "--rw", f"--rc={script}"]
    for variable in environment(request):
        command += ["--env", variable]
    for mount in request.mounts:
        command += ["--mount", _mount(mount)]
    return [*command, name, *_in_directory(request.cwd, request.argv)]


def _in_directory(directory: str, argv: Sequence[str]) -> list[str]:
    """enroot has no option for the working directory."""
    return ["/bin/sh", "-c", 'cd "$0" && exec "$@"', directory, *argv]


def _mount(mount: Mount) -> str:
    """Fields of an fstab(5) line, with colons between them."""
    options = f"x-create=auto,rbind,{'ro' if mount.read_only else 'rw'},nosuid,nodev"
    return f"{mount.source}:{mount.target}:none:{options}"

"""Runtime `apptainer` (experimental): PID 1 below `apptainer exec`, in the step's own process tree.

Slurm limits memory, CPUs and devices of the whole tree, so nothing of that is asked of apptainer. What is asked follows
apptainer-exec(1) and its guide on bind mounts; nobody has run it on a real one yet (docs/containers.md).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from orchestrator.containers.image_cache import image_path
from orchestrator.containers.payload import Mount, Payload, PayloadRequest
from orchestrator.containers.process import spawn
from orchestrator.errors import ContainerError

_INSIDE = "APPTAINERENV_"  # a variable of this prefix is one without it inside, whatever it holds


class ApptainerRuntime:
    """apptainer of this node."""

    name = "apptainer"

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ

    def remove_leftovers(self, run_dir: str, node: str, before_attempt: int) -> Sequence[str]:
        """Nothing to do: without its agent a payload ends by its leash."""
        return ()

    def prepare(self, request: PayloadRequest) -> None:
        """Import the image, or compare the pinned file."""
        if request.scratch.is_relative_to("/dev"):
            raise ContainerError(
                f"apptainer cannot mount {request.scratch} into a container that has a /dev of its own",
                hint="Set ORCH_NODE_DIR to a node-local directory outside /dev in `slurm.setup`, such as $TMPDIR.",
            )
        image_path(request, self.name, self._environ, verify=request.verify_image)

    def start(self, request: PayloadRequest) -> Payload:
        """Start PID 1 in a container as a child."""
        path = image_path(request, self.name, self._environ, verify=False)
        hint = "Install apptainer on the compute nodes (a module in `slurm.setup`), or use another runtime."
        environ = {**self._environ, **environment(request)}
        return spawn(self.name, exec_command(request, str(path)), request, environ, hint)


def environment(request: PayloadRequest) -> dict[str, str]:
    """What travels into the container: as variables, because `--env` splits values at commas."""
    inside = {**request.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(request.gpus)} if request.gpus else {})}
    return {f"{_INSIDE}{name}": value for name, value in inside.items()}


def exec_command(request: PayloadRequest, path: str) -> list[str]:
    """Pure. `--containall` keeps the host's home and environment out; /tmp is the step's, for its size."""
    command = ["apptainer", "exec", "--containall", "--no-eval", f"--pwd={request.cwd}"]
    if request.gpus:
        command.append("--nv")
    mounts = [Mount("/tmp", "/tmp"), *(Mount(device, device) for device in request.devices), *request.mounts]
    for mount in mounts:
        command += ["--mount", _mount(mount)]
    return [*command, path, *request.argv]


def _mount(mount: Mount) -> str:
    """--mount is read as CSV, so every character of a path survives in quotes; `--bind` splits at colons."""
    fields = ["type=bind", f"source={mount.source}", f"destination={mount.target}"]
    if mount.read_only:
        fields.append("ro")
    return ",".join('"' + field.replace('"', '""') + '"' for field in fields)

"""Runtime `docker`, through the engine's API.

Never through a client process: Slurm's signals hit the whole step, and docker's client leaves its container running
when it is signalled three times (FACTS 4).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from orchestrator.containers.process import stop_signals_held
from orchestrator.errors import ContainerError

if TYPE_CHECKING:
    import docker

_API_TIMEOUT_S = 20
_ENGINE_LOST_S = 60  # an engine that restarts is back well within this; containers run on meanwhile (FACTS 4)
_KILL_WAIT_S = 20
_PULL_S = 1800


def connect(environ: Mapping[str, str] = os.environ, *, timeout_s: int = _API_TIMEOUT_S) -> docker.DockerClient:
    """A client of the engine that DOCKER_HOST or the default socket names; ContainerError when none answers."""
    import docker
    import docker.errors
    import requests

    try:
        client = docker.from_env(timeout=timeout_s, environment=dict(environ))
        client.ping()
        return client
    except (docker.errors.DockerException, requests.RequestException, OSError) as error:
        where = environ.get("DOCKER_HOST", "its default socket")
        raise ContainerError(
            f"no container engine answers at {where}: {_words(error)}",
            hint="Start docker, set DOCKER_HOST, or use `container.runtime: none`.",
        ) from error


def _words(error: BaseException) -> str:
    explanation = getattr(error, "explanation", None)
    return str(explanation or error)


def _remove(container: Any) -> None:
    """End and remove a container; that somebody else is doing so is fine. Raises what the SDK raises."""
    import docker.errors

    with contextlib.suppress(docker.errors.NotFound):
        try:
            container.remove(force=True, v=True)
        except docker.errors.APIError as error:
            if error.status_code != 409:  # 409: its removal is in progress
                raise
            container.wait(timeout=_KILL_WAIT_S, condition="removed")


class DockerPayload:
    """A container, watched by a thread so that `poll` never blocks on the engine."""

    def __init__(self, container: Any) -> None:
        self._container = container
        self._code: int | None = None
        self._lost: ContainerError | None = None
        self._watcher = threading.Thread(target=self._watch, name="docker-wait", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        """Wait for the end. A lost engine is not an ended container: ask again until it is back or given up."""
        import docker.errors
        import requests

        lost_since: float | None = None
        while True:
            try:
                self._code = int(self._container.wait(timeout=_API_TIMEOUT_S)["StatusCode"])
                return
            except requests.exceptions.ReadTimeout:
                lost_since = None
                continue
            except docker.errors.NotFound:
                self._code = SIGKILLED  # removed from outside
                return
            except (docker.errors.DockerException, requests.RequestException) as error:
                if "timed out" in str(error).lower():  # some transports wrap the read time-out
                    lost_since = None
                    continue
                now = time.monotonic()
                lost_since = lost_since if lost_since is not None else now
                if now - lost_since > _ENGINE_LOST_S:
                    self._lost = ContainerError(
                        f"the container engine has not answered for {_ENGINE_LOST_S} s: {_words(error)}",
                        hint="The container is told to end by its leash. Look at the engine on this node.",
                    )
                    return
                time.sleep(0.5)

    def poll(self) -> int | None:
        """Exit code once ended, else None; ContainerError when the engine stays away."""
        if self._lost is not None:
            raise self._lost
        return self._code

    def kill(self) -> None:
        """SIGKILL and wait until the engine says it is dead."""
        import docker.errors

        if self._code is not None:
            return
        try:
            self._container.kill()
        except docker.errors.NotFound:
            pass  # it has ended and was removed
        except docker.errors.APIError as error:
            if error.status_code != 409:  # 409: it is not running any more
                raise ContainerError(f"the container engine refused: {_words(error)}") from error
        self._watcher.join(timeout=_KILL_WAIT_S)
        if self._code is None:
            raise ContainerError(
                f"container {self._container.id[:12]} did not end within {_KILL_WAIT_S} s of SIGKILL",
                hint="Look for a process in uninterruptible sleep, and at the engine's log.",
            )

    def close(self) -> None:
        """Remove the container."""
        import requests

        try:
            _remove(self._container)
        except requests.RequestException as error:  # docker's APIError is one
            raise ContainerError(f"cannot remove container {self._container.id[:12]}: {_words(error)}") from error

    def early_output(self) -> str:
        """What PID 1 said before it opened its own log."""
        return str(self._container.logs(tail=50).decode(errors="replace"))

    def out_of_memory(self) -> bool:
        """The engine's OOMKilled, true also where a child was killed; it knows of a killed PID 1, too."""
        import requests

        try:
            self._container.reload()
        except requests.RequestException as error:  # docker's APIError is one
            raise ContainerError(f"cannot inspect container {self._container.id[:12]}: {_words(error)}") from error
        return bool(self._container.attrs["State"].get("OOMKilled"))

    def describe(self) -> dict[str, object]:
        """The container's id."""
        return {"runtime": "docker", "container": self._container.id}


class DockerRuntime:
    """The docker engine of this node."""

    name = "docker"

    def __init__(self, client: docker.DockerClient | None = None) -> None:
        self._client = client if client is not None else connect()

    def remove_leftovers(self, run_dir: str, node: str, before_attempt: int) -> Sequence[str]:
        """Containers of this run, this node and an older attempt: an agent that died badly leaves one behind."""
        import requests

        labels = [f"{LABEL_DIRECTORY}={run_dir}", f"{LABEL_NODE}={node}"]
        removed = []
        try:
            # Without ignore_removed one that ends while we look would hide the others.
            for container in self._client.containers.list(all=True, filters={"label": labels}, ignore_removed=True):
                if int(container.labels[LABEL_ATTEMPT]) < before_attempt:
                    _remove(container)
                    removed.append(str(container.id))
        except requests.RequestException as error:  # docker's APIError is one
            raise ContainerError(
                f"a container of an older attempt of {run_dir} cannot be removed: {_words(error)}",
                hint="Two attempts must not run at once. Remove it by hand: docker rm -f",
            ) from error
        return removed

    def prepare(self, request: PayloadRequest) -> None:
        """Pull the image; a pull that is given up leaves its layers for the next one."""
        self.ensure_image(request.image or "")

    def start(self, request: PayloadRequest) -> Payload:
        """Create and start the container; a failure names the image, the mount or the entrypoint."""
        import requests

        try:
            container = self._client.containers.create(**container_options(request))
            try:
                container.start()
            except BaseException as error:  # an answer that came too late included: then it runs
                try:
                    _remove(container)
                except requests.RequestException as second:  # must not hide the first
                    error.add_note(f"and it could not be removed: {_words(second)}")
                raise
        except requests.RequestException as error:  # docker's APIError is one
            raise start_error(self.name, request, _words(error)) from error
        return DockerPayload(container)

    def about(self) -> About:
        """Version and store of the engine."""
        import requests

        try:
            info = self._client.info()
        except requests.RequestException as error:  # docker's APIError is one
            raise ContainerError(f"the container engine answers with an error: {_words(error)}") from error
        return About(str(info.get("ServerVersion", "")), str(info.get("DockerRootDir", "")))

    def labelled(self) -> Sequence[Labelled]:
        """All containers of runs on this node, whoever's."""
        import requests

        try:
            found = self._client.containers.list(all=True, filters={"label": LABEL_RUN}, ignore_removed=True)
        except requests.RequestException as error:  # docker's APIError is one
            raise ContainerError(f"the container engine answers with an error: {_words(error)}") from error
        made = [Labelled.of(str(c.id), c.labels, running=c.status == "running") for c in found]
        return [labelled for labelled in made if labelled is not None]

    def has_image(self, image: str) -> bool:
        """Whether this node has it. Raises ContainerError."""
        import docker.errors
        import requests

        try:
            self._client.images.get(image)
        except docker.errors.ImageNotFound:
            return False
        except requests.RequestException as error:
            raise ContainerError(
                f"the container engine cannot say whether it has {image}: {_words(error)}",
                hint="Look at the engine on this machine: `docker info`.",
            ) from error
        return True

    def ensure_image(self, image: str, report: PullReport | None = None) -> None:
        """Pull a digest-pinned image that this node does not have yet."""
        if self.has_image(image):
            return
        require_registry(image)
        self._pull(image, report)

    @retried
    def _pull(self, image: str, report: PullReport | None) -> None:
        """In a thread: the SDK waits for the engine's next word without a limit."""
        failed: list[str] = []
        pulling = threading.Thread(
            target=self._read_pull, args=(image, report, failed), name="docker-pull", daemon=True
        )
        with stop_signals_held():  # for good in this thread: signals are the agent's, also the next attempt's
            pulling.start()
        pulling.join(_PULL_S)
        if pulling.is_alive():
            failed.append(f"it has not come within {_PULL_S} s")
        if failed:
            raise pull_error(self.name, image, failed[0])
        if not self.has_image(image):
            raise pull_error(self.name, image, "the engine says that it is done, and does not have it")

    def _read_pull(self, image: str, report: PullReport | None, failed: list[str]) -> None:
        """What goes wrong once the answer has begun comes as a line of it, which the SDK's own `pull` drops."""
        import docker.errors
        import requests

        layers = Layers()
        try:
            for line in self._client.api.pull(image, stream=True, decode=True):
                if "error" in line:
                    failed.append(str(line["error"]))
                    return
                if report is not None and (more := layers.more(line)):
                    report(more, layers.total + 1)
            if report is not None:
                report(1, 1)  # unpacked as well; until then there is something left to do
        except (requests.RequestException, docker.errors.DockerException, ValueError) as error:
            failed.append(_words(error))


class Layers:
    """How much of an image's layers has come, from the lines of a pull."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[int, int]] = {}
        self._told = 0

    @property
    def total(self) -> int:
        """Bytes of the layers that have begun."""
        return sum(total for _, total in self._of.values())

    def more(self, line: Mapping[str, Any]) -> int:
        """Bytes that have come since the line before."""
        detail = line.get("progressDetail") or {}
        if line.get("status") == "Downloading" and detail.get("total"):
            self._of[str(line.get("id"))] = (int(detail.get("current", 0)), int(detail["total"]))
        elif line.get("status") == "Download complete" and (known := self._of.get(str(line.get("id")))):
            self._of[str(line.get("id"))] = (known[1], known[1])
        come = sum(current for current, _ in self._of.values())
        more, self._told = come - self._told, max(come, self._told)
        return max(0, more)


def container_options(request: PayloadRequest) -> dict[str, Any]:
    """Keyword arguments of the SDK's `containers.create`: pure, and nothing secret in it (it shows in `inspect`)."""
    uid, gid = os.getuid(), os.getgid()
    options: dict[str, Any] = {
        "image": request.image,
        "entrypoint": list(request.argv),  # also silences the image's own ENTRYPOINT and CMD
        "working_dir": request.cwd,
        "user": f"{uid}:{gid}",
        "group_add": [str(group) for group in os.getgroups() if group != gid],
        "environment": {**request.environ, "HOME": "/tmp/home", "USER": f"uid{uid}", "LOGNAME": f"uid{uid}"},
        "labels": {
            LABEL_RUN: request.run_id,
            LABEL_DIRECTORY: request.run_dir,
            LABEL_ATTEMPT: str(request.attempt),
            LABEL_NODE: request.node,
        },
        # type=bind through the API: a missing source is an error instead of a directory owned by root, and no
        # character of the path has a meaning (`-v` splits at colons).
        "mounts": [_mount(mount) for mount in request.mounts],
        "tmpfs": {"/tmp/home": f"mode=0700,uid={uid},gid={gid}"},  # without a passwd entry HOME would be `/`
        "ulimits": [{"name": name, "soft": limit, "hard": limit} for name, limit in request.limits.items()],
        "devices": [f"{device}:{device}:rwm" for device in request.devices],
        "network_mode": "host" if request.host_network else "bridge",
        "init": False,
        "detach": True,
        "stdin_open": False,
        "log_config": {"type": "json-file", "config": {"max-size": "1m"}},
    }
    if request.mem_bytes is not None:
        options["mem_limit"] = request.mem_bytes
        options["memswap_limit"] = request.mem_bytes
        options["shm_size"] = request.mem_bytes // 2  # docker's 64 MiB break DataLoader batches; it counts as memory
    if request.gpus:
        # Exactly the ones Slurm gave; `count` would take the first ones of the node, which may be somebody else's.
        options["device_requests"] = [
            {"Driver": "", "Count": 0, "DeviceIDs": list(request.gpus), "Capabilities": [["gpu"]], "Options": {}}
        ]
    if request.cpuset:
        options["cpuset_cpus"] = request.cpuset
    if request.cpus is not None:
        options["nano_cpus"] = min(request.cpus, os.cpu_count() or request.cpus) * 10**9
    return options


def _mount(mount: Mount) -> dict[str, Any]:
    return {"Type": "bind", "Source": mount.source, "Target": mount.target, "ReadOnly": mount.read_only}

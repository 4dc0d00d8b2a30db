"""Images of a registry as files: imported once, under their digest, into a directory that every node sees."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.containers.failures import pull_error, retried
from orchestrator.containers.image_file import difference, file_of, sha256_of
from orchestrator.containers.payload import PayloadRequest
from orchestrator.containers.process import run_client, scratch_directory, words_of
from orchestrator.errors import ContainerError, RegistryError
from orchestrator.files import fsync_dir, read_json, write_json
from orchestrator.spec.images import digest_of, file_pin, repository_of

_TEMPORARY = {"apptainer": "APPTAINER_TMPDIR", "pyxis": "ENROOT_TEMP_PATH"}  # of their layers, on this node; or TMPDIR
SUFFIXES = {"apptainer": ".sif", "pyxis": ".sqsh"}
_IMPORT_S = 3600.0
_WAIT_S = 4500.0  # for somebody else's import, whose tries may begin two minutes late
_LOCK_LOOK_S = 0.5
_NAME = re.compile(r"[0-9a-f]{64}\.(sif|sqsh)")
_DOCKER_HUB = "docker.io"


@dataclass(frozen=True)
class CachedImage:
    """A file of the cache. It counts once it has its description, which is written last."""

    path: Path
    image: str  # the pin it was first imported for; "" without a description
    sha256: str  # of the file
    size_bytes: int
    used_at: float  # seconds since the epoch

    @property
    def description(self) -> Path:
        """What is known of it, beside it."""
        return self.path.with_name(self.path.name + ".json")

    @property
    def digest(self) -> str:
        """Of the image, by which it is found; two repositories may have the same."""
        return self.path.stem

    def problem(self) -> str | None:
        """Why its bytes are not the ones that were imported; the file is read whole."""
        if not self.sha256:
            return "its import was cut short, or its description is damaged"
        return difference(self.path, self.sha256)


class ImageCache:
    """The imported images of a root. Every node, and `orch image pull`, may ask for the same one at once."""

    def __init__(self, directory: Path, environ: Mapping[str, str] = os.environ) -> None:
        self.directory = directory
        self._environ = environ

    def path(self, image: str, runtime: str) -> Path:
        """Where the file of a pin is, or will be."""
        return self.directory / f"{digest_of(image)}{SUFFIXES[runtime]}"

    def find(self, image: str, runtime: str) -> CachedImage | None:
        """The imported image of a pin; None where there is none that is whole."""
        entry = _entry(self.path(image, runtime))
        return entry if entry is not None and entry.sha256 else None

    def fetch(self, image: str, runtime: str, *, verify: bool = False) -> CachedImage:
        """The imported image of a pin; the first to ask imports it, the others wait.

        With `verify` it is read whole, and imported again where it is damaged. Raises ContainerError.
        """
        path = self.path(image, runtime)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with _waiting(path, fcntl.LOCK_SH):  # many may read at once
                if (found := self._usable(image, runtime, verify)) is not None:
                    return found
            with _waiting(path, fcntl.LOCK_EX):
                return self._usable(image, runtime, verify) or self._import(image, runtime)
        except OSError as error:
            raise ContainerError(
                f"cannot keep {image} in {self.directory}: {error.strerror or error}",
                hint="It must be a directory that you can write to, with room for the image.",
            ) from error

    def _usable(self, image: str, runtime: str, verify: bool) -> CachedImage | None:
        found = self.find(image, runtime)
        if found is None or (verify and found.problem() is not None):
            return None
        with contextlib.suppress(OSError):  # somebody else's, or a disk that is mounted read-only
            os.utime(found.description)
        return found

    def entries(self) -> list[CachedImage]:
        """Every file there is, whole or not, least recently used first."""
        try:
            paths = [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        return sorted(filter(None, map(_entry, paths)), key=lambda entry: entry.used_at)

    def remove(self, entry: CachedImage) -> bool:
        """Take a file out, unless somebody reads or imports it, or has used it since `entry` was read."""
        try:
            with _locked(entry.path, fcntl.LOCK_EX, wait_s=0):
                now = _entry(entry.path)
                if now is not None and now.used_at > entry.used_at:
                    return False
                entry.description.unlink(missing_ok=True)
                entry.path.unlink(missing_ok=True)
                return True
        except (BlockingIOError, PermissionError):
            return False

    def _import(self, image: str, runtime: str) -> CachedImage:
        path = self.path(image, runtime)
        with scratch_directory(self.directory) as scratch:
            partial = scratch / path.name
            self._run(image, runtime, partial)
            digest, size = sha256_of(partial), _made_durable(partial)
            partial.replace(path)
            fsync_dir(self.directory)
            write_json(_description(path), {"image": image, "sha256": digest, "size_bytes": size})
        return CachedImage(path, image, digest, size, time.time())

    @retried
    def _run(self, image: str, runtime: str, partial: Path) -> None:
        partial.unlink(missing_ok=True)  # of a try that failed
        command, layers = import_command(image, runtime, partial), str(partial.with_name("layers"))
        # Where the site says nothing, both would keep layers in the home directory. enroot.conf wins over the second.
        own = {"APPTAINER_CACHEDIR": layers, "XDG_CACHE_HOME": layers}
        hint = f"Import it beforehand where there is a network:  orch image pull {image} --runtime {runtime}"
        # Only what is in the environment anyway is replaced by its name: it would win over a site's enroot.conf.
        variable = _TEMPORARY[runtime] if self._environ.get(_TEMPORARY[runtime]) else "TMPDIR"
        parent = self._environ.get(variable) or "/tmp"
        with scratch_directory(Path(parent)) as temporary:
            environ = {**own, **self._environ, variable: str(temporary)}
            done = run_client(command, environ=environ, timeout_s=_IMPORT_S, hint=hint)
        if done.returncode != 0:
            words = words_of(done.stderr) or f"{command[0]} ended with exit code {done.returncode}"
            raise pull_error(command[0], image, words)


def image_path(request: PayloadRequest, runtime: str, environ: Mapping[str, str], *, verify: bool) -> Path:
    """The file to start: the pinned one, or the imported one of a pin in a registry. Raises ContainerError.

    With `verify` it is read whole.
    """
    image = request.image or ""
    if file_pin(image) is not None:
        return file_of(image, node=request.node, verify=verify)
    return ImageCache(request.images, environ).fetch(image, runtime, verify=verify).path


def import_command(image: str, runtime: str, target: Path) -> list[str]:
    """What makes a file of a registry's image (apptainer-pull(1), enroot's `import`): pure."""
    digest = digest_of(image)
    if runtime == "apptainer":
        return ["apptainer", "pull", str(target), f"docker://{repository_of(image)}@sha256:{digest}"]
    registry, repository = _split_registry(repository_of(image))
    # enroot reads `repository@…` as a user; with a colon the digest stands where a tag would (FACTS 4).
    where = f"{registry}#{repository}" if registry else repository
    return ["enroot", "import", f"--output={target}", f"docker://{where}:sha256:{digest}"]


def _split_registry(repository: str) -> tuple[str, str]:
    """`ghcr.io/lab/train` → its registry and the rest; Docker Hub, the default, as "" (the distribution reference
    grammar)."""
    first, slash, rest = repository.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        return "", repository if slash else f"library/{repository}"
    return ("" if first == _DOCKER_HUB else first), rest


def _description(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _entry(path: Path) -> CachedImage | None:
    """None without a file. One that was cut short, or whose description is damaged, has no hash."""
    try:
        about = path.stat()
        try:
            said = read_json(_description(path))
            whole = CachedImage(
                path, str(said["image"]), str(said["sha256"]), about.st_size, _description(path).stat().st_mtime
            )
            if said["size_bytes"] == about.st_size:
                return whole
        except (FileNotFoundError, RegistryError, KeyError, TypeError):
            pass
        return CachedImage(path, "", "", about.st_size, about.st_mtime)
    except FileNotFoundError:
        return None


def _made_durable(path: Path) -> int:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


@contextlib.contextmanager
def _waiting(path: Path, kind: int) -> Iterator[None]:
    try:
        with _locked(path, kind, wait_s=_WAIT_S):
            yield
    except BlockingIOError as error:
        raise ContainerError(
            f"{path.name} has been in somebody else's hands for {_WAIT_S:g} s",
            hint=f"If nobody imports it: remove {_lock(path)} and try again.",
        ) from error


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def _locked(path: Path, kind: int, *, wait_s: float) -> Iterator[None]:
    """Raises BlockingIOError when somebody else has held it all the time.

    A lock of fcntl(2), which NFS knows between machines and which ends with its holder. Where there are none, two
    may import at once: each gives its own file the same name, whole.
    """
    try:
        descriptor = os.open(_lock(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if kind != fcntl.LOCK_SH or error.errno not in (errno.EACCES, errno.EROFS):
            raise
        yield  # another user's cache: what is whole may be read
        return
    until = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= until:
                    raise BlockingIOError(f"{path} is locked") from None
                time.sleep(_LOCK_LOOK_S)
            except OSError:  # no locks on this file system
                break
        yield
    finally:
        os.close(descriptor)

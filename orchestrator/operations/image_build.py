"""`image build`: an image of a Dockerfile and a hashed lock, built without network; with podman the same each time.

The wheels of a lock are downloaded once, compared with their hashes, and kept. Only they, the lock, the Dockerfile and,
where the Dockerfile copies `project`, the wheel of the project above it are in the build's context.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import ContainerError, SpecError
from orchestrator.operations.image_results import BuiltImage
from orchestrator.spec.images import find_lock, read_lock

BUILDERS = ("podman", "docker")
LOCK_NAME = "requirements.lock"
PYTHON = "3.11"  # of Debian bookworm, which the images stand on
_GLIBC = 36  # its glibc is 2.36
_DOWNLOAD_S = 3600.0
_BUILD_S = 3600.0
_WHEEL_S = 600.0
_GIT_S = 60.0
_END_S = 10.0
_LAST_LINES = 15
_ZIP_EPOCH = "315532800"  # 1980: a wheel is a zip file, and those know no earlier time
_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:\[[^\]]*\])?\s*==\s*[^\s;*]+(?:\s*;.*)?")
_HASH = re.compile(r"\s--hash=sha256:[0-9a-f]{64}(?=\s|$)")
_TAG_PART = re.compile(r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*")
# Variables of a git that calls us (a hook): they would make it answer for another repository.
_OF_GIT = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY"}

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Lock:
    """A file of pinned requirements, each with its hashes."""

    path: Path
    sha256: str
    data: bytes


@dataclass(frozen=True)
class Build:
    """What a builder is asked for."""

    context: Path
    tag: str
    base: str | None
    labels: Mapping[str, str]
    environ: Mapping[str, str]
    tell: Tell

    @property
    def arguments(self) -> dict[str, str]:
        """Build arguments."""
        return {} if self.base is None else {"BASE": self.base}


def build_image(
    directory: Path,
    *,
    base: str | None = None,
    tag: str | None = None,
    lock: Path | None = None,
    builder: str | None = None,
    environ: Mapping[str, str] = os.environ,
    cache: Path | None = None,
    tell: Tell | None = None,
) -> BuiltImage:
    """Build the image of `directory` (Dockerfile, requirements.lock) and give it a tag; blocks for minutes.

    `tell` hears every line of the tools at work. Raises SpecError for the input, ContainerError for the rest.
    """
    directory = Path(os.path.abspath(directory))  # noqa: PTH100 - resolve() would leave the folder the user is in
    dockerfile = _dockerfile(directory)
    hashed = read_hashed_lock(lock or directory / LOCK_NAME)
    base = _base(base, directory, dockerfile)
    tag = tag or default_tag(directory, hashed)
    chosen = choose_builder(builder, environ)
    cache, tell = cache or cache_dir(environ), tell or _nobody
    project = _project(directory) if _copies_project(dockerfile) else None
    revision = revision_of(directory, project, environ)
    with _translated(cache):
        wheels = ensure_wheels(hashed, cache, environ=environ, tell=tell)
        with tempfile.TemporaryDirectory(prefix="tmp-context-", dir=cache) as made:
            context = Path(made)
            fill_context(context, dockerfile, hashed, wheels)
            if project is not None:
                _build_wheel(project, context / "project", environ, tell)
            labels = {"org.opencontainers.image.revision": revision, "orch.lock.sha256": hashed.sha256}
            image = _BUILD_WITH[chosen](Build(context, tag, base, labels, environ, tell))
    return BuiltImage(image, tag, chosen, chosen == "podman", hashed.sha256, revision)


def _nobody(_line: str) -> None:
    """Nobody listens."""


@contextlib.contextmanager
def _translated(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ContainerError(
            f"cannot prepare the build below {cache}: {error.strerror or error}",
            hint="wheels are kept there; XDG_CACHE_HOME names another place",
        ) from error


# --- what is given


def _dockerfile(directory: Path) -> str:
    path = directory / "Dockerfile"
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}",
            hint="name a directory with a Dockerfile and a requirements.lock, such as containers/base",
        ) from error


def read_hashed_lock(path: Path) -> Lock:
    """A lock in which every requirement is pinned and has a hash, and nothing else. Raises SpecError."""
    try:
        data = path.read_bytes()
        found = lock_problems(data.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"cannot read the lock {path}: {getattr(error, 'strerror', None) or error}", hint=_lock_hint(path)
        ) from error
    if found:
        problems = tuple({"file": str(path), "line": line, "message": message} for line, message in found)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise SpecError(f"{path}:{found[0][0]}: {found[0][1]}{more}", hint=_lock_hint(path), problems=problems)
    return Lock(path, hashlib.sha256(data).hexdigest(), data)


def _lock_hint(path: Path) -> str:
    return f"make it with:  uv pip compile --generate-hashes --python-version {PYTHON} requirements.in -o {path.name}"


def lock_problems(text: str) -> list[tuple[int, str]]:
    """(line, what is wrong there) of a lock file (pure)."""
    problems = []
    entries = list(_entries(text))
    for line, entry in entries:
        requirement = _HASH.sub("", entry).strip()
        if requirement.startswith("-"):
            problems.append(
                (line, f"the option {requirement.split()[0]}: where wheels come from is not part of a lock")
            )
        elif not _REQUIREMENT.fullmatch(requirement):
            problems.append((line, f"{requirement} is not NAME==VERSION"))
        elif not _HASH.search(entry):
            problems.append((line, f"{requirement} has no --hash=sha256:…, so nothing says which file it is"))
    return problems if entries else [(1, "it pins nothing")]


def _entries(text: str) -> Iterator[tuple[int, str]]:
    """Logical lines, with the number of their first one (pip's requirements file format)."""
    first, parts = 1, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        if not parts:
            first = number
        content = re.sub(r"(^|\s)#.*$", "", line).rstrip()
        parts.append(content.removesuffix("\\"))
        if content.endswith("\\"):
            continue
        entry = " ".join(part.strip() for part in parts).strip()
        parts = []
        if entry:
            yield first, entry
    if entry := " ".join(part.strip() for part in parts).strip():
        yield first, entry


def _base(given: str | None, directory: Path, dockerfile: str) -> str | None:
    """The image to stand on: as given, or what a name of the nearest images.lock.json pins."""
    if given is None:
        if re.search(r"^ARG\s+BASE\s*$", dockerfile, re.MULTILINE | re.IGNORECASE):
            raise SpecError(
                "no base image was named",
                hint="--base IMAGE: a Debian bookworm with python3 and python3-venv (docs/containers.md)",
            )
        return None
    names = find_lock(directory)
    return (None if names is None else read_lock(names).pin(given)) or given


def default_tag(directory: Path, lock: Lock) -> str:
    """`orch/<directory>:<lock>` (pure). Raises SpecError."""
    if not _TAG_PART.fullmatch(directory.name):
        raise SpecError(f'"{directory.name}" is no name for an image', hint="give one:  --tag NAME")
    return f"orch/{directory.name}:{lock.sha256[:12]}"


def choose_builder(given: str | None, environ: Mapping[str, str]) -> str:
    """podman where it is installed, else docker, unless told. Raises SpecError, ContainerError."""
    if given is not None and given not in BUILDERS:
        raise SpecError(f"there is no builder {given}", hint=f"one of {', '.join(BUILDERS)}")
    has_podman = shutil.which("podman", path=environ.get("PATH")) is not None
    if given == "podman" and not has_podman:
        raise ContainerError(
            "podman is not installed here",
            hint="install it, or take --builder docker (whose images get another digest each time)",
        )
    return given or ("podman" if has_podman else "docker")


def _copies_project(dockerfile: str) -> bool:
    return re.search(r"^COPY\s+project/?\s", dockerfile, re.MULTILINE | re.IGNORECASE) is not None


def _project(directory: Path) -> Path:
    """Where the nearest pyproject.toml is."""
    found = next((base for base in (directory, *directory.parents) if (base / "pyproject.toml").is_file()), None)
    if found is None:
        raise SpecError(
            f"{directory / 'Dockerfile'} copies `project`, but no pyproject.toml is above it",
            hint="build from a checkout of the project",
        )
    return found


def revision_of(directory: Path, project: Path | None, environ: Mapping[str, str]) -> str:
    """Commit of the directory, with `-dirty` where it (or the project) differs from that; "" where there is none."""
    head = _git(directory, environ, "rev-parse", "--verify", "HEAD")
    if not head:
        return ""
    return head + (
        "-dirty" if _git(directory, environ, "status", "--porcelain", "--", str(project or directory)) else ""
    )


def _git(directory: Path, environ: Mapping[str, str], *arguments: str) -> str:
    """What git says; "" where there is no git, no repository, or no commit."""
    clean = {name: value for name, value in environ.items() if name not in _OF_GIT}
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            env=clean,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GIT_S,
            check=False,
        )
    except FileNotFoundError:
        return ""
    except subprocess.TimeoutExpired as error:
        raise ContainerError(
            f"git {arguments[0]} gives no answer within {_GIT_S:g} s", hint=f"look at the disk of {directory}"
        ) from error
    return done.stdout.strip() if done.returncode == 0 else ""


# --- wheels


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where wheels are kept: `orch` in the user's cache directory."""
    if given := environ.get("XDG_CACHE_HOME"):
        return Path(given, "orch")
    import platformdirs

    return Path(platformdirs.user_cache_dir("orch", appauthor=False))


def wheels_name(lock_sha256: str) -> str:
    """Directory of a lock's wheels in the cache (pure)."""
    return f"wheels-{lock_sha256[:16]}-{platform.machine()}"


def ensure_wheels(lock: Lock, cache: Path, *, environ: Mapping[str, str] = os.environ, tell: Tell = _nobody) -> Path:
    """Directory with the wheels of a lock, downloaded and compared with its hashes first where it is missing.

    It appears whole: by one rename. Raises ContainerError, OSError.
    """
    target = cache / wheels_name(lock.sha256)
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tmp-wheels-", dir=cache) as made:
        partial = Path(made, "wheels")
        (Path(made) / LOCK_NAME).write_bytes(lock.data)  # not the file itself: it may change meanwhile
        said = deque[str](maxlen=_LAST_LINES)
        argv = download_argv(Path(made) / LOCK_NAME, partial)
        code = run_told(argv, environ=environ, tell=_both(tell, said.append), timeout_s=_DOWNLOAD_S)
        if code != 0:
            raise _download_error(lock, said)
        with contextlib.suppress(FileExistsError):
            _publish(partial, target)
    return target


def download_argv(lock: Path, target: Path) -> list[str]:
    """pip for the image's Python and C library, not this machine's: every machine takes the same wheels (pure)."""
    machine = platform.machine()
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(_GLIBC, 4, -1)]
    tags += [f"{name}_{machine}" for name in ("manylinux2014", "manylinux2010", "manylinux1")]
    return [
        *(sys.executable, "-m", "pip", "download", "--only-binary=:all:", "--no-deps", "--require-hashes"),
        *("--no-cache-dir", "--progress-bar=off", "--disable-pip-version-check"),
        *(f"--python-version={PYTHON}", "--implementation=cp", *(f"--platform={tag}" for tag in tags)),
        *(f"--dest={target}", f"--requirement={lock}"),
    ]


def _publish(partial: Path, target: Path) -> None:
    """Raises FileExistsError when another build was faster."""
    try:
        partial.rename(target)
    except OSError:
        if target.exists():
            raise FileExistsError(str(target)) from None
        raise


def _download_error(lock: Lock, said: Iterable[str]) -> ContainerError:
    lines = list(said)
    text = "\n".join(lines)
    if "DO NOT MATCH THE HASHES" in text:
        return ContainerError(
            f"a wheel is not the one that {lock.path} pins:\n{text}",
            hint="somebody has changed the file: make the lock again only if you trust where it comes from",
        )
    if "No matching distribution" in text:
        return ContainerError(
            f"pip finds no wheel for a pin in {lock.path}:\n{text}",
            hint="PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS say where pip looks; "
            "CPU builds of PyTorch (+cpu) are not on PyPI",
        )
    if "No module named pip" in text:
        return ContainerError(f"{sys.executable} has no pip to download wheels with", hint="install pip beside orch")
    return ContainerError(f"pip cannot download the wheels of {lock.path}:\n{text}", hint="run the same command again")


def _build_wheel(project: Path, target: Path, environ: Mapping[str, str], tell: Tell) -> None:
    """The project's wheel, by the build backend that is installed beside orch; nothing is downloaded."""
    argv = [
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir",
        "--disable-pip-version-check", f"--wheel-dir={target}", str(project),
    ]  # fmt: skip
    said = deque[str](maxlen=_LAST_LINES)
    fixed = {**environ, "SOURCE_DATE_EPOCH": _ZIP_EPOCH}
    if run_told(argv, environ=fixed, tell=_both(tell, said.append), timeout_s=_WHEEL_S) != 0:
        raise ContainerError(
            f"no wheel can be built of {project}:\n" + "\n".join(said),
            hint="what [build-system] requires must be installed beside orch (pip install hatchling)",
        )


def fill_context(context: Path, dockerfile: str, lock: Lock, wheels: Path) -> None:
    """Dockerfile, lock and wheels (hard links where they can be). Raises OSError."""
    (context / "Dockerfile").write_text(dockerfile)
    (context / LOCK_NAME).write_bytes(lock.data)
    shutil.copytree(wheels, context / "wheels", copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


# --- builders


def podman_argv(build: Build, id_file: Path) -> list[str]:
    """`podman build` whose image holds nothing of when, where and by which release it was built.

    One layer of our own, from nothing that was cached: whatever the store holds, the inputs decide.
    """
    return [
        "podman", "build", "--network=none", "--no-cache", "--layers=false", "--timestamp=0", "--identity-label=false",
        "--format=oci", f"--iidfile={id_file}", f"--tag={build.tag}",
        *(f"--label={name}={value}" for name, value in build.labels.items()),
        *(f"--build-arg={name}={value}" for name, value in build.arguments.items()),
        str(build.context),
    ]  # fmt: skip


def _build_with_podman(build: Build) -> str:
    said = deque[str](maxlen=_LAST_LINES)
    with tempfile.TemporaryDirectory() as made:
        id_file = Path(made) / "id"
        argv = podman_argv(build, id_file)
        code = run_told(argv, environ=build.environ, tell=_both(build.tell, said.append), timeout_s=_BUILD_S)
        if code != 0:
            raise _build_error("podman", said)
        found = id_file.read_text().strip()
    return found if found.startswith("sha256:") else f"sha256:{found}"


def _build_with_docker(build: Build) -> str:
    """Through the engine's API: with a client, which builder is at work would depend on its plugins."""
    import docker
    import requests

    from orchestrator.containers.docker import connect

    said = deque[str](maxlen=_LAST_LINES)
    client = connect(build.environ, timeout_s=int(_BUILD_S))
    try:
        events = client.api.build(
            path=str(build.context), tag=build.tag, buildargs=build.arguments, labels=dict(build.labels),
            network_mode="none", nocache=True, rm=True, forcerm=True, decode=True,
        )  # fmt: skip
        if not _succeeded(events, _both(build.tell, said.append), time.monotonic() + _BUILD_S):
            raise _build_error("docker", said)
        return str(client.images.get(build.tag).id)
    except (docker.errors.DockerException, requests.RequestException, OSError) as error:
        raise ContainerError(
            f"docker cannot build: {error}", hint="look at the engine's log, and at its disk: docker system df"
        ) from error
    finally:
        client.close()


def _succeeded(events: Iterable[Mapping[str, Any]], tell: Tell, until: float) -> bool:
    for event in events:
        for line in str(event.get("stream") or event.get("error") or "").splitlines():
            if line.strip():
                tell(line)
        if "error" in event:
            return False
        if time.monotonic() > until:
            raise _too_slow("docker build", _BUILD_S)
    return True


def _build_error(builder: str, said: Iterable[str]) -> ContainerError:
    lines = list(said)
    steps = [line for line in lines if re.search(r"\bstep \d+/\d+", line, re.IGNORECASE)]
    hint = "the build has no network: everything it installs must be a wheel that the lock pins"
    if steps and re.search(r"\bFROM\b", steps[-1]):
        hint = f"--base names an image that {builder} has, or can pull: see `{builder} images`"
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        hint = "a wheel in the cache was changed after its download: remove the directory, and build again"
    return ContainerError(f"{builder} build failed:\n" + "\n".join(lines), hint=hint)


_BUILD_WITH: dict[str, Callable[[Build], str]] = {"podman": _build_with_podman, "docker": _build_with_docker}


# --- running a tool


def _both(*listeners: Tell) -> Tell:
    def tell(line: str) -> None:
        for listener in listeners:
            listener(line)

    return tell


def run_told(argv: Sequence[str], *, environ: Mapping[str, str], tell: Tell, timeout_s: float) -> int:
    """Run a command and pass on every line it says, on either stream; its exit code. Raises ContainerError, OSError."""
    with subprocess.Popen(
        list(argv),
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            return _listen(process, tell, time.monotonic() + timeout_s)
        except subprocess.TimeoutExpired:
            raise _too_slow(" ".join(argv[:2]), timeout_s) from None
        finally:
            _end(process)


def _listen(process: subprocess.Popen[bytes], tell: Tell, until: float) -> int:
    assert process.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(0.0, until - time.monotonic())):
            data = os.read(process.stdout.fileno(), 65536)
            *lines, rest = (rest + data).split(b"\n")
            for line in [*lines, *([rest] if rest and not data else [])]:
                tell(line.decode(errors="replace").rstrip())
            if not data:
                return process.wait(max(0.0, until - time.monotonic()))
    raise subprocess.TimeoutExpired(process.args, 0)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM first: a builder that is killed leaves its container and mounts behind."""
    if process.poll() is not None:
        return
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    process.kill()


def _too_slow(what: str, timeout_s: float) -> ContainerError:
    return ContainerError(f"{what} has not ended within {timeout_s:g} s", hint="look at the network, or at the disk")

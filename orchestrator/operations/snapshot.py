"""The code of a run, by content: which files of the workspace belong to it, their hash, the copy that runs.

PROTOCOLS 2:
In git: tracked and untracked-not-ignored files, submodules included; elsewhere `job.script` and `*.py`. Never the root,
checkpoint.uri, the submitted spec, `workspace.exclude`, or anything in a .git or orch_runs.

Symbolic links: one to something in the snapshot stays a link (made relative where it would lead back to the workspace);
one to any other file is replaced by that file, because the run must not change when the file does; one to a directory
outside the workspace is refused, because it may hold anything. A dangling link stays as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import posixpath
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from orchestrator.errors import RegistryError, SpecError
from orchestrator.files import fsync_dir
from orchestrator.operations.ignore_patterns import IgnorePatterns
from orchestrator.paths import DEFAULT_ROOT, RootPaths, is_object_store

if TYPE_CHECKING:
    from orchestrator.spec import JobSpec

HASH_VERSION = b"orch-code-1\0"
_HASH_DIGITS = 32
_GIT_TIMEOUT_S = 60.0
_MAX_ENTRIES = 200_000  # a workspace that is really somebody's home directory must end in a message, not in an hour
_CHUNK = 1024 * 1024
_TEMPORARY = ".tmp."
_STALE_S = 24 * 3600.0
_SUBMODULE_DEPTH = 8
_LIBRARY = ("orchestrator", "jobs")
_NEVER = {".git", DEFAULT_ROOT}  # a root of other runs, whose logs would make every submission a new run
_REDIRECTING = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY"}

Runner = Callable[[Sequence[str], float], "subprocess.CompletedProcess[bytes]"]


@dataclass(frozen=True)
class SnapshotFile:
    """One entry of a snapshot. Paths are `os.fsdecode`d: any file name is possible."""

    path: str  # POSIX, relative to the workspace
    source: Path
    size: int  # bytes
    executable: bool
    digest: str  # SHA-256 of the content; of the target for a link
    link: str | None = None  # target of a symbolic link


@dataclass(frozen=True)
class Snapshot:
    """The code of a run: its hash and where its bytes are now."""

    code_hash: str
    files: tuple[SnapshotFile, ...]
    size_bytes: int


# --- which files


def hash_workspace(
    spec: JobSpec, *, spec_path: Path | None, root: Path | RootPaths, runner: Runner | None = None
) -> Snapshot:
    """Find and hash the code. Reads every file once, writes nothing. Raises SpecError."""
    top = Path(spec.workspace.path)
    if not top.is_dir():
        raise SpecError(f"workspace.path: {top} is not a directory", hint="It is relative to the spec file.")
    try:
        names = _names(spec, top, spec_path, root.root if isinstance(root, RootPaths) else root, runner or _run)
        found = [entry for name in sorted(names, key=os.fsencode) if (entry := _stat(top, name, names)) is not None]
        _check_size(spec, found)
        files = tuple(_hashed(top, name, source, status) for name, source, status in found)
    except OSError as error:
        raise SpecError(
            f"workspace.path: cannot read {error.filename or top}: {error.strerror or error}",
            hint="Make it readable, or leave it out with workspace.exclude.",
        ) from error
    return Snapshot(_code_hash(files), files, sum(file.size for file in files))


def _names(spec: JobSpec, top: Path, spec_path: Path | None, root: Path, runner: Runner) -> set[str]:
    names = _listed_by_git(top, runner) if _in_git(top, runner) else _python_files(top)
    try:
        ignore = IgnorePatterns(spec.workspace.exclude)
    except ValueError as error:
        raise SpecError(f"workspace.exclude: {error}") from None
    barred = _barred(spec, top, spec_path, root)
    chosen = {name for name in names if not _is_barred(name, barred) and not ignore.excludes(name)}
    return chosen | _script(spec, top, ignore, barred)


def _script(spec: JobSpec, top: Path, ignore: IgnorePatterns, barred: set[str]) -> set[str]:
    """job.script belongs to the code even where git ignores it."""
    script = spec.job.script
    if script is None:
        return set()
    if not (top / script).is_file():
        raise SpecError(f"job.script: there is no file {top / script}", hint="It is relative to the spec file.")
    if ignore.excludes(script) or _is_barred(script, barred):
        raise SpecError(f"job.script: {script} is excluded from the code snapshot", hint="See workspace.exclude.")
    return {script}


def _barred(spec: JobSpec, top: Path, spec_path: Path | None, root: Path) -> set[str]:
    """Relative paths that never belong to the code, whatever git says."""
    layout = RootPaths(root)
    inner = [root] if _below(root, top) else [layout.code, layout.runs, layout.sweeps]  # the root may be the workspace
    uri = spec.checkpoint.uri
    if uri is not None and not is_object_store(uri):
        checkpoints = Path(uri)
        if os.path.realpath(checkpoints) == os.path.realpath(top):
            raise SpecError(f"checkpoint.uri: {uri} is the workspace itself", hint="Give it a directory of its own.")
        inner.append(checkpoints)
    if spec_path is not None:
        inner.append(spec_path)
    return {name for path in inner if (name := _below(path, top))}


def _below(path: Path, top: Path) -> str | None:
    """`path` relative to `top`, or None when it is not strictly inside."""
    for same in (os.path.abspath, os.path.realpath):
        inner, outer = same(path), same(top)
        if inner.startswith(outer.rstrip("/") + "/"):
            return inner[len(outer.rstrip("/")) + 1 :]
    return None


def _is_barred(name: str, barred: set[str]) -> bool:
    parts = name.split("/")
    return not _NEVER.isdisjoint(parts) or any(
        "/".join(parts[:length]) in barred for length in range(1, len(parts) + 1)
    )


def _python_files(top: Path) -> set[str]:
    """`*.py` outside git; hidden directories and virtual environments hold no code of the user."""
    names: set[str] = set()
    entries = 0
    for directory, folders, files in os.walk(top, onerror=_raise):
        entries += len(folders) + len(files)
        if entries > _MAX_ENTRIES:
            raise SpecError(
                f"workspace.path: {top} holds more than {_MAX_ENTRIES} files",
                hint="Set workspace.path to the directory of the code itself, or keep the code in git.",
            )
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not os.path.lexists(os.path.join(directory, name, "pyvenv.cfg"))  # noqa: PTH118
        ]
        prefix = os.path.relpath(directory, top)
        names.update(name if prefix == "." else f"{prefix}/{name}" for name in files if name.endswith(".py"))
    return names


def _raise(error: OSError) -> None:
    raise error


# --- git


def _run(argv: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    """git without the variables of a surrounding git (a hook, `git rebase --exec`), which would redirect it."""
    clean = {name: value for name, value in os.environ.items() if name not in _REDIRECTING}
    clean.update(GIT_OPTIONAL_LOCKS="0", LC_ALL="C")
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False, env=clean
    )


def _git(directory: Path, arguments: Sequence[str], runner: Runner) -> subprocess.CompletedProcess[bytes]:
    try:
        return runner(["git", "-C", str(directory), *arguments], _GIT_TIMEOUT_S)
    except FileNotFoundError:
        raise SpecError(
            f"workspace.path: {directory} is in a git repository, but there is no git here to list its files",
            hint="Install git; without it the code cannot be told from everything else in the directory.",
        ) from None
    except subprocess.TimeoutExpired:
        raise SpecError(
            f"workspace.path: git did not list the files of {directory} within {_GIT_TIMEOUT_S:g} s",
            hint="Try `git status` there; a slow disk or a huge untracked directory belongs in .gitignore.",
        ) from None


def _in_git(top: Path, runner: Runner) -> bool:
    """True inside a work tree that does not ignore this very directory."""
    real = Path(os.path.realpath(top))
    home = next((parent for parent in (real, *real.parents) if (parent / ".git").exists()), None)
    if home is None:
        return False
    if home == real:
        return True
    # rc 0: ignored, so git knows nothing of what is in it; rc 1: not ignored; else the listing will tell what is wrong
    return _git(top, ["check-ignore", "-q", "."], runner).returncode != 0


def _listed_by_git(top: Path, runner: Runner, depth: int = 0) -> set[str]:
    done = _git(top, ["ls-files", "-z", "--cached", "--others", "--exclude-standard"], runner)
    if done.returncode != 0:
        reason = os.fsdecode(done.stderr).strip().splitlines()
        raise SpecError(
            f"workspace.path: git cannot list the files of {top}: {reason[0] if reason else 'no reason given'}",
            hint=next(
                (line.strip() for line in reason if "git config" in line and "safe.directory" in line),
                "Repair the repository, or set workspace.path to a directory outside it.",
            ),
        )
    names: set[str] = set()
    for listed in {os.fsdecode(name).removesuffix("/") for name in done.stdout.split(b"\0") if name}:
        path = top / listed
        if path.is_dir() and not path.is_symlink():  # a submodule, or a repository inside this one
            if depth < _SUBMODULE_DEPTH and (path / ".git").exists():
                names.update(f"{listed}/{inner}" for inner in _listed_by_git(path, runner, depth + 1))
        else:
            names.add(listed)
    return names


# --- hashing


def _stat(top: Path, name: str, names: set[str]) -> tuple[str, Path, os.stat_result] | None:
    """None for what is tracked but deleted, and for what is no file (sockets, pipes)."""
    path = top / name
    if any((top / parent).is_symlink() for parent in PurePosixPath(name).parents[:-1]):
        return None  # tracked as a/b, but a is a link now: git lists both, and b is no longer in a
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISLNK(status.st_mode):
        return _stat_link(top, name, names, status)
    return (name, path, status) if stat.S_ISREG(status.st_mode) else None


def _stat_link(top: Path, name: str, names: set[str], status: os.stat_result) -> tuple[str, Path, os.stat_result]:
    target = Path(os.path.realpath(top / name))
    inside = "." if target == Path(os.path.realpath(top)) else _below(target, top)
    if inside in names or not target.exists():
        return name, top / name, status
    followed = target.stat()
    if stat.S_ISREG(followed.st_mode):
        return name, target, followed
    if inside is not None:
        return name, top / name, status
    raise SpecError(
        f"workspace.path: {_shown(name)} is a link to {target}, a directory outside the workspace",
        hint="Leave it out with workspace.exclude and give the job the real path, or copy the code into the workspace.",
    )


def _check_size(spec: JobSpec, found: Sequence[tuple[str, Path, os.stat_result]]) -> None:
    """Before anything is hashed: a forgotten data set is refused at once, not after reading it."""
    total = sum(status.st_size for _, _, status in found)
    if total <= spec.workspace.max_size:
        return
    biggest = sorted(found, key=lambda entry: -entry[2].st_size)[:5]
    listed = ", ".join(f"{_shown(name)} ({_mebibytes(status.st_size)})" for name, _, status in biggest)
    raise SpecError(
        f"workspace: the code snapshot would hold {len(found)} files, {_mebibytes(total)}; "
        f"workspace.max_size is {spec.workspace.max_size}. The biggest: {listed}",
        hint="Leave them out with .gitignore or workspace.exclude, or raise workspace.max_size.",
    )


def _mebibytes(size: int) -> str:
    return f"{size / 1024**2:.1f} MiB"


def _shown(name: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in name)


def _hashed(top: Path, name: str, source: Path, status: os.stat_result) -> SnapshotFile:
    if stat.S_ISLNK(status.st_mode):
        target = _relative_target(top, name, source)
        return SnapshotFile(name, source, 0, False, hashlib.sha256(os.fsencode(target)).hexdigest(), target)
    digest = hashlib.sha256()
    size = 0
    for chunk in _chunks(source):
        digest.update(chunk)
        size += len(chunk)
    return SnapshotFile(name, source, size, bool(status.st_mode & stat.S_IXUSR), digest.hexdigest())


def _relative_target(top: Path, name: str, link: Path) -> str:
    """An absolute link into the workspace would lead back to the files that change; the copy's own are meant."""
    text = str(link.readlink())
    folder = posixpath.dirname(name)
    if not text.startswith("/") and not posixpath.normpath(posixpath.join(folder, text)).startswith(".."):
        return text
    real = Path(os.path.realpath(link))
    inside = "." if real == Path(os.path.realpath(top)) else _below(real, top)
    return text if inside is None else posixpath.relpath(inside, folder or ".")


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _code_hash(files: Iterable[SnapshotFile]) -> str:
    """Over (path, kind, content) with lengths in front, so that no two trees share a text."""
    digest = hashlib.sha256(HASH_VERSION)
    for file in files:
        name = os.fsencode(file.path)
        kind = b"link" if file.link is not None else b"exec" if file.executable else b"file"
        digest.update(len(name).to_bytes(8, "big") + name + kind + bytes.fromhex(file.digest))
    return digest.hexdigest()[:_HASH_DIGITS]


# --- our own code


def library_snapshot() -> Snapshot:
    """The code of `orchestrator` and `jobs` as installed here, by content.

    It travels with the run like the user's code: an image needs nothing of ours, and an upgrade of the installation
    between two attempts changes nothing for a run that has begun.
    """
    found = []
    for package in _LIBRARY:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise RegistryError(f"the package {package} is not installed beside orch", hint="Install orch again.")
        top = Path(spec.origin).parent
        found += [(f"{package}/{name}", top / name) for name in _python_files(top)]
    files = tuple(_hashed(path.parent, name, path, path.stat()) for name, path in sorted(found))
    return Snapshot(_code_hash(files), files, sum(file.size for file in files))


# --- storing


def ensure_snapshot(snapshot: Snapshot, root: RootPaths) -> Path:
    """The read-only copy in `<root>/code/<hash>/`, made if missing; safe to race. Raises RegistryError, SpecError."""
    target = root.snapshot(snapshot.code_hash)
    try:
        if target.is_dir():
            return target
        root.code.mkdir(parents=True, exist_ok=True)
        _sweep(root.code)
        temporary = root.code / f"{_TEMPORARY}{os.getpid()}.{os.urandom(4).hex()}.{socket.gethostname()}"
        temporary.mkdir()
        try:
            _fill(temporary, snapshot.files)
            _publish(temporary, target)
        finally:
            _remove_tree(temporary)
    except OSError as error:
        raise RegistryError(
            f"cannot store the code snapshot under {root.code}: {error.strerror or error}",
            hint="Check that the root is writable and has space, or choose another with --root DIR.",
        ) from error
    return target


def _publish(temporary: Path, target: Path) -> None:
    try:
        temporary.rename(target)
    except OSError:
        if target.is_dir():  # another submit of the same code was faster: same hash, same bytes
            return
        raise
    fsync_dir(target.parent)


def _fill(top: Path, files: Sequence[SnapshotFile]) -> None:
    folders = {top}
    for file in files:
        copy = top / file.path
        copy.parent.mkdir(parents=True, exist_ok=True)
        folders.update(parent for parent in copy.parents if parent.is_relative_to(top))
        if file.link is not None:
            copy.symlink_to(file.link)
        else:
            _copy(file, copy)
    # Only now, and all together: the disk merges the writes, and a power cut after the rename loses nothing.
    for file in files:
        if file.link is None:
            _fsync_file(top / file.path)
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) & ~0o222)
        fsync_dir(folder)


def _copy(file: SnapshotFile, copy: Path) -> None:
    """Copies and hashes again: a file saved in an editor between the two reads must not run under the wrong hash."""
    digest = hashlib.sha256()
    with copy.open("xb") as out:
        try:
            for chunk in _chunks(file.source):
                digest.update(chunk)
                out.write(chunk)
        except FileNotFoundError:
            digest = hashlib.sha256(b"gone")
        readable = stat.S_IMODE(os.fstat(out.fileno()).st_mode) & 0o444
        os.fchmod(out.fileno(), readable | (readable >> 2 if file.executable else 0))
    if digest.hexdigest() != file.digest:
        raise SpecError(f"workspace: {_shown(file.path)} changed while it was copied", hint="Submit again.")


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(code: Path) -> None:
    """Removes what killed submits left: of this machine when their process is gone, of others after a day."""
    for left in code.glob(f"{_TEMPORARY}*"):
        pid, _, host = left.name.removeprefix(_TEMPORARY).partition(".")
        host = host.partition(".")[2]
        try:
            old = time.time() - left.stat().st_mtime > _STALE_S
        except FileNotFoundError:
            continue
        if old or (host == socket.gethostname() and pid.isdigit() and not _alive(int(pid))):
            _remove_tree(left)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove_tree(top: Path) -> None:
    """Removes a tree with read-only directories; one that is gone already is fine."""
    if not top.exists():
        return
    for directory, _, _ in os.walk(top):
        with suppress(FileNotFoundError):  # another submit sweeps too
            Path(directory).chmod(0o700)
    shutil.rmtree(top, ignore_errors=True)  # a leftover is harmless, and swept by a later submit

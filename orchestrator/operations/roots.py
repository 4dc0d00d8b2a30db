"""Which orch root holds a run: where to look, and a small memory in the user's state directory (PROTOCOLS 1)."""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.errors import RegistryError, RunNotFound
from orchestrator.files import write_atomic
from orchestrator.paths import DEFAULT_ROOT, RootPaths, RunPaths
from orchestrator.spec.site import load_site

_MEMORY_VERSION = 1
_KEPT_ROOTS = 50
_KEPT_RUNS = 2000


def state_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where `orch` remembers things about this user (`$ORCH_STATE_DIR`, else the platform's own place)."""
    if given := environ.get("ORCH_STATE_DIR"):
        return Path(given).absolute()
    import platformdirs

    return Path(platformdirs.user_state_dir("orch", appauthor=False))


@dataclass
class Memory:
    """Roots used lately (newest first) and where each run lives; a cache that may be deleted at any time."""

    roots: list[str] = field(default_factory=list)
    runs: dict[str, str] = field(default_factory=dict)


def load_memory(environ: Mapping[str, str] = os.environ) -> Memory:
    """What is remembered; a missing or broken file is an empty memory, since runs are found by looking too."""
    try:
        stored = json.loads(_memory_file(environ).read_bytes())
        return Memory([str(root) for root in stored["roots"]], {str(k): str(v) for k, v in stored["runs"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Memory()


def remember(run_id: str, root: Path, environ: Mapping[str, str] = os.environ) -> str | None:
    """Note where a run lives. Returns a warning instead of failing: the run is queued, only the shortcut is missing."""
    try:
        with _memory_lock(environ):
            memory = load_memory(environ)
            memory.roots = [str(root), *(known for known in memory.roots if known != str(root))][:_KEPT_ROOTS]
            memory.runs.pop(run_id, None)
            memory.runs[run_id] = str(root)
            kept = dict(list(memory.runs.items())[-_KEPT_RUNS:])
            text = json.dumps({"version": _MEMORY_VERSION, "roots": memory.roots, "runs": kept}, indent=1)
            write_atomic(_memory_file(environ), text.encode(), mode=0o600)
    except OSError as error:
        return f"could not remember the root ({error}); from another directory use --root {root}"
    return None


def _memory_file(environ: Mapping[str, str]) -> Path:
    return state_dir(environ) / "roots.json"


@contextmanager
def _memory_lock(environ: Mapping[str, str]) -> Iterator[None]:
    folder = state_dir(environ)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked(folder / ".roots.lock", deadline_s=5.0):
        yield


@contextmanager
def locked(path: Path, *, deadline_s: float) -> Iterator[None]:
    """Hold an exclusive flock on `path` (created if missing, like its directory). Raises TimeoutError, OSError."""
    end = time.monotonic() + deadline_s
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while not _try_lock(descriptor):
                if time.monotonic() > end:
                    raise TimeoutError(f"{path} has been locked by another process for {deadline_s:g} s")
                time.sleep(0.05)
            if _same_file(descriptor, path):  # else: its owner removed the directory while we waited; lock the new one
                yield
                return
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def known_roots(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Every root worth looking in when none was given, without duplicates, existing ones only.

    Raises SpecError when there is a site profile that cannot be read: it may name the root that is looked for.
    """
    candidates = [load_site(environ).root, environ.get("ORCH_ROOT"), DEFAULT_ROOT, *load_memory(environ).roots]
    unique = dict.fromkeys(str(Path(root).expanduser().absolute()) for root in candidates if root)
    return [Path(root) for root in unique if RootPaths(Path(root)).runs.is_dir()]


def find_run(name: str, root: str | Path | None = None, environ: Mapping[str, str] = os.environ) -> RunPaths:
    """The run of this id, unique beginning of an id, or directory. Raises RunNotFound with what comes close."""
    if "/" in name:
        return _run_at(Path(name))
    roots = [Path(root).expanduser().absolute()] if root else _likely_roots(name, environ)
    for place in roots:
        paths = RootPaths(place).run(name)
        if paths.run_dir.is_dir():
            return paths
    return _by_beginning(name, roots)


def _likely_roots(name: str, environ: Mapping[str, str]) -> list[Path]:
    remembered = load_memory(environ).runs.get(name)
    first = [Path(remembered)] if remembered else []
    return first + [place for place in known_roots(environ) if place not in first]


def _run_at(run_dir: Path) -> RunPaths:
    if not run_dir.is_dir():
        raise RunNotFound(f"there is no run directory {run_dir}", hint="`orch ps` lists the runs")
    return RunPaths(run_dir.absolute())


def _by_beginning(name: str, roots: list[Path]) -> RunPaths:
    known = {run_id: place for place in reversed(roots) for run_id in run_names(place)}
    matches = sorted(run_id for run_id in known if run_id.startswith(name))
    if len(matches) == 1:
        return RootPaths(known[matches[0]]).run(matches[0])
    if matches:
        raise RunNotFound(
            f"{name!r} is the beginning of several runs: {', '.join(matches[:8])}", hint="write more of it"
        )
    close = difflib.get_close_matches(name, known, n=3)
    looked = ", ".join(str(place) for place in roots) or "no root yet"
    hint = f"did you mean {' or '.join(close)}?" if close else "`orch ps` lists the runs; --root DIR looks elsewhere"
    raise RunNotFound(f"no run {name!r} (looked in: {looked})", hint=hint)


def run_names(root: Path) -> list[str]:
    """Ids of the runs under a root, unsorted; cheap enough for shell completion."""
    try:
        with os.scandir(RootPaths(root).runs) as entries:
            return [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RegistryError(f"cannot read {root}: {error}", hint="check the root with --root DIR") from error

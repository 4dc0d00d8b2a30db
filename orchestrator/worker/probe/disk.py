"""What the file system below a directory does, tried in a directory of our own that is removed again."""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.files import fsync_dir

SCRATCH_PREFIX = ".orch-doctor-"
_BLOCK = b"o" * 65536
_REPLACES = 25


@dataclass(frozen=True)
class DiskFacts:
    """`tried`: the nearest directory above `path` that exists. `error`: the first operation that failed."""

    path: str
    tried: str
    error: str = ""
    file_system: str = ""
    device: str = ""
    mount_point: str = ""
    free_bytes: int = 0
    free_inodes: int | None = None  # None: the file system makes them as they are needed
    fsync_ms: float | None = None
    dirsync_ms: float | None = None
    exclusive_create: bool | None = None
    hard_link: bool | None = None
    atomic_replace: bool | None = None
    clock_skew_s: float | None = None  # the file server's clock minus ours


def nearest_directory(path: Path) -> Path:
    """`path`, or the first of its parents that is a directory (pure but for looking)."""
    return next((place for place in (path, *path.parents) if place.is_dir()), Path("/"))


def probe_disk(path: Path) -> DiskFacts:
    """Try everything a run needs of the file system. Blocks as long as the file system does; raises nothing."""
    tried = nearest_directory(path)
    mount = _mount_of(tried, Path("/proc/self/mountinfo").read_text())
    facts = DiskFacts(
        str(path), str(tried), file_system=mount.file_system, device=mount.device, mount_point=mount.point
    )
    scratch = tried / f"{SCRATCH_PREFIX}{os.urandom(6).hex()}"
    try:
        space = os.statvfs(tried)
        facts = replace(
            facts,
            free_bytes=space.f_bavail * space.f_frsize,
            free_inodes=space.f_favail if space.f_files else None,
        )
        scratch.mkdir(mode=0o700)
        return _try_operations(facts, scratch)
    except OSError as error:
        return replace(facts, error=f"{error.strerror or error} ({tried})")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # what cannot be removed is in the findings already


def measure_space(path: Path) -> tuple[int, str]:
    """(free bytes, mount point) of the file system that holds or would hold `path`; writes nothing. Raises OSError."""
    tried = nearest_directory(path)
    space = os.statvfs(tried)
    return space.f_bavail * space.f_frsize, _mount_of(tried, Path("/proc/self/mountinfo").read_text()).point


def _try_operations(facts: DiskFacts, scratch: Path) -> DiskFacts:
    file, fsync_ms = _write(scratch / "written")
    skew_s = file.stat().st_mtime - time.time()
    began = time.perf_counter()
    fsync_dir(scratch)
    dirsync_ms = (time.perf_counter() - began) * 1000
    return replace(
        facts,
        fsync_ms=round(fsync_ms, 2),
        dirsync_ms=round(dirsync_ms, 2),
        clock_skew_s=round(skew_s, 1),
        exclusive_create=_create_is_exclusive(file),
        hard_link=_can_link(file),
        atomic_replace=_replace_is_atomic(scratch),
    )


def _write(path: Path) -> tuple[Path, float]:
    with path.open("xb") as handle:
        handle.write(_BLOCK)
        handle.flush()
        began = time.perf_counter()
        os.fsync(handle.fileno())
    return path, (time.perf_counter() - began) * 1000


def _create_is_exclusive(existing: Path) -> bool:
    try:
        existing.open("xb").close()
    except FileExistsError:
        return True
    return False


def _can_link(existing: Path) -> bool:
    try:
        os.link(existing, existing.with_name("linked"))
    except OSError:  # vfat, some FUSE: the caller says what that means
        return False
    return existing.stat().st_nlink == 2


def _replace_is_atomic(scratch: Path) -> bool:
    """Replace a file again and again while another thread reads it: it must be there each time, and whole."""
    target, stop, torn = scratch / "replaced", threading.Event(), threading.Event()
    target.write_bytes(_BLOCK)

    def read() -> None:
        while not stop.is_set():
            try:
                if len(target.read_bytes()) != len(_BLOCK):
                    torn.set()
            except FileNotFoundError:
                torn.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for _ in range(_REPLACES):
            new = scratch / "new"
            new.write_bytes(_BLOCK)
            new.replace(target)
    finally:
        stop.set()
        reader.join(timeout=10)
    return not torn.is_set()


@dataclass(frozen=True)
class _Mount:
    file_system: str = ""
    device: str = ""
    point: str = ""


def _mount_of(directory: Path, mountinfo: str) -> _Mount:
    """The file system that holds `directory`; proc(5), mountinfo."""
    resolved = directory.resolve()
    best = _Mount()
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(_unescaped(before.split()[4]))
        # Not shorter: of two mounts on one place the later one is what is seen.
        if resolved.is_relative_to(point) and len(str(point)) >= len(best.point):
            file_system, device = after.split()[:2]
            best = _Mount(file_system, _unescaped(device), str(point))
    return best


def _unescaped(word: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        word = word.replace(code, char)
    return word

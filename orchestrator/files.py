"""Files that other processes read while we write them: atomic replacement, append-only lines, JSON without NaN.

Standard library only: the launcher, the agent and every rank import this in images that hold nothing else of ours.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.errors import RegistryError

# An NFS client may hold a handle to the inode that os.replace just removed on the server; opening again gets the new.
_STALE_DELAYS_S = (0.02, 0.1, 0.5)


def temporary_sibling(path: Path) -> Path:
    """A fresh hidden name next to `path` (pure); random because pids repeat across nodes and containers."""
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")


def fsync_dir(path: Path | str) -> None:
    """Make renames, links and removals in directory `path` durable. Blocks; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a directory at all; there a rename is durable or it is not,
        # and refusing to work would help nobody. A real failure (EIO) is raised.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


@contextmanager
def open_atomic(
    path: Path | str,
    *,
    mode: int = 0o644,
    trace: Callable[[str], None] | None = None,
    temporary: Path | None = None,
) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path` when the block ends: temp sibling → fsync → rename → fsync(directory).

    If the block raises, `path` stays as it was and the temporary file is removed. `trace` is told `create`, `fsync`,
    `rename` and `dirsync` just before each is done. `temporary`: a name of the caller's in the same directory. Raises
    OSError.
    """
    target = Path(path)
    temporary = temporary or temporary_sibling(target)
    note = trace or _untraced
    try:
        note("create")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as handle:
            yield handle
            handle.flush()
            note("fsync")
            os.fsync(handle.fileno())
        note("rename")
        os.replace(temporary, target)  # noqa: PTH105 - one name for this operation everywhere
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    note("dirsync")
    fsync_dir(target.parent)


def _untraced(operation: str) -> None:
    """The trace of a caller that wants none."""


def write_atomic(path: Path | str, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `data`; a reader sees the old bytes or the new ones, after a power cut too. Raises OSError."""
    with open_atomic(path, mode=mode) as handle:
        handle.write(data)


def write_json(path: Path | str, obj: Any, *, mode: int = 0o644) -> None:
    """Replace `path` by `obj` as JSON; NaN and ±inf become strings. Raises OSError, TypeError."""
    write_atomic(path, render_line(obj), mode=mode)


def read_json(path: Path | str) -> Any:
    """The JSON value in `path`. Raises FileNotFoundError, OSError, and RegistryError if it is not JSON."""
    data = read_bytes(path)
    try:
        return json.loads(data)
    except ValueError as error:  # includes UnicodeDecodeError
        raise RegistryError(
            f"{path} is not valid JSON: {error}",
            hint="orch only replaces this file whole; look for a full disk or a hand edit, then move it aside",
        ) from error


def read_bytes(path: Path | str) -> bytes:
    """The content of `path`; a stale NFS handle is opened again. Raises OSError."""
    for delay in _STALE_DELAYS_S:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        time.sleep(delay)
    return Path(path).read_bytes()


def append_line(path: Path | str, obj: Any) -> None:
    """Append `obj` as one JSON line with a single write, always on a line of its own. Raises OSError, TypeError.

    Safe between processes of one machine; two NFS clients need a file each.
    """
    line = render_line(obj)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line  # a writer was killed in the middle of its line: it must not swallow ours as well
        if os.write(fd, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(fd)


def render_line(obj: Any) -> bytes:
    """`obj` as one line of standard JSON in UTF-8, in insertion order (pure). NaN and ±inf become strings.

    Raises TypeError for what JSON cannot hold.
    """
    try:
        text = json.dumps(obj, allow_nan=False, ensure_ascii=False)
    except ValueError:  # a NaN or an infinity somewhere: rare, so the copy is made only then
        obj = _without_nan(obj)
        text = json.dumps(obj, allow_nan=False, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # a file name that is not UTF-8 (surrogate escapes): \udcxx reads back as it was
        return json.dumps(obj, allow_nan=False).encode() + b"\n"


def float_word(value: float) -> str:
    """`repr` of a finite float; NaN, Infinity and -Infinity for the others (pure)."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return repr(value)


def _without_nan(obj: Any) -> Any:
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else float_word(obj)
    if isinstance(obj, Mapping):
        return {key: _without_nan(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_without_nan(value) for value in obj]
    return obj

"""Checkpoints in an object store, through fsspec (S3 by s3fs; whatever else passes the probe).

Objects appear whole or not at all, so nothing here is renamed: a save is staged in a local file, uploaded under a name
that nobody else has, and made visible by its manifest. What must be exclusive (fences) is created with If-None-Match.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import tenacity

from orchestrator.checkpoint.manifest import CORRUPT_SUFFIX, FileEntry
from orchestrator.checkpoint.medium import Problem, Vanished
from orchestrator.checkpoint.posix import Directory
from orchestrator.checkpoint.protocol import Reading, Trace
from orchestrator.checkpoint.store import Store, describe
from orchestrator.checkpoint.stream import HashingWriter
from orchestrator.errors import CheckpointError

T = TypeVar("T")

POINTER_OBJECT = "last.json"
_CHUNK_BYTES = 8 << 20
_TRANSIENT = (
    errno.EBUSY,
    errno.EIO,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.EPIPE,
)
_CONFLICTS = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_EXPIRED = ("ExpiredToken", "RequestExpired", "TokenRefreshRequired")
PATIENCE_S = 60.0
_POINTER_TRIES = 10


class ObjectStore(Store):
    """The checkpoints of one run below one URL. Instances share nothing but the store."""

    def __init__(
        self,
        url: str,
        *,
        storage_options: Mapping[str, Any] | None = None,
        scratch: Path,
        shared_disk: Path | None = None,
        claim_on_disk: bool = False,
        patience_s: Callable[[], float] = lambda: PATIENCE_S,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        node: str | None = None,
    ) -> None:
        """`shared_disk`: a directory for fences; with `claim_on_disk` they are created there (checkpoint.fence)."""
        self._bucket = Bucket(url, storage_options or {}, scratch=scratch, patience_s=patience_s, sleep=sleep)
        super().__init__(
            self._bucket,
            shared_disk=None if shared_disk is None else Directory(shared_disk, sleep=sleep),
            claim_on_disk=claim_on_disk,
            clock=clock,
            sleep=sleep,
            node=node,
        )
        self._claims_on_disk = claim_on_disk

    def weaknesses(self) -> tuple[str, ...]:
        """See CheckpointStore.weaknesses; a handful of requests."""
        from orchestrator.checkpoint.probe import probe

        with self._translated("write, list and remove a small object"):
            abilities = probe(self._bucket)
        lost = abilities.lost(claims_on_disk=self._claims_on_disk)
        if not abilities.usable:
            raise CheckpointError(
                f"{self.uri} cannot keep checkpoints: " + "; ".join(lost),
                hint="use a store with strong consistency, or a directory on the shared disk",
            )
        return lost


class Bucket:
    """A medium: one object per file. `patience_s` says how long an operation may be tried again, at its start."""

    def __init__(
        self,
        url: str,
        storage_options: Mapping[str, Any],
        *,
        scratch: Path,
        patience_s: Callable[[], float] = lambda: PATIENCE_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.uri = url.rstrip("/")
        self.scratch = scratch
        self._patience_s = patience_s
        self._sleep = sleep
        # Listings of another attempt's objects must never come from a cache, and no two stores share one.
        options = {"use_listings_cache": False, "skip_instance_cache": True, **storage_options}
        self._files, self._root = _connect(self.uri, options)
        self._kept: set[str] = set()  # what was fetched to be loaded

    # --- reading

    def names(self) -> list[str]:
        """See Medium.names."""
        try:
            found = self._ask(lambda: self._files.ls(self._root, detail=False, refresh=True))
        except FileNotFoundError:
            return []
        return [str(path).rpartition("/")[2] for path in found if str(path).rstrip("/") != self._root]

    def sizes(self) -> dict[str, int]:
        """See Medium.sizes."""
        try:
            found = self._ask(lambda: self._files.ls(self._root, detail=True, refresh=True))
        except FileNotFoundError:
            return {}
        return {
            str(entry["name"]).rpartition("/")[2]: int(entry.get("size") or 0)
            for entry in found
            if str(entry["name"]).rstrip("/") != self._root
        }

    def read(self, name: str) -> bytes:
        """See Medium.read."""
        return bytes(self._ask(lambda: self._files.cat_file(self._at(name))))

    def examine(
        self, entry: FileEntry, *, committed: Callable[[], bool], keep: bool = False, reading: Reading | None = None
    ) -> Problem | None:
        """See Medium.examine; kept as a local file."""
        try:
            problem = self._ask(lambda: self._download(entry, keep, reading))
            if problem is not None:  # a second look before a mismatch is believed
                problem = self._ask(lambda: self._download(entry, keep, reading))
        except OSError as error:
            if not committed():
                raise Vanished(entry.name) from error
            gone = isinstance(error, FileNotFoundError)
            return Problem(f"{entry.name} is missing" if gone else describe(error), certain=gone)
        if problem is None and keep:
            self._kept.add(entry.name)
        return None if problem is None else Problem(problem, certain=True)

    def fetch(self, entry: FileEntry, copy: BinaryIO, *, reading: Reading | None) -> str | None:
        """See Medium.fetch."""

        def receive() -> str | None:
            copy.seek(0)  # an earlier try may have come some way
            copy.truncate()
            return self._receive(entry, copy, reading)

        return self._ask(receive)

    def _download(self, entry: FileEntry, keep: bool, reading: Reading | None) -> str | None:
        if keep:
            self._require_room(entry.size)
        with (self.local(entry.name) if keep else Path(os.devnull)).open("wb") as staged:
            return self._receive(entry, staged, reading)

    def _receive(self, entry: FileEntry, copy: BinaryIO, reading: Reading | None) -> str | None:
        digest, size = hashlib.sha256(), 0
        with self._files.open(self._at(entry.name), "rb", cache_type="readahead", block_size=_CHUNK_BYTES) as remote:
            while chunk := remote.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                copy.write(chunk)
                if reading is not None:
                    reading(len(chunk))
        if size != entry.size:
            return f"{entry.name} has {size} bytes, its manifest says {entry.size}"
        if digest.hexdigest() != entry.sha256:
            return f"the content of {entry.name} does not match its hash"
        return None

    def local(self, name: str) -> Path:
        """Where an examined data file can be loaded from."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        return self.scratch / name

    # --- writing

    def prepare(self) -> None:
        """Nothing: a prefix exists with its first object."""

    def create(self, name: str, data: bytes, *, note: Trace, mine: Callable[[bytes], bool]) -> bool:
        """See Medium.create; by If-None-Match."""
        note("fence-put")

        def put() -> bool:
            try:
                self._files.pipe_file(self._at(name), data, mode="create")
            except OSError as error:
                if not _is_conflict(error):
                    raise
                return mine(self.read(name))  # our own request, whose answer got lost
            return True

        return self._ask(put)

    def replace(self, name: str, data: bytes) -> None:
        """See Medium.replace."""
        self._ask(lambda: self._files.pipe_file(self._at(name), data))

    def replace_if(self, name: str, data: bytes, *, tag: str) -> bool:
        """Put a small object in the place of the one with that ETag; False when it is another by now."""

        def put() -> bool:
            try:
                self._files.pipe_file(self._at(name), data, IfMatch=tag)
            except OSError as error:
                if not _is_conflict(error):
                    raise
                return False
            return True

        return self._ask(put)

    def write_data(self, name: str, write: Callable[[BinaryIO], object], *, note: Trace) -> FileEntry:
        """See Medium.write_data: staged, then uploaded in parallel parts, each with a checksum."""
        while self._kept:  # whoever saves has loaded; their room is needed now
            self.local(self._kept.pop()).unlink(missing_ok=True)
        staged = self.local(name)
        try:
            with staged.open("wb") as raw:
                stream = HashingWriter(raw)
                note("data-write")
                stream.fill(write)
            note("data-upload")
            self._ask(lambda: self._files.put_file(str(staged), self._at(name)))
        finally:
            staged.unlink(missing_ok=True)
        return FileEntry(name, stream.size, stream.sha256)

    def write_manifest(self, name: str, data: bytes, *, note: Trace) -> None:
        """See Medium.write_manifest. Its name is nobody else's: to send it twice changes nothing."""
        note("manifest-put")
        self.replace(name, data)

    def set_aside(self, names: Iterable[str]) -> None:
        """See Medium.set_aside: copied by the store itself, then removed."""
        taken = set(self.names())
        for name in names:
            target, number = name + CORRUPT_SUFFIX, 0
            while target in taken:
                number += 1
                target = f"{name}{CORRUPT_SUFFIX}.{number}"
            with suppress(FileNotFoundError):  # another reader was faster
                self._ask(lambda a=name, b=target: self._files.cp_file(self._at(a), self._at(b)))  # type: ignore[misc]
                self.remove([name])

    def remove(self, names: Iterable[str]) -> list[str]:
        """See Medium.remove."""
        removed = []
        for name in names:
            with suppress(FileNotFoundError):
                self._ask(lambda n=name: self._files.rm_file(self._at(n)))  # type: ignore[misc]
                removed.append(name)
        return removed

    def sync(self) -> None:
        """Nothing: a removal that was answered is durable."""

    # --- the pointer: an object that names the data, swapped by If-Match

    def pointer(self) -> str | None:
        """See Medium.pointer."""
        try:
            return str(json.loads(self.read(POINTER_OBJECT))["data"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def point_to(self, target: str, *, epoch: int, note: Trace) -> None:
        """See Medium.point_to. A pointer of a later epoch stays: its attempt has taken over."""
        text = json.dumps({"data": target, "fence_epoch": epoch}).encode() + b"\n"
        for _ in range(_POINTER_TRIES):
            tag = self._tag(POINTER_OBJECT)
            if tag is None:
                note("pointer-put")
                if self.create(POINTER_OBJECT, text, note=_untraced, mine=lambda content: content == text):
                    return
                continue
            if self._pointer_epoch() > epoch:
                return
            note("pointer-put")
            if self.replace_if(POINTER_OBJECT, text, tag=tag) or self.read(POINTER_OBJECT) == text:
                return
        raise OSError(errno.EBUSY, f"{POINTER_OBJECT} changes faster than it can be swapped")

    def _tag(self, name: str) -> str | None:
        """ETag of an object, None without one; read before the content, so that a change in between is noticed."""
        try:
            info = self._ask(lambda: self._files.info(self._at(name), refresh=True))
        except FileNotFoundError:
            return None
        return str(info.get("ETag", ""))

    def _pointer_epoch(self) -> int:
        try:
            return int(json.loads(self.read(POINTER_OBJECT))["fence_epoch"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return -1

    # --- what is left, what went wrong

    def is_stale(self, name: str, epoch: int) -> bool:
        """Never: an upload that was not finished left no object."""
        return False

    def failure(self, error: OSError, doing: str) -> CheckpointError:
        """See Medium.failure."""
        return CheckpointError(f"could not {doing} in {self.uri}: {describe(error)}", hint=_hint(error))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _require_room(self, size: int) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.scratch).free
        if free < size:
            raise OSError(errno.ENOSPC, f"{self.scratch} has {free} bytes free, {size} are needed")

    def _ask(self, request: Callable[[], T]) -> T:
        """One request, again until it is answered or patience ends. Raises OSError."""
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self._patience_s()),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5.0),
            retry=tenacity.retry_if_exception(_is_transient),
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return retrying(request)
        except OSError:
            raise
        except Exception as error:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


def _connect(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises CheckpointError."""
    import fsspec

    try:
        files, root = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        raise CheckpointError(
            f"{url}: its library is not installed: {error}",
            hint="for S3: pip install 'orch[s3]', here and in the job's image or environment",
        ) from error
    except (ValueError, TypeError) as error:  # an unknown scheme, an option that the library does not take
        raise CheckpointError(
            f"{url}: {error}", hint="check checkpoint.uri and checkpoint.storage_options (docs/object-stores.md)"
        ) from error
    return files, str(root)


def _untraced(operation: str) -> None:
    """The trace of a caller that wants none."""


def _code_of(error: BaseException) -> str:
    """S3's word for an error (`PreconditionFailed`); empty where there is none."""
    response = getattr(error.__cause__ or error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _is_conflict(error: OSError) -> bool:
    return isinstance(error, FileExistsError) or _code_of(error) in _CONFLICTS


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: busy, broken or late, or credentials that were just renewed."""
    if not isinstance(error, Exception):
        return False
    if isinstance(error, OSError):
        if isinstance(error, (FileNotFoundError, FileExistsError)) or _code_of(error) in _CONFLICTS:
            return False
        return _code_of(error) in _EXPIRED or error.errno is None or error.errno in _TRANSIENT
    module = type(error).__module__.partition(".")[0]
    return module in ("botocore", "aiobotocore", "aiohttp", "fsspec", "urllib3")


def _hint(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "check the credentials, and what they may do there; the previous checkpoint stands"
    if isinstance(error, FileNotFoundError):
        return "the bucket must exist: orch creates none"
    return "check the store; the previous checkpoint stands"

"""Checkpoints in an object store, through fsspec (S3 by s3fs; whatever else passes the probe).

Objects appear whole or not at all, so nothing here is renamed: a save is staged in a local file, uploaded under a name
that nobody else has, and made visible by its manifest. What must be exclusive (fences) is created with If-None-Match.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import tenacity

from orchestrator.checkpoint.manifest import CORRUPT_SUFFIX, CheckpointName, FileEntry
from orchestrator.checkpoint.medium import Problem, Reading, Trace, Vanished
from orchestrator.checkpoint.posix import Directory
from orchestrator.checkpoint.store import CheckpointStore, describe
from orchestrator.checkpoint.stream import HashingWriter
from orchestrator.errors import CheckpointError

_log = logging.getLogger(__name__)

POINTER_OBJECT = "last.json"
_S3 = ("s3://", "s3a://")
_ONE_TRY = {"retries": {"total_max_attempts": 1}}
_CHUNK_BYTES = 8 << 20
_MOST_PARTS = 10_000  # of one S3 object
_LANES_PER_CORE = 2
_TRANSIENT = (
    errno.EBUSY,
    errno.EIO,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.EPIPE,
)
# What a store says of a request that was damaged or delayed on its way.
_TRANSIENT_CODES = (
    "BadDigest",
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "RequestTimeout",
    "ConditionalRequestConflict",
)
_CONFLICTS = ("PreconditionFailed", "412")
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
_MISCONFIGURED = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError")
_MUTE = "400"  # all that HEAD, whose answers have no body, can say of expired credentials
PATIENCE_S = 60.0
_LEAST_S = 5.0  # for one request, however little patience is left: 0 would never succeed
_POINTER_TRIES = 10
_SECOND_LOOK_S = 0.5


class ObjectStore(CheckpointStore):
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

    in_place = False
    lists_at_once = False

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
        self._largest = 0  # bytes of the largest file that was here
        self._is_s3 = self.uri.startswith(_S3)
        self._lanes = 1
        if self._is_s3:
            # Repeating and splitting is done here alone, where the patience is known: botocore and s3fs together would
            # send every request up to 25 times and take minutes over it.
            self._lanes, self._files.max_concurrency, self._files.retries = self._files.max_concurrency, 1, 1
            # Signatures and checksums take a core: more parts at once than that only get into each other's way.
            self._lanes = min(self._lanes, _LANES_PER_CORE * len(os.sched_getaffinity(0)))

    @property
    def creates_atomically(self) -> bool:
        """False where fsspec itself looks whether an object exists, and then writes: two may find that it does not."""
        from fsspec.asyn import AsyncFileSystem
        from fsspec.spec import AbstractFileSystem

        if isinstance(self._files, AsyncFileSystem):
            return True
        return type(self._files).pipe_file is not AbstractFileSystem.pipe_file

    # --- reading

    def names(self) -> list[str]:
        """See Medium.names."""
        return list(self.sizes())

    def sizes(self) -> dict[str, int]:
        """See Medium.sizes."""
        try:
            found = self._ask("ls", self._root, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        return {
            str(entry["name"]).rpartition("/")[2]: int(entry.get("size") or 0)
            for entry in found
            if str(entry["name"]).rstrip("/") != self._root
        }

    def read(self, name: str) -> bytes:
        """See Medium.read."""
        return bytes(self._ask("cat_file", self._at(name)))

    def examine(
        self, entry: FileEntry, *, committed: Callable[[], bool], keep: bool = False, reading: Reading | None = None
    ) -> Problem | None:
        """See Medium.examine; kept as a local file."""
        for delay in (_SECOND_LOOK_S, None):  # before a mismatch or an absence is believed
            problem = self._look(entry, committed, keep, reading)
            if problem is None and keep:
                self._kept.add(entry.name)
            if problem is None or not problem.certain or delay is None:
                break
            self._sleep(delay)
        return problem

    def _look(
        self, entry: FileEntry, committed: Callable[[], bool], keep: bool, reading: Reading | None
    ) -> Problem | None:
        try:
            words = self._download(entry, keep, reading)
        except FileNotFoundError as error:
            if not committed():
                raise Vanished(entry.name) from error
            # Of a name that is still listed, "not found" says that a server is not well: that is no damage.
            gone = entry.name not in self.names()
            return Problem(f"{entry.name} is {'missing' if gone else 'listed, but not found'}", certain=gone)
        except OSError as error:
            if not committed():
                raise Vanished(entry.name) from error
            return Problem(describe(error), certain=False)
        return None if words is None else Problem(words, certain=True)

    def fetch(self, entry: FileEntry, copy: BinaryIO, *, reading: Reading | None) -> str | None:
        """See Medium.fetch."""
        return self._receive(entry, copy.write, reading)

    def _download(self, entry: FileEntry, keep: bool, reading: Reading | None) -> str | None:
        if not keep:
            return self._receive(entry, lambda chunk: None, reading)
        with self._in_scratch():
            self._require_room(entry.size)
            staged = self.local(entry.name).open("wb")

        def write(chunk: bytes) -> None:
            with self._in_scratch():
                staged.write(chunk)

        whole = False
        try:
            problem = self._receive(entry, write, reading)
            with self._in_scratch():
                staged.close()
            whole = problem is None
        finally:
            if not whole:  # else every damaged candidate takes the room of a checkpoint
                with suppress(OSError):  # of what it could not write before
                    staged.close()
                self.local(entry.name).unlink(missing_ok=True)
        return problem

    @contextmanager
    def _in_scratch(self) -> Iterator[None]:
        """What goes wrong in the local directory must not be taken for a trouble of the object."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot load a checkpoint through {self.scratch}: {describe(error)}",
                hint="nothing was changed; make room there, or name another directory as checkpoint.scratch",
            ) from error

    def _receive(self, entry: FileEntry, write: Callable[[bytes], object], reading: Reading | None) -> str | None:
        """What is wrong with the object, once all of it has arrived. Raises OSError: to be cut short is no damage."""
        size = self._size(entry.name)
        self._largest = max(self._largest, size)
        if size != entry.size:
            return f"{entry.name} has {size} bytes, its manifest says {entry.size}"
        digest = hashlib.sha256()
        for chunk in self._chunks(entry.name, size):
            digest.update(chunk)
            write(chunk)
            if reading is not None:
                reading(len(chunk))
        if digest.hexdigest() != entry.sha256:
            return f"the content of {entry.name} does not match its hash"
        return None

    def _chunks(self, name: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, _CHUNK_BYTES):
            end = min(start + _CHUNK_BYTES, size)
            yield self._ask("cat_file", self._at(name), start=start, end=end, length=end - start)

    def _size(self, name: str) -> int:
        return int(self._ask("info", self._at(name))["size"])

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
        try:
            self._ask("pipe_file", self._at(name), data, mode="create")
        except OSError as error:
            if not _is_conflict(error):
                raise
            return mine(self.read(name))  # our own request, whose answer got lost
        return True

    def replace(self, name: str, data: bytes) -> None:
        """See Medium.replace."""
        self._ask("pipe_file", self._at(name), data)

    def replace_if(self, name: str, data: bytes, *, tag: str) -> bool:
        """Put a small object in the place of the one with that ETag; False when it is another by now.

        Other stores than S3 are not asked for the condition: fsspec has no word for it.
        """
        if not self._is_s3:
            self.replace(name, data)
            return True
        try:
            self._ask("pipe_file", self._at(name), data, IfMatch=tag)
        except OSError as error:
            if not _is_conflict(error):
                raise
            return False
        return True

    def write_data(self, name: str, write: Callable[[BinaryIO], object], *, note: Trace) -> FileEntry:
        """See Medium.write_data: staged, then uploaded in parallel parts, each with a checksum."""
        while self._kept:  # whoever saves has loaded; their room is needed now
            self.local(self._kept.pop()).unlink(missing_ok=True)
        self._require_room(self._largest)  # before the state is written: the last one was about as large
        staged = self.local(name)
        try:
            with staged.open("wb") as raw:
                stream = HashingWriter(raw)
                note("data-write")
                stream.fill(write)
            note("data-upload")
            self._upload(staged, name, stream.size, None)
        finally:
            staged.unlink(missing_ok=True)
        self._largest = max(self._largest, stream.size)
        return FileEntry(name, stream.size, stream.sha256)

    def put(self, name: str, source: Path, *, reading: Reading | None) -> None:
        """See Medium.put; straight from where it lies."""
        self._upload(source, name, source.stat().st_size, reading)

    def _upload(self, source: Path, name: str, size: int, reading: Reading | None) -> None:
        part = max(_CHUNK_BYTES, math.ceil(size / _MOST_PARTS))
        if self._is_s3 and size > part:
            self._upload_parts(source, name, range(0, size, part), reading)
        else:
            self._ask("put_file", str(source), self._at(name))
            if reading is not None:
                reading(size)
        there = self._size(name)
        if there != size:
            raise OSError(errno.EIO, f"{name} has {there} bytes after {size} were sent")

    def _upload_parts(self, source: Path, name: str, starts: range, reading: Reading | None) -> None:
        bucket, key, _ = self._files.split_path(self._at(name))
        target: dict[str, Any] = {"Bucket": bucket, "Key": key}
        target["UploadId"] = self._ask("call_s3", "create_multipart_upload", **target)["UploadId"]

        def send(number: int) -> dict[str, Any]:
            # botocore adds a checksum that the store compares, unless storage_options forbid it.
            body = os.pread(file.fileno(), starts.step, starts[number - 1])
            answer = self._ask("call_s3", "upload_part", PartNumber=number, Body=body, **target)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            with source.open("rb") as file, ThreadPoolExecutor(self._lanes) as lanes:
                sending = [lanes.submit(send, number) for number in range(1, len(starts) + 1)]
                try:
                    parts = []
                    for start, future in zip(starts, sending, strict=True):
                        parts.append(future.result())
                        if reading is not None:
                            reading(min(starts.step, starts.stop - start))
                except BaseException:
                    lanes.shutdown(cancel_futures=True)
                    raise
            with suppress(FileNotFoundError):  # done already, and the answer got lost; the size will tell
                self._ask("call_s3", "complete_multipart_upload", MultipartUpload={"Parts": parts}, **target)
        except BaseException:
            self._abort(target)
            raise

    def _abort(self, target: Mapping[str, Any]) -> bool:
        try:
            self._ask("call_s3", "abort_multipart_upload", **target)
        except FileNotFoundError:
            return False
        except OSError as error:  # left to a later sweep
            _log.warning("could not abort the upload of %s: %s", target["Key"], describe(error))
            return False
        return True

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
                self._ask("cp_file", self._at(name), self._at(target))
                self.remove([name])

    def remove(self, names: Iterable[str]) -> list[str]:
        """See Medium.remove."""
        removed = []
        for name in names:
            with suppress(FileNotFoundError):
                self._ask("rm_file", self._at(name))
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
            info = self._ask("info", self._at(name), refresh=True)
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

    def abort_uploads(self, epoch: int) -> list[str]:
        """See Medium.abort_uploads. A store that does not list them, or forbids to, is left as it is."""
        if not self._is_s3:
            return []
        try:
            return [name for name, target in self._uploads(epoch) if self._abort(target)]
        except OSError as error:
            # Forbidden, not implemented or, from rclone, NoSuchUpload of a bucket that never had any: the collection
            # goes on.
            _log.debug("unfinished uploads in %s are not listed: %s", self.uri, describe(error))
            return []

    def _uploads(self, epoch: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Uploads that an attempt older than the one of that fence epoch began and did not finish."""
        bucket, prefix, _ = self._files.split_path(self._at(""))
        page: dict[str, Any] = {"IsTruncated": True}
        before = None
        while page.get("IsTruncated"):
            markers = {f"{m}Marker": page[f"Next{m}Marker"] for m in ("Key", "UploadId") if page.get(f"Next{m}Marker")}
            if markers == before:  # a server that says there is more, and not where: it would be asked for ever
                return
            before = markers
            page = self._ask("call_s3", "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **markers)
            for upload in page.get("Uploads", []):
                file_name = str(upload["Key"]).removeprefix(prefix)
                name = CheckpointName.of(file_name)
                if name is not None and name.fence_epoch < epoch:
                    yield file_name, {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}

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

    def _ask(self, operation: str, *args: Any, length: int | None = None, **kwargs: Any) -> Any:
        """One request, again until it is answered (with `length` bytes) or patience ends. Raises OSError."""
        patience = self._patience_s()
        began = time.monotonic()

        def request() -> Any:
            if self._files.async_impl:  # a server that accepts and never answers, or a byte at a time
                kwargs["timeout"] = max(_LEAST_S, began + patience - time.monotonic())
            answer = getattr(self._files, operation)(*args, **kwargs)
            if length is not None and len(answer) != length:
                raise OSError(errno.EIO, "the answer was cut short")
            return answer

        retrying = tenacity.Retrying(
            stop=tenacity.stop_before_delay(patience),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=5.0),
            retry=tenacity.retry_if_exception(_is_transient),
            before_sleep=self._renew_credentials,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return retrying(request)
        except Exception as error:
            if isinstance(error, OSError) and not _is_transient(error):
                raise
            tries = retrying.statistics.get("attempt_number", 1)
            effort = f"gave up after {time.monotonic() - began:.0f} s and {tries} {'try' if tries == 1 else 'tries'}"
            raise _given_up(error, effort) from error

    def _renew_credentials(self, state: tenacity.RetryCallState) -> None:
        """A new session reads the profile and the environment again: somebody may have renewed them there."""
        error = state.outcome.exception() if state.outcome else None
        if self._is_s3 and error is not None and _code_of(error) in (*_EXPIRED, _MUTE):
            self._files.connect(refresh=True)


def _connect(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises CheckpointError."""
    import fsspec

    try:
        if url.startswith(_S3):
            options = {**options, "config_kwargs": {**_ONE_TRY, **options.get("config_kwargs", {})}}
        files, root = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        raise CheckpointError(
            f"{url}: its library is not installed: {error}",
            hint="install it (for S3: s3fs), here and in the job's image or environment",
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
    """Whether the same request may succeed later: busy, broken or late, or credentials that are being renewed."""
    if _code_of(error) in (*_EXPIRED, _MUTE, *_TRANSIENT_CODES):
        return True
    if isinstance(error, OSError):
        refused = isinstance(error, (FileNotFoundError, FileExistsError, PermissionError))
        return not refused and not _is_conflict(error) and (error.errno is None or error.errno in _TRANSIENT)
    if type(error).__name__ in _MISCONFIGURED:
        return False
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, Exception) and module in ("botocore", "aiobotocore", "aiohttp", "fsspec", "urllib3")


def _given_up(error: Exception, effort: str) -> OSError:
    """The last of many failures, with its cause in words; s3fs leaves some of them empty."""
    if _code_of(error) in _EXPIRED:
        return OSError(errno.EKEYEXPIRED, f"the credentials were refused as expired: {error} ({effort})")
    if isinstance(error, TimeoutError):
        return OSError(errno.ETIMEDOUT, f"no answer in time ({effort})")
    if type(error).__name__ in _MISCONFIGURED:
        return PermissionError(errno.EACCES, f"{type(error).__name__}: {error}")
    if isinstance(error, OSError):
        return OSError(error.errno or errno.EIO, f"{error.strerror or error} ({effort})")
    return OSError(errno.EIO, f"{type(error).__name__}: {error} ({effort})")


def _hint(error: OSError) -> str:
    if error.errno == errno.EKEYEXPIRED:
        return "renew the credentials (a profile is read again at every try); the previous checkpoint stands"
    if isinstance(error, PermissionError):
        return (
            "check the credentials, and what they may do there: list their variables under `secrets`, or set "
            "storage_options.profile; the previous checkpoint stands"
        )
    if isinstance(error, FileNotFoundError):
        return "the bucket must exist: orch creates none"
    return "check the store; the previous checkpoint stands"

"""What a committed checkpoint is called and what its manifest says (PROTOCOLS 4). Pure: no file is touched here."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from orchestrator.errors import CheckpointCorrupt

_log = logging.getLogger(__name__)

MANIFEST_VERSION = 1
# What JSON of the wrong shape raises: Infinity and 1000 digits where a number is expected, brackets without end.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
DATA_SUFFIX = ".ckpt"
MANIFEST_SUFFIX = ".json"
CORRUPT_SUFFIX = ".corrupt"
POINTER = "last.ckpt"
INDEX_PART = "index.json"

_STEM = r"step-(?P<step>\d{9,18})\.e(?P<epoch>\d{4,9})\.(?P<nonce>[0-9a-f]{8,32})"
_FILE = re.compile(_STEM + r"(?:\.[a-z0-9][a-z0-9-]{0,31})?\.(?:ckpt|json)")
_TEMPORARY = re.compile(r"\.(?P<final>.+)\.[0-9a-f]{12}\.tmp")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, order=True)
class CheckpointName:
    """`step-000000120.e0002.<nonce>`: optimizer step, fence epoch, and a nonce that makes every save its own file."""

    step: int
    fence_epoch: int
    nonce: str

    @classmethod
    def fresh(cls, step: int, fence_epoch: int) -> CheckpointName:
        """A name no other save has."""
        return cls(step, fence_epoch, os.urandom(4).hex())

    @classmethod
    def parse(cls, file_name: str, suffix: str) -> CheckpointName | None:
        """The name in `<stem><suffix>`, or None when the file is something else (pure)."""
        name = cls.of(file_name)
        return name if name is not None and file_name == name.stem + suffix else None

    @classmethod
    def of(cls, file_name: str) -> CheckpointName | None:
        """The checkpoint that this file is a part of, be it state or manifest; None for anything else (pure)."""
        match = _FILE.fullmatch(file_name)
        if match is None:
            return None
        name = cls(int(match["step"]), int(match["epoch"]), match["nonce"])
        return name if file_name.startswith(name.stem + ".") else None  # e00002 is not how we write e0002

    @classmethod
    def parse_temporary(cls, file_name: str) -> CheckpointName | None:
        """The name in a temporary file of a save (see orchestrator.files.temporary_sibling), else None (pure)."""
        match = _TEMPORARY.fullmatch(file_name)
        return None if match is None else cls.of(match["final"])

    @property
    def stem(self) -> str:
        """What the names of all its files begin with (before a dot)."""
        return f"step-{self.step:09d}.e{self.fence_epoch:04d}.{self.nonce}"

    @property
    def data(self) -> str:
        """File name of the state; of its first part, when there are several."""
        return self.stem + DATA_SUFFIX

    def part(self, part: str) -> str:
        """File name of a further part, `shard-0001.ckpt` or `index.json`. Raises ValueError for what is no part."""
        file_name = f"{self.stem}.{part}"
        if CheckpointName.of(file_name) != self or file_name in (self.data, self.manifest):
            raise ValueError(f"{part!r} is not the name of a part")
        return file_name

    @property
    def manifest(self) -> str:
        """File name of the manifest."""
        return self.stem + MANIFEST_SUFFIX


@dataclass(frozen=True)
class FileEntry:
    """One data file of a checkpoint; `name` is a plain file name in the checkpoint's directory, `size` in bytes."""

    name: str
    size: int
    sha256: str


class Origin(TypedDict):
    """What made a checkpoint, beyond its attempt: the same for every save of it."""

    world_size: int
    code_hash: NotRequired[str | None]
    image: NotRequired[str | None]
    data: NotRequired[str | None]  # fingerprint of the training data, where the training code gives one


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint. Its existence is the commit; `step` counts optimizer steps completed."""

    step: int
    epoch: int
    attempt: int
    fence_epoch: int
    world_size: int
    nonce: str
    files: tuple[FileEntry, ...]
    committed_at: float  # unix seconds, for people: nothing is ever decided by a clock
    directory: str = ""  # where it was read from; not part of the file
    sequence: int = 0  # n-th commit of its process: tells two saves of the same step apart
    base_step: int | None = None  # a copy of its epoch's base, should the fence file be damaged; -1 = from scratch
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)  # finite; as known when it was saved
    code_hash: str | None = None
    image: str | None = None
    data: str | None = None

    @property
    def name(self) -> CheckpointName:
        """What its files are called; follows from its fields."""
        return CheckpointName(self.step, self.fence_epoch, self.nonce)

    @property
    def path(self) -> Path:
        """The file to load (the first one, when there are several)."""
        return Path(self.directory) / self.files[0].name

    def parts(self) -> dict[str, FileEntry]:
        """Its further files by what follows the name of the checkpoint (`shard-0001.ckpt`)."""
        return {entry.name.removeprefix(self.name.stem + "."): entry for entry in self.files[1:]}

    @property
    def sharded(self) -> bool:
        """Whether its tensors lie in shards, in pieces that its index names."""
        return INDEX_PART in self.parts()

    @property
    def location(self) -> str:
        """Path or URL of the file to load (the first one, when there are several)."""
        return f"{self.directory}/{self.files[0].name}"

    @property
    def sha256(self) -> str:
        """Of its data: the file's own; of several files that of the lines `<sha256>  <name>`, sorted by name."""
        if len(self.files) == 1:
            return self.files[0].sha256
        lines = (f"{entry.sha256}  {entry.name}\n" for entry in sorted(self.files, key=lambda entry: entry.name))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Of all its data files together."""
        return sum(entry.size for entry in self.files)

    @property
    def rank(self) -> tuple[int, int, int, str]:
        """Sort key: the highest is the newest."""
        return (self.step, self.fence_epoch, self.sequence, self.nonce)

    def render(self) -> bytes:
        """The bytes of the manifest file (pure)."""
        fields: dict[str, Any] = {
            "version": MANIFEST_VERSION,
            "step": self.step,
            "epoch": self.epoch,
            "attempt": self.attempt,
            "fence_epoch": self.fence_epoch,
            "base_step": self.base_step,
            "sequence": self.sequence,
            "world_size": self.world_size,
            "nonce": self.nonce,
            "files": [{"name": f.name, "size": f.size, "sha256": f.sha256} for f in self.files],
            "code_hash": self.code_hash,
            "image": self.image,
            "committed_at": self.committed_at,
            "metrics": dict(self.metrics),
            "data": self.data,
        }
        return json.dumps(fields, indent=1).encode() + b"\n"


def parse_manifest(data: bytes, *, file_name: str, directory: str) -> Manifest:
    """The manifest in `data` (pure). Raises CheckpointCorrupt for anything but one that belongs to `file_name`.

    Unknown keys are ignored, so that an older reader loads what a newer writer committed.
    """
    try:
        fields = json.loads(data)
        manifest = _from_fields(fields, directory)
    except MALFORMED as error:
        raise CheckpointCorrupt(f"{file_name} is not a manifest: {type(error).__name__}: {error}") from error
    if manifest.name.manifest != file_name:
        # A copied or renamed manifest must not be taken for another step: liveness is decided by the name.
        raise CheckpointCorrupt(f"{file_name} says it is {manifest.name.manifest}")
    check_files(manifest.files, manifest.name)
    return manifest


def _from_fields(fields: Mapping[str, Any], directory: str) -> Manifest:
    if integer(fields["version"]) > MANIFEST_VERSION:
        raise ValueError(f"version {fields['version']} was written by a newer orch")
    base_step, code_hash, image = fields.get("base_step"), fields.get("code_hash"), fields.get("image")
    data = fields.get("data")
    return Manifest(
        step=integer(fields["step"]),
        epoch=integer(fields["epoch"]),
        attempt=integer(fields["attempt"]),
        fence_epoch=integer(fields["fence_epoch"]),
        world_size=integer(fields["world_size"]),
        nonce=str(fields["nonce"]),
        files=tuple(FileEntry(str(f["name"]), integer(f["size"]), str(f["sha256"])) for f in fields["files"]),
        code_hash=None if code_hash is None else str(code_hash),
        image=None if image is None else str(image),
        committed_at=_moment(fields["committed_at"]),
        directory=directory,
        sequence=integer(fields.get("sequence", 0)),
        base_step=None if base_step is None else integer(base_step),
        metrics=finite({str(name): float(value) for name, value in fields.get("metrics", {}).items()}),
        data=None if data is None else str(data),
    )


def _moment(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds):  # whoever shows it as a date would fail
        raise ValueError(f"{seconds} is no moment")
    return seconds


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that can be compared, as numbers: NaN and infinity are none, and are no JSON."""
    numbers = {}
    for name, value in metrics.items():
        try:
            number = float(value)  # of one element, a tensor is a number
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            _log.warning("the metric %s is not saved with the checkpoint, it is no number: %s", name, error)
            continue
        if math.isfinite(number):
            numbers[name] = number
    return numbers


def check_files(files: Sequence[FileEntry], name: CheckpointName) -> None:
    """Raises CheckpointCorrupt for files that no manifest of that checkpoint may list."""
    if not files or files[0].name != name.data:
        raise CheckpointCorrupt(f"{name.manifest} does not begin with {name.data}")
    if len({entry.name for entry in files}) != len(files):
        raise CheckpointCorrupt(f"{name.manifest} names a file twice")
    for entry in files:
        # The name ends up in open(): "../../etc/passwd", "/x" and "a/b" must not leave the directory, and another
        # checkpoint's file must not be quarantined in this one's place.
        if CheckpointName.of(entry.name) != name or entry.name == name.manifest:
            raise CheckpointCorrupt(f"{name.manifest} names a file that is not its own: {entry.name!r}")
        if entry.size < 0 or _SHA256.fullmatch(entry.sha256) is None:
            raise CheckpointCorrupt(f"{name.manifest} has no usable size and hash for {entry.name}")


def integer(value: object) -> int:
    """`value` if it is an integer, else TypeError: JSON's true and 1.0 are none (pure)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected an integer, found {value!r}")
    return value

"""What the verbs about images return. Apart from `results`, which every command imports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LockedImage:
    """Outcome of `image lock`: the reference to write into the spec."""

    given: str
    image: str
    # "registry" (pullable anywhere) | "local" (this engine only) | "file" | "given" (a pin) | "lock" (a name's)
    source: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NamedImage:
    """A name in a lock file; `before` is what it pinned until now."""

    name: str
    image: LockedImage
    path: str
    before: str | None

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, **self.image.as_json(), "path": self.path, "before": self.before}


@dataclass(frozen=True)
class BuiltImage:
    """Outcome of `image build`: an image in the builder's store. `revision` is "" outside git."""

    image: str  # the id there: sha256:…
    tag: str
    builder: str
    reproducible: bool  # the same inputs give the same id
    lock_sha256: str
    revision: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PulledImage:
    """An image that is here: as a file of the root (`path`, its size), or in an engine of this machine."""

    image: str
    runtime: str
    path: str | None
    size_bytes: int | None
    was_here: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CheckedImage:
    """Outcome of `image verify`: `problem` is None where the image is the one that its pin names."""

    image: str
    path: str | None
    problem: str | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PrunedImages:
    """Outcome of `image prune`; with `dry_run`, what it would be."""

    removed: tuple[PulledImage, ...]
    freed_bytes: int
    left_bytes: int
    dry_run: bool

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "removed": [image.as_json() for image in self.removed]}

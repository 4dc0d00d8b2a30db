"""Which image references a spec accepts: pinned by digest, or a name that a lock file pins; nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import SpecError

LOCK_FILE = Path("containers", "images.lock.json")
_LOCK_VERSION = 1
NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")

_HEX = re.compile(r"[0-9a-f]{64}")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_REPOSITORY = re.compile(
    rf"(?:{_HOST}/)?{_COMPONENT}(?:/{_COMPONENT})*(?::{_TAG})?"
)  # the distribution reference grammar


_FILE = re.compile(r"(?P<path>.+\.(?:sif|sqsh|squashfs))(?:@(?P<digest>.*))?", re.DOTALL)


def file_pin(image: str) -> tuple[str, str | None] | None:
    """(path, what is behind the `@`) of an image that is a file; None for any other reference."""
    found = _FILE.fullmatch(image)
    return None if found is None else (found["path"], found["digest"])


FILE_SUFFIXES = {"apptainer": (".sif", ".sqsh", ".squashfs"), "pyxis": (".sqsh", ".squashfs")}
"""Of the runtimes that run image files, what they can read."""


def runtime_refusal(image: str, runtime: str) -> str | None:
    """Why a runtime cannot run a pinned image, with what it can."""
    file, suffixes = file_pin(image), FILE_SUFFIXES.get(runtime)
    if suffixes is None:
        return None if file is None else f"{runtime} runs no image files; write repository@sha256:…, or use apptainer"
    if image.startswith("sha256:"):
        return (
            f"{image[:19]}… is an id of one engine; {runtime} takes repository@sha256:… or PATH{suffixes[0]}@sha256:…"
        )
    if file is not None and not file[0].endswith(suffixes):
        return f"{runtime} does not run {file[0]}; it takes files that end in {' or '.join(suffixes)}"
    return None


def mount_refusal(path: str, runtime: str) -> str | None:
    """Why a runtime cannot mount a path: enroot reads mounts as fields of an fstab."""
    if runtime == "pyxis" and re.search(r"[\s:\\]", path):
        return f"pyxis cannot mount {path!r}: it may hold no space, no colon and no backslash"
    return None


def repository_of(reference: str) -> str:
    """`host:5000/team/image:tag@sha256:…` → `host:5000/team/image`."""
    name = reference.partition("@")[0]
    head, slash, tail = name.rpartition("/")
    return head + slash + tail.partition(":")[0]


def without_tag(pin: str) -> str:
    """`repository:tag@sha256:…` → `repository@sha256:…`: the digest decides, and not every engine takes both."""
    return pin if file_pin(pin) is not None or "@" not in pin else f"{repository_of(pin)}@sha256:{digest_of(pin)}"


def digest_of(pin: str) -> str:
    """`repository:tag@sha256:…` → the 64 hexadecimal digits."""
    return pin.rpartition("@sha256:")[2]


def image_refusal(image: str) -> str | None:
    """Why an image reference is not a pin, with the command that makes one; None when it is."""
    file = file_pin(image)
    if file is not None:
        return _file_refusal(*file)
    name, at, digest = image.rpartition("@")
    if not at and image.startswith("sha256:"):
        digest = image
    elif not at:
        return _tag_refusal(image)
    elif not _REPOSITORY.fullmatch(name):
        return f'"{name}" is not a repository name (lower case, such as ghcr.io/lab/train)'
    return _digest_refusal(digest)


def _digest_refusal(digest: str) -> str | None:
    algorithm, _, value = digest.partition(":")
    if algorithm != "sha256":
        return f'"{digest}" is not a digest; write sha256: and 64 hexadecimal digits'
    if _HEX.fullmatch(value):
        return None
    if _HEX.fullmatch(value.lower()):
        return "a digest is written in lower case"
    return f"a digest is sha256: and 64 hexadecimal digits; here are {len(value)} characters"


def _file_refusal(path: str, digest: str | None) -> str | None:
    if digest is None:
        return f"the file {path} can change under a running job. Pin its content:  orch image lock {path}"
    return _digest_refusal(digest)


def _tag_refusal(image: str) -> str:
    if not _REPOSITORY.fullmatch(image):
        return f'"{image[:80]}" is not an image reference; write repository@sha256:… or sha256:…'
    kind = "is a tag" if ":" in image.rpartition("/")[2] else "has no digest, so it means the tag `latest`"
    return f'"{image}" {kind}, and a tag can change under a running job. Pin it:  orch image lock {image}'


# --- names


@dataclass(frozen=True)
class ImageLock:
    """What names mean: `images.lock.json`, kept beside the code and committed with it."""

    path: Path
    images: Mapping[str, Mapping[str, Any]]  # name → {"image": the pin, "from": what was locked}

    def pin(self, name: str) -> str | None:
        """The reference that a name stands for."""
        entry = self.images.get(name)
        return None if entry is None else str(entry["image"])

    def render(self) -> bytes:
        """The file's content: the same names give the same bytes."""
        document = {"version": _LOCK_VERSION, "images": self.images}
        return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


def find_lock(directory: Path) -> Path | None:
    """The nearest `containers/images.lock.json` at or above a directory."""
    return next((base / LOCK_FILE for base in (directory, *directory.parents) if (base / LOCK_FILE).is_file()), None)


def read_lock(path: Path) -> ImageLock:
    """Raises SpecError for anything but a lock file whose pins are pins."""
    hint = "it is written by `orch image lock TAG --name NAME`; take the version that was committed, or lock again"
    try:
        document = json.loads(path.read_bytes())
        version, images = document["version"], document["images"]
        pins = {name: str(entry["image"]) for name, entry in images.items()}
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}", hint=hint) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"{path} is not a lock file of images", hint=hint) from error
    if version != _LOCK_VERSION:
        raise SpecError(f"{path} has version {version}, this orch reads {_LOCK_VERSION}", hint="use a newer orch")
    for name, pin in pins.items():
        if reason := image_refusal(pin):
            raise SpecError(f"{path}: {name}: {reason}", hint=hint)
    return ImageLock(path, images)

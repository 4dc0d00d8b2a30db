"""Which image references a spec accepts: pinned by digest, nothing else."""

from __future__ import annotations

import re

_HEX = re.compile(r"[0-9a-f]{64}")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_REPOSITORY = re.compile(
    rf"(?:{_HOST}/)?{_COMPONENT}(?:/{_COMPONENT})*(?::{_TAG})?"
)  # the distribution reference grammar


def image_refusal(image: str) -> str | None:
    """Why an image reference is not a pin, with the command that makes one; None when it is."""
    name, at, digest = image.rpartition("@")
    if not at and image.startswith("sha256:"):
        digest = image
    elif not at:
        return _tag_refusal(image)
    elif not _REPOSITORY.fullmatch(name):
        return f'"{name}" is not a repository name (lower case, such as ghcr.io/lab/train)'
    algorithm, _, value = digest.partition(":")
    if algorithm != "sha256":
        return f'"{digest}" is not a digest; write sha256: and 64 hexadecimal digits'
    if _HEX.fullmatch(value):
        return None
    if _HEX.fullmatch(value.lower()):
        return "a digest is written in lower case"
    return f"a digest is sha256: and 64 hexadecimal digits; here are {len(value)} characters"


def _tag_refusal(image: str) -> str:
    if not _REPOSITORY.fullmatch(image):
        return f'"{image[:80]}" is not an image reference; write repository@sha256:… or sha256:…'
    kind = "is a tag" if ":" in image.rpartition("/")[2] else "has no digest, so it means the tag `latest`"
    return f'"{image}" {kind}, and a tag can change under a running job. Pin it:  orch image lock {image}'

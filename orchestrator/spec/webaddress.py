"""What counts as the URL of a webhook; without pydantic, since nodes ask it too."""

from __future__ import annotations

from urllib.parse import urlsplit


def is_web_address(text: str) -> bool:
    """True for an http or https URL with a host, that urllib takes as it is."""
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half a pair of brackets
        return False
    return known and text.isascii() and text.isprintable() and " " not in text

"""Whether checkpoints can be kept in an object store, tried with the credentials of this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.checkpoint import open_store
from orchestrator.errors import CheckpointError

PATIENCE_S = 10.0


@dataclass(frozen=True)
class StoreFacts:
    """`error`: why nothing can be kept there. `weaknesses`: a sentence for each guarantee that is missing."""

    uri: str
    error: str = ""
    hint: str | None = None
    weaknesses: tuple[str, ...] = ()


def probe_store(checkpoint: Mapping[str, Any]) -> StoreFacts:
    """`checkpoint`: uri, storage_options and fence of a spec. Leaves nothing behind."""
    uri = str(checkpoint["uri"])
    try:
        store = open_store(
            uri,
            storage_options=checkpoint["storage_options"],
            claim_on_disk=checkpoint["fence"] == "disk",
            patience_s=lambda: PATIENCE_S,
        )
        return StoreFacts(uri, weaknesses=store.weaknesses())
    except CheckpointError as error:
        return StoreFacts(uri, error=error.message, hint=error.hint)

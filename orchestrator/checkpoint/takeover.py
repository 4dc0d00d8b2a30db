"""How an attempt begins: it finds where to go on and claims the run (PROTOCOLS 4)."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.checkpoint.found import Found, Load
from orchestrator.checkpoint.lineage import Fence
from orchestrator.checkpoint.store import CheckpointStore
from orchestrator.errors import CheckpointCorrupt, CheckpointError, Fenced


def take_over(
    store: CheckpointStore,
    *,
    attempt: int,
    accept: Callable[[Found | None], None] = lambda found: None,
    load: Load | None = None,
) -> tuple[Found | None, Fence]:
    """Find the checkpoint to resume from and claim the run; the two are one step for everybody else.

    An older attempt that is still alive may commit between the two; then the newer checkpoint is taken. `load` as in
    `find`. Raises as `find` and `open_epoch` do, and as `accept`, which is asked before anything is claimed.
    """
    for retries_left in range(4, -1, -1):
        found = store.find(load=load)
        accept(found)
        base = found.manifest if found else None
        try:
            return found, store.open_epoch(attempt=attempt, base=base)
        except (Fenced, CheckpointCorrupt):
            raise
        except CheckpointError:
            live = store.manifests()
            gone = base is not None and base.name not in (manifest.name for manifest in live)  # collected, or replaced
            moved = bool(live) and (base is None or live[0].rank > base.rank)
            if not (gone or moved) or not retries_left:
                raise
            del found  # what was loaded of it must not stand beside the next
    raise AssertionError("unreachable")

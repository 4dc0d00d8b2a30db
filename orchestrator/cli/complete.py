"""Shell completion of run ids: directory names only, nothing is parsed and no scheduler is asked."""

from __future__ import annotations

_MOST = 200


def run_ids(incomplete: str) -> list[str]:
    """Ids that begin with what was typed, from every known root."""
    from orchestrator.errors import OrchError
    from orchestrator.operations.roots import known_roots, run_names

    try:
        names = {name for root in known_roots() for name in run_names(root)}
    except OrchError:
        return []  # the shell is waiting for words; the command itself will say what is wrong
    return sorted(name for name in names if name.startswith(incomplete))[:_MOST]

"""Every verb is a function of `orchestrator` itself, and of `orchestrator.operations`."""

from __future__ import annotations

import orchestrator
from orchestrator import operations


def test_the_package_offers_every_operation() -> None:
    assert orchestrator.__all__ == operations.__all__


def test_every_name_is_there() -> None:
    assert all(callable(getattr(orchestrator, name)) for name in orchestrator.__all__)

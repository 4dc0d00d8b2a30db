"""From what an object store did to findings: can checkpoints be kept there, and which guarantee is missing."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.operations.checkup.findings import Family, Finding, Level
from orchestrator.worker.probe.store import StoreFacts

_TOPIC = "checkpoints"


def store_findings(facts: StoreFacts) -> Iterator[Finding]:
    """One finding, or one for every guarantee that is missing."""
    if facts.error:
        yield Finding(_TOPIC, Level.BAD, facts.error, facts.hint, Family.STORE)
        return
    if not facts.weaknesses:
        message = f"{facts.uri}: writable, consistent, honours conditional writes"
        yield Finding(_TOPIC, Level.OK, message, None, Family.STORE)
    for weakness in facts.weaknesses:
        yield Finding(_TOPIC, Level.WARN, f"{facts.uri}: {weakness}", None, Family.STORE)

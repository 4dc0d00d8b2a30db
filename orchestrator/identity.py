"""Who a run is: pure functions from what was asked to its name (PROTOCOLS 1)."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.spec import JobSpec

AGENT_PLAN_VERSION = 2
"""Version of plan/agent.json, written by `plan`, read by the agents; counts up when an older agent would misread it."""

HASH_VERSION = 1
"""Part of what is hashed: a change of the rule below makes other runs, never the same name for other work."""


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8; raises ValueError on NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def identity_fields(spec: JobSpec, code_hash: str) -> dict[str, Any]:
    """What makes a run this run: the same fields give the same bytes on every machine.

    Not in it: where and with how much it runs (backend, resources, torchrun, slurm, mounts), how it is kept safe
    (checkpoint, preemption, retry), when it starts (after), who is told (notify), secrets, and what people write on it
    (tags, notes).
    """
    job = spec.job.model_dump(mode="json")
    image = spec.container.image
    return {
        "hash_version": HASH_VERSION,
        "name": spec.name,
        "job": {key: value for key, value in job.items() if value is not None},
        "env": dict(spec.env),
        "image": image[image.index("sha256:") :] if image is not None and "sha256:" in image else image,
        "code": code_hash,
    }


def run_id(spec: JobSpec, code_hash: str, ordinal: int = 1) -> str:
    """`<name>-<10 hex>`; the second and later copies asked for with `--new` end in their ordinal (`…-2`)."""
    digest = hashlib.sha256(canonical_json(identity_fields(spec, code_hash))).hexdigest()[:10]
    return f"{spec.name}-{digest}" if ordinal == 1 else f"{spec.name}-{digest}-{ordinal}"


def attempt_number(base: int, restart_count: int) -> int:
    """Number of an attempt: those made before this submission, plus the scheduler's own restarts of it."""
    return base + restart_count


def rendezvous_port(run_id: str, attempt: int, job_id: str) -> int:
    """A port in 20000…29999 that all nodes derive alike and two jobs on one node rarely share (FACTS 3)."""
    digest = hashlib.sha256(f"{run_id}.{attempt}.{job_id}".encode()).digest()
    return 20000 + int.from_bytes(digest[:4], "big") % 10000

"""`validate`: everything that can be known about a spec without a scheduler, an engine or a write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from orchestrator.errors import SpecError
from orchestrator.operations.dependencies import full_ids
from orchestrator.operations.results import Validated
from orchestrator.operations.submission import Request, SpecLike, prepare


def validate(
    spec: SpecLike,
    *,
    overrides: Iterable[str] = (),
    root: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Validated:
    """Load the spec and hash its code. Raises SpecError listing every problem; warnings are things to know."""
    request = prepare(spec, overrides=overrides, root=root, environ=environ)
    snapshot = request.snapshot
    return Validated(
        name=request.spec.name,
        run_id=request.run_id(),
        code_hash=snapshot.code_hash,
        code_files=len(snapshot.files),
        code_bytes=snapshot.size_bytes,
        warnings=(*_warnings(request.spec.secrets, request.root, environ), *_unknown_runs(request)),
    )


def _unknown_runs(request: Request) -> Iterable[str]:
    for entry in request.spec.after:
        try:
            full_ids([entry], request.root, request.run_id())
        except SpecError as error:
            yield f"{error.message}; `orch submit` will refuse until it is there"


def _warnings(secrets: Iterable[str], root: Path, environ: Mapping[str, str]) -> Iterable[str]:
    for name in secrets:
        if name not in environ:
            yield f"secrets: {name} is not set in this environment; `orch submit` will refuse until it is"
    existing = next((parent for parent in (root, *root.parents) if parent.exists()), root)
    if not os.access(existing, os.W_OK):
        yield f"root: {existing} is not writable for you"

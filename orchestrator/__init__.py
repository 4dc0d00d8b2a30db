"""`orch`: a spec becomes a run that cannot lose work.

The package itself imports nothing, so that `import orchestrator` costs nothing on a login node; reading the folder
list top to bottom (spec, identity, plan, backends, worker, checkpoint, registry) is reading how a spec travels.

In Python the verbs of the command line are functions here, loaded on first use: `orchestrator.submit("spec.yaml")`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.operations import (
        build_image,
        cancel,
        collect_checkpoints,
        doctor,
        list_checkpoints,
        list_images,
        lock_image,
        logs,
        name_image,
        open_shell,
        plan_of,
        preempt,
        prune_images,
        ps,
        pull_checkpoint,
        pull_image,
        push_checkpoint,
        resume,
        resume_all,
        rollback,
        shell,
        status,
        submit,
        top,
        validate,
        verify_checkpoints,
        verify_drill,
        verify_images,
        wait,
    )

__version__ = "0.1.0"
__all__ = [
    "build_image",
    "cancel",
    "collect_checkpoints",
    "doctor",
    "list_checkpoints",
    "list_images",
    "lock_image",
    "logs",
    "name_image",
    "open_shell",
    "plan_of",
    "preempt",
    "prune_images",
    "ps",
    "pull_checkpoint",
    "pull_image",
    "push_checkpoint",
    "resume",
    "resume_all",
    "rollback",
    "shell",
    "status",
    "submit",
    "top",
    "validate",
    "verify_checkpoints",
    "verify_drill",
    "verify_images",
    "wait",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orchestrator import operations

    return getattr(operations, name)

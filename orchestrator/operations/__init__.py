"""The verbs. What the command line, a web page and Python users call; errors are those of `orchestrator.errors`.

Names are loaded on first use, so that `status` does not pay for `submit`; no module here
may carry the name of a verb, or importing it would replace the function in this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.operations.attach import open_shell, shell, top
    from orchestrator.operations.checkpoints import (
        collect_checkpoints,
        list_checkpoints,
        pull_checkpoint,
        push_checkpoint,
        rollback,
        verify_checkpoints,
    )
    from orchestrator.operations.checkup.examine import doctor
    from orchestrator.operations.control import cancel, preempt, resume, resume_all
    from orchestrator.operations.describe import ps, status
    from orchestrator.operations.drill import verify_drill
    from orchestrator.operations.image_build import build_image
    from orchestrator.operations.image_stock import prune_images, pull_image, verify_images
    from orchestrator.operations.images import list_images, lock_image, name_image
    from orchestrator.operations.precheck import validate
    from orchestrator.operations.submission import plan_of, submit
    from orchestrator.operations.tail import logs
    from orchestrator.operations.waiting import wait

_HOMES = {
    "attach": ("open_shell", "shell", "top"),
    "checkpoints": (
        "collect_checkpoints",
        "list_checkpoints",
        "pull_checkpoint",
        "push_checkpoint",
        "rollback",
        "verify_checkpoints",
    ),
    "checkup.examine": ("doctor",),
    "control": ("cancel", "preempt", "resume", "resume_all"),
    "image_build": ("build_image",),
    "image_stock": ("prune_images", "pull_image", "verify_images"),
    "images": ("list_images", "lock_image", "name_image"),
    "tail": ("logs",),
    "describe": ("ps", "status"),
    "drill": ("verify_drill",),
    "submission": ("plan_of", "submit"),
    "precheck": ("validate",),
    "waiting": ("wait",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

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
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

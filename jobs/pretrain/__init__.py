"""Pretraining without labels: `python -m jobs.pretrain --data=… --epochs=4` or `from jobs.pretrain import pretrain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.pretrain.run import PretrainResult
    from jobs.pretrain.settings import PretrainSettings

__all__ = ["pretrain"]


def pretrain(settings: PretrainSettings | None = None, **values: Any) -> PretrainResult:
    """Pretrain a model and export it; blocks until done. Resumes by itself from what the run directory holds.

    Pass a settings object, or its fields as keywords (docs/training.md). When the run is asked to stop, the process
    saves and ends; this function does not return then. Raises SpecError for wrong settings, RefusedError for changed
    ones.
    """
    from jobs.pretrain.run import run
    from jobs.pretrain.settings import parse_settings

    return run(settings if settings is not None else parse_settings(values))

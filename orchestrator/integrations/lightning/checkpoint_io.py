"""Sends the session's own saves through its checkpoint store; everything else stays with Lightning's plugin."""

from __future__ import annotations

from typing import Any

from lightning.fabric.plugins import CheckpointIO

from orchestrator.integrations.lightning.atomic_io import readable
from orchestrator.integrations.lightning.starting_point import Start, check_content
from orchestrator.integrations.saving import StateSaver
from orchestrator.worker.session import Session


class SessionCheckpointIO(CheckpointIO):
    """`trainer.save_checkpoint(io.target)` becomes a commit: streamed, hashed, fenced. Lightning calls it on rank 0.

    While `leaving` is set, the process is about to end: nothing is left to be written beside the training.
    """

    def __init__(self, session: Session, inner: CheckpointIO, start: Start | None = None) -> None:
        self.leaving = False
        self._session = session
        self._saver = StateSaver(session)
        self._inner = inner
        self._foreign = start.path if start is not None and start.foreign else None
        self.metrics: dict[str, float] = {}  # known at the time of the save
        self.target = f"{session.store.uri}/commit"

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if str(path) != self.target:
            self._inner.save_checkpoint(checkpoint, path, storage_options)
            return
        self._saver.save(
            checkpoint,
            step=checkpoint["global_step"],
            epoch=checkpoint["epoch"],
            metrics=self.metrics,
            leaving=self.leaving,
        )

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        if weights_only is None and self._session.wrote(str(path)):
            weights_only = True  # ours hold plain types and tensors only
        with readable(path):
            loaded = self._inner.load_checkpoint(path, map_location=map_location, weights_only=weights_only)
        if str(path) == self._foreign:
            check_content(self._foreign, loaded)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        self._inner.remove_checkpoint(path)

    def teardown(self) -> None:
        self._inner.teardown()

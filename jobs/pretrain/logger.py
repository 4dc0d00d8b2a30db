"""The job's logger: metrics.csv, and one line an epoch for whoever follows the log."""

from __future__ import annotations

import logging

from orchestrator.integrations.lightning import RunLogger
from orchestrator.worker.session import Session

log = logging.getLogger("jobs.pretrain")


class EpochLogger(RunLogger):
    """A RunLogger that also says when an epoch is done."""

    def __init__(self, session: Session, *, epochs: int) -> None:
        super().__init__(session)
        self._epochs, self._says = epochs, session.is_chief  # Lightning calls every rank's logger

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        if self._says and "loss_epoch" in metrics and "epoch" in metrics:
            log.info("epoch %d of %d done, loss %.4g", int(metrics["epoch"]) + 1, self._epochs, metrics["loss_epoch"])

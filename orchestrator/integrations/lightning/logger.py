"""A Lightning logger that writes the run's `metrics.csv`: equal files for an untouched and an interrupted run."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers.logger import Logger

from orchestrator.worker.session import Session

if TYPE_CHECKING:
    from orchestrator.registry import MetricsLog


class RunLogger(Logger):
    """Rows `step,epoch,name,value`; `step` counts *completed* optimizer steps.

    A resumed attempt keeps exactly the rows its checkpoint knows of: those up to its step, and at most as many as were
    written when it was saved.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self._log: MetricsLog | None = None
        self._keep_rows: int | None = None

    @property
    def name(self) -> str:
        return self._session.run_id

    @property
    def save_dir(self) -> str:
        """Where Lightning puts what it saves itself: the run directory, because the job's code copy is read-only."""
        return str(self._session.run_dir)

    @property
    def version(self) -> int:
        return self._session.attempt

    def open(self) -> None:
        """Cut the file back to the resumed step (rank 0). Once; at the latest before the first row."""
        if self._log is None and self._session.is_chief:
            self._log = self._session.open_metrics(keep_rows=self._keep_rows)

    def state_dict(self) -> dict[str, int | None]:
        """What a checkpoint notes of this file: how many rows it has. The rows are made durable first."""
        if self._log is None:
            return {"rows": None}
        self._log.sync()
        return {"rows": self._log.rows}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Call before `open`."""
        self._keep_rows = state["rows"]

    def log_rows(self, values: dict[str, float], *, step: int, epoch: int) -> None:
        """Append rows for `step` completed steps (rank 0)."""
        self.open()
        if self._log is not None:
            self._log.append(step, epoch, values)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = dict(metrics)
        epoch = int(values.pop("epoch", 0))
        self.log_rows(values, step=0 if step is None else step + 1, epoch=epoch)  # Lightning numbers from 0

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Settings are recorded in the sidecar and environment.json."""

    def finalize(self, status: str) -> None:
        """Rows are on disk already; Lightning says "failed" here for a stop too."""

"""The line an epoch leaves in the job's log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
]

from jobs.pretrain.logger import EpochLogger  # noqa: E402
from orchestrator.worker.session import Session  # noqa: E402


@pytest.mark.parametrize(("rank", "said"), [("0", ["epoch 2 of 4 done, loss 4.5"]), ("1", [])])
def test_rank_0_says_that_an_epoch_is_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rank: str, said: list[str]
) -> None:
    environ = {"ORCH_RUN_ID": "r", "ORCH_RUN_DIR": str(tmp_path), "WORLD_SIZE": "2", "RANK": rank}
    session = Session.start(environ=environ)
    logger = EpochLogger(session, epochs=4)
    with caplog.at_level(logging.INFO):
        logger.log_metrics({"loss_step": 4.25, "epoch": 1}, 9)
        logger.log_metrics({"loss_epoch": 4.5, "epoch": 1}, 9)
    session.close()
    assert [record.getMessage() for record in caplog.records] == said
    assert (tmp_path / "metrics.csv").exists() is (rank == "0")

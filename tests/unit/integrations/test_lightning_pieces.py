"""The parts of the Lightning integration that need no training; tests/integration runs the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
]

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from orchestrator.errors import CheckpointError  # noqa: E402
from orchestrator.integrations.lightning.callback import ExactResume  # noqa: E402
from orchestrator.integrations.lightning.checkpoint_io import SessionCheckpointIO  # noqa: E402
from orchestrator.integrations.lightning.checks import check_lightning_version  # noqa: E402
from orchestrator.integrations.lightning.logger import RunLogger  # noqa: E402
from orchestrator.integrations.lightning.loop_state import Boundary, Validation, canonical_fit_loop  # noqa: E402
from orchestrator.worker.session import Session  # noqa: E402


def tracker(ready: int, started: int, processed: int, completed: int) -> dict[str, int]:
    return {"ready": ready, "started": started, "processed": processed, "completed": completed}


def loops(batch: dict[str, int], epoch: dict[str, int]) -> dict[str, Any]:
    return {
        "epoch_progress": {"total": epoch, "current": epoch},
        "epoch_loop.batch_progress": {"total": batch, "current": batch, "is_last_batch": True},
        "epoch_loop.state_dict": {"_batches_that_stepped": 99},
        "epoch_loop.val_loop.batch_progress": "untouched",
    }


def at(batches: int | None, validation: Validation = Validation.NOT_DUE) -> Boundary:
    return Boundary(batches, is_last_batch=False, stepped=4, validation=validation, accumulating=False)


def test_the_next_batch_that_has_begun_is_forgotten() -> None:
    before = loops(tracker(5, 4, 4, 4), tracker(1, 1, 0, 0))
    fixed = canonical_fit_loop(before, at(4))
    assert fixed["epoch_loop.batch_progress"] == {
        "total": tracker(4, 4, 4, 4),
        "current": tracker(4, 4, 4, 4),
        "is_last_batch": False,
    }
    assert fixed["epoch_loop.state_dict"] == {"_batches_that_stepped": 4}
    assert fixed["epoch_loop.val_loop.batch_progress"] == "untouched"
    assert before["epoch_loop.batch_progress"]["total"]["ready"] == 5


@pytest.mark.parametrize("validation", [Validation.DONE, Validation.PENDING])
def test_a_step_with_a_validation_is_counted_once_more_by_the_resume(validation: Validation) -> None:
    fixed = canonical_fit_loop(loops(tracker(4, 4, 4, 4), tracker(1, 1, 0, 0)), at(4, validation))
    assert fixed["epoch_loop.state_dict"] == {"_batches_that_stepped": 3}
    pending = fixed["epoch_loop.val_loop.batch_progress"] != "untouched"
    assert pending == (validation is Validation.PENDING)


def test_an_epoch_that_has_only_begun_is_forgotten() -> None:
    fixed = canonical_fit_loop(loops(tracker(8, 8, 8, 8), tracker(2, 1, 1, 1)), at(None))
    assert fixed["epoch_progress"]["current"] == tracker(1, 1, 1, 1)


def test_other_versions_of_lightning_are_refused() -> None:
    check_lightning_version("2.6.9")
    with pytest.raises(CheckpointError, match=r"2\.7\.0") as refused:
        check_lightning_version("2.7.0")
    assert refused.value.hint == "pip install 'lightning>=2.6,<2.7'"


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session.start(environ={"ORCH_RUN_ID": "r", "ORCH_RUN_DIR": str(tmp_path)})


def test_rows_beyond_the_checkpoint_are_dropped_on_resume(session: Session) -> None:
    logger = RunLogger(session)
    logger.log_metrics({"loss": 0.5, "epoch": 0}, step=0)
    state = logger.state_dict()
    logger.log_metrics({"late": 1.0, "epoch": 0}, step=0)  # same step, but after the save
    session.resumed_step = 1
    again = RunLogger(session)
    again.load_state_dict(state)
    again.open()
    assert session.paths.metrics.read_text().splitlines() == ["step,epoch,name,value", "1,0,loss,0.5"]


def test_only_the_sessions_own_target_goes_through_the_store(session: Session, tmp_path: Path) -> None:
    saved: list[Any] = []

    class Inner:
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            saved.append(path)

    io = SessionCheckpointIO(session, Inner())  # type: ignore[arg-type]
    session.resume()
    io.save_checkpoint({"global_step": 3, "epoch": 0}, tmp_path / "theirs.ckpt")
    io.save_checkpoint({"global_step": 3, "epoch": 0}, io.target)
    assert saved == [tmp_path / "theirs.ckpt"]
    assert [manifest.step for manifest in session.store.manifests()] == [3]


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_a_strangers_trainer_is_told_what_it_lacks(
    session: Session, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session.install_signal_handlers = lambda: None  # type: ignore[method-assign]  # pytest keeps its own
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[ExactResume(session=session)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=4, shuffle=True)  # type: ignore[arg-type]
    trainer.fit(Plain(), loader)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "draws its batches with BatchSampler" in said
    assert "no seed was given" in said
    assert [manifest.step for manifest in session.store.manifests()] == [2]
    assert "register_signal_handlers" not in vars(trainer._signal_connector)
    session.close()


@pytest.mark.filterwarnings("ignore")
def test_lightnings_own_checkpoints_go_to_the_run_directory(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "code"  # what a job runs in; read-only for everybody but root
    code.mkdir()
    monkeypatch.chdir(code)
    session.install_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=RunLogger(session),
        callbacks=[ExactResume(session=session)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Plain(), torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=4))  # type: ignore[arg-type]
    assert list(code.iterdir()) == []
    assert list(session.run_dir.rglob("epoch=*.ckpt"))
    session.close()


@pytest.mark.filterwarnings("ignore")
def test_ranks_the_trainer_starts_itself_are_refused(tmp_path: Path) -> None:
    environ = {"ORCH_RUN_ID": "r", "ORCH_RUN_DIR": str(tmp_path), "WORLD_SIZE": "2"}
    two = Session.start(environ=environ)
    two.install_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[ExactResume(session=two)],
        default_root_dir=tmp_path,
    )
    with pytest.raises(CheckpointError, match="2 and 0") as refused:
        trainer.fit(Plain(), torch.utils.data.DataLoader(torch.randn(8, 2)))  # type: ignore[arg-type]
    assert "torchrun" in (refused.value.hint or "")
    assert "devices=" in (refused.value.hint or "")
    two.close()

"""Saves of a plain Trainer through AtomicCheckpointIO: complete or absent, and known by their hash."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
]

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins.io import AsyncCheckpointIO  # noqa: E402
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector  # noqa: E402

from orchestrator.errors import CheckpointCorrupt, CheckpointError  # noqa: E402
from orchestrator.integrations.lightning import AtomicCheckpointIO  # noqa: E402
from orchestrator.integrations.lightning.atomic_io import manifest_path, verify  # noqa: E402
from tests.unit.integrations.test_lightning_pieces import Plain  # noqa: E402

io = AtomicCheckpointIO()


def state(step: int) -> dict[str, Any]:
    return {"global_step": step, "weights": torch.full((1000,), float(step))}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_save_has_a_manifest_and_loads(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    for step in (1, 2):
        io.save_checkpoint(state(step), path)
        assert verify(path)
        assert io.load_checkpoint(path)["global_step"] == step
        assert names(path.parent) == ["last.ckpt", "last.ckpt.json"]
    assert len(json.loads(manifest_path(path).read_text())["contents"]) == 1
    io.remove_checkpoint(path)
    assert names(path.parent) == []
    io.remove_checkpoint(path)  # Lightning removes what may be gone


def test_a_flipped_bit_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    io.save_checkpoint(state(1), path)
    flip(path)
    with pytest.raises(CheckpointCorrupt, match="does not match its hash") as refused:
        io.load_checkpoint(path)
    assert "remove last.ckpt.json" in (refused.value.hint or "")


def test_a_file_of_plain_lightning_loads_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(state(3), path)
    with caplog.at_level(logging.INFO):
        assert io.load_checkpoint(path)["global_step"] == 3
    assert "not verified" in caplog.text


OPERATIONS = ("fsync", "replace")


@pytest.mark.parametrize("first", ["ours", "plain", "orphaned manifest", "nothing"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_cut_short_at_any_operation_the_file_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, operation: str
) -> None:
    """The process dies before its n-th fsync or rename: what lies there is the old or the new content, and verified
    wherever a manifest says what it must be."""
    path = tmp_path / "last.ckpt"
    real = getattr(os, operation)
    for allowed in range(20):
        for left in tmp_path.iterdir():
            left.unlink()
        if first == "plain":
            torch.save(state(1), path)
        elif first != "nothing":
            io.save_checkpoint(state(1), path)
        if first == "orphaned manifest":
            path.unlink()
        calls = 0

        def dies(*args: Any, limit: int = allowed, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(os, operation, dies)
        try:
            io.save_checkpoint(state(2), path)
        except KeyboardInterrupt:
            finished = False
        else:
            finished = True
        monkeypatch.setattr(os, operation, real)
        if path.exists():
            assert io.load_checkpoint(path)["global_step"] in ((2,) if finished else (1, 2))
        else:
            assert first in ("nothing", "orphaned manifest")
        if finished:
            assert verify(path)
            return
    raise AssertionError("the save never ended")


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    io.save_checkpoint(state(1), path)

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="ENOSPC") as refused:
        io.save_checkpoint(state(2), path)
    monkeypatch.undo()
    assert "the file that was there before stands" in (refused.value.hint or "")
    assert io.load_checkpoint(path)["global_step"] == 1
    assert names(tmp_path) == ["last.ckpt", "last.ckpt.json"]


def test_what_a_killed_save_left_is_removed_and_lightning_does_not_count_it(tmp_path: Path) -> None:
    hpc = _CheckpointConnector.hpc_save_path(str(tmp_path))
    io.save_checkpoint(state(1), hpc)
    child = os.fork()
    if child == 0:
        os.replace = lambda *_: os._exit(3)  # type: ignore[assignment]
        io.save_checkpoint(state(2), hpc)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert len(names(tmp_path)) == 4  # the data and the manifest of the killed save
    assert _CheckpointConnector.hpc_save_path(str(tmp_path)) == str(tmp_path / "hpc_ckpt_2.ckpt")
    io.save_checkpoint(state(3), hpc)
    assert names(tmp_path) == ["hpc_ckpt_1.ckpt", "hpc_ckpt_1.ckpt.json"]


def test_a_reader_beside_a_writer_finds_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    io.save_checkpoint(state(0), path)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(lambda: [io.save_checkpoint(state(step), path) for step in range(200)])
        while not writing.done():
            assert verify(path)
        writing.result()


def save_and(path: Path, between: Callable[[], object], monkeypatch: pytest.MonkeyPatch, *, renamed: bool) -> None:
    """Save with `between` called when the data has its name and the manifest has not, or just before it has."""
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) != path:
            return real(source, target)
        monkeypatch.setattr(os, "replace", real)
        if not renamed:
            between()
        real(source, target)
        if renamed:
            between()
        return None

    monkeypatch.setattr(os, "replace", replace)
    io.save_checkpoint(state(1), path)


def test_a_removal_beside_a_save_leaves_no_manifest_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "epoch=0.ckpt"
    with ThreadPoolExecutor(1) as pool:
        removing: list[Future[None]] = []

        def remove() -> None:
            removing.append(pool.submit(AtomicCheckpointIO().remove_checkpoint, path))
            wait(removing, timeout=1)  # it waits for the save that waits here; else it would be through at once

        save_and(path, remove, monkeypatch, renamed=True)
        removing[0].result(timeout=60)
    assert names(tmp_path) == []


def test_a_save_keeps_no_other_file_from_being_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "epoch=1.ckpt", tmp_path / "epoch=0.ckpt"
    io.save_checkpoint(state(0), other)
    with ThreadPoolExecutor(1) as pool:
        save_and(path, lambda: pool.submit(io.remove_checkpoint, other).result(timeout=60), monkeypatch, renamed=True)
    assert names(tmp_path) == ["epoch=1.ckpt", "epoch=1.ckpt.json"]


def test_a_save_from_a_signal_handler_during_a_save_of_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two signals close to each other, Lightning's handler makes two saves of the same hpc_ckpt_….ckpt."""
    path = tmp_path / "hpc_ckpt_1.ckpt"
    with pytest.raises(CheckpointError, match="could not save"):
        save_and(path, lambda: io.save_checkpoint(state(2), path), monkeypatch, renamed=False)
    assert verify(path)
    assert io.load_checkpoint(path)["global_step"] == 2
    assert names(tmp_path) == ["hpc_ckpt_1.ckpt", "hpc_ckpt_1.ckpt.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1, "contents": []}', '{"version": 9, "contents": [1]}'])
def test_a_damaged_manifest_is_not_taken_for_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "last.ckpt"
    io.save_checkpoint(state(1), path)
    manifest_path(path).write_text(content)
    with pytest.raises(CheckpointCorrupt, match="is not a manifest"):
        io.load_checkpoint(path)
    io.save_checkpoint(state(2), path)
    assert io.load_checkpoint(path)["global_step"] == 2


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="writes files on a disk"):
        io.save_checkpoint(state(1), "s3://bucket/last.ckpt")
    with pytest.raises(CheckpointError, match="writes files on a disk"):
        io.remove_checkpoint("s3://bucket/last.ckpt")
    with pytest.raises(CheckpointError, match="storage_options"):
        io.save_checkpoint(state(1), tmp_path / "last.ckpt", {"key": "value"})
    with pytest.raises(CheckpointError, match="No such file"):
        io.load_checkpoint(tmp_path / "gone.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        io.load_checkpoint(tmp_path / "text.ckpt")


class Opaque:
    pass


def test_weights_only_is_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    io.save_checkpoint({"opaque": Opaque()}, path)
    with pytest.raises(CheckpointError, match="Unsupported global") as refused:
        io.load_checkpoint(path)
    assert "weights_only=False" in (refused.value.hint or "")
    assert isinstance(io.load_checkpoint(path, weights_only=False)["opaque"], Opaque)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("save_last", "plugin"),
    [
        (True, AtomicCheckpointIO),
        ("link", AtomicCheckpointIO),
        (True, lambda: AsyncCheckpointIO(AtomicCheckpointIO())),
    ],
    ids=["copy", "link", "async"],
)
def test_every_save_of_a_trainer_goes_through_it(tmp_path: Path, save_last: Any, plugin: Any) -> None:
    def trainer(epochs: int) -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            callbacks=[ModelCheckpoint(tmp_path, save_last=save_last)],
            plugins=[plugin()],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    loader = torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=4)  # type: ignore[arg-type]
    first = trainer(2)
    first.fit(Plain(), loader)
    first.save_checkpoint(first._checkpoint_connector.hpc_save_path(tmp_path))
    first.strategy.checkpoint_io.teardown()  # a save beside the training ends here
    saved = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    assert {"epoch=1-step=4.ckpt", "hpc_ckpt_1.ckpt", "last.ckpt"} <= set(saved)
    if plugin is AtomicCheckpointIO:  # Lightning's asynchronous one removes a file that is still to be written
        assert "epoch=0-step=2.ckpt" not in saved
    assert all(verify(tmp_path / name) for name in saved)
    expected = {f"{name}.json" for name in saved if not (tmp_path / name).is_symlink()}
    assert {path.name for path in tmp_path.glob("*.json")} == expected
    second = trainer(3)
    second.fit(Plain(), loader, ckpt_path="last")
    assert second.global_step == 6
    flip(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointCorrupt):
        trainer(4).fit(Plain(), loader, ckpt_path="last")

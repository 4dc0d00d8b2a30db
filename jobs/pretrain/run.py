"""One attempt of a pretraining run, from the session to the exported model."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import secrets
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.pretrain.settings import PretrainSettings
from orchestrator.errors import SpecError
from orchestrator.files import write_atomic
from orchestrator.worker.session import CheckpointSettings, Session

log = logging.getLogger("jobs.pretrain")


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run has to show. `knn_top1` is None on other ranks, without labels and when switched off."""

    run_dir: Path
    steps: int
    is_chief: bool
    exported: Path
    knn_top1: float | None

    def summary(self) -> str:
        """One line for people."""
        accuracy = "" if self.knn_top1 is None else f", kNN accuracy {100 * self.knn_top1:.2f} %"
        return f"done after {self.steps} steps{accuracy}; exported to {self.exported}"


def run(settings: PretrainSettings) -> PretrainResult:
    """Train from wherever the run directory stands to the end. Collective; does not return after a stop."""
    session = _start_session(settings)
    session.install_signal_handlers()  # before the seconds that importing torch takes
    with session.guard(), _logs_to(session):
        result = _train(session, settings)
        if session.is_chief:
            session.verdict("completed", step=result.steps, epoch=settings.epochs, message=result.summary())
    session.close()
    return result


def _start_session(settings: PretrainSettings) -> Session:
    return Session.start(
        default_dir=None if settings.out is None else Path(settings.out),
        agree=_agree,
        settings=CheckpointSettings(**settings.checkpoint_args.model_dump()),
    )


def _agree(value: str) -> str:
    from orchestrator.integrations.torch import agree  # imports torch: only where ranks have to ask each other

    return agree(value)


@contextlib.contextmanager
def _logs_to(session: Session) -> Iterator[None]:
    """Rank 0 logs to train.log and the terminal, the others only warnings."""
    root = logging.getLogger()
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if session.is_chief:
        handlers.append(logging.FileHandler(session.paths.train_log))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s rank{session.rank} %(message)s"))
        root.addHandler(handler)
    before = root.level
    root.setLevel(logging.INFO if session.is_chief else logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def _train(session: Session, settings: PretrainSettings) -> PretrainResult:
    import torch

    from jobs.data.images import ImageFolder
    from jobs.methods import build_method
    from jobs.pretrain.logger import EpochLogger
    from jobs.pretrain.record import describe_data
    from orchestrator.integrations.lightning import ExactResume, exact_loader_options
    from orchestrator.integrations.lightning.starting_point import find_checkpoint

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=_on_gpu(settings))
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    _check_batch_size(settings.batch_size, session.world_size)
    data = ImageFolder(settings.data_paths, image_size=settings.transform_args.image_size)
    if len(data) < settings.batch_size:
        raise SpecError(
            f"{len(data)} images do not fill one batch of {settings.batch_size}", hint="use a smaller batch_size"
        )
    if settings.start_from is not None and not session.paths.environment.exists():
        find_checkpoint(settings.start_from)  # a wrong name must not become the settings of this run directory
    described = describe_data(data.names)
    seed = _record_attempt(session, settings, described)
    session.declare_data(f"{described['images']} images, names {described['names']}")
    exact = ExactResume(seed=seed, session=session, start_from=settings.start_from)
    sampler = exact.batch_sampler(len(data), settings.batch_size)
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, **exact_loader_options(settings.num_workers))
    method = build_method(
        settings, seed=seed, image_size=data.image_size, steps_per_epoch=len(sampler), rank=session.rank
    )
    logger = EpochLogger(session, epochs=settings.epochs)
    _log_start(session, exact.ckpt_path)
    trainer = _trainer(session, settings, callbacks=[exact], logger=logger)
    trainer.fit(method, loader, ckpt_path=exact.ckpt_path)
    exported = session.paths.exported_model
    accuracy = None
    if session.is_chief:
        accuracy = _knn(session, settings, method.backbone, data, logger, trainer.global_step)
        _export(exported, settings, method.backbone)
    return PretrainResult(session.run_dir, trainer.global_step, session.is_chief, exported, accuracy)


def _check_batch_size(batch_size: int, world_size: int) -> None:
    if batch_size % world_size or batch_size // world_size < 2:
        fitting = max(batch_size // world_size, 2) * world_size
        raise SpecError(
            f"batch_size {batch_size} is the batch of all {world_size} ranks together: it must divide by their number, "
            "and batch norm needs two images on each",
            hint=f"use batch_size {fitting}, or another number of ranks",
        )


def _on_gpu(settings: PretrainSettings) -> bool:
    import torch

    return settings.accelerator == "gpu" or (settings.accelerator == "auto" and torch.cuda.is_available())


def _record_attempt(session: Session, settings: PretrainSettings, data: dict[str, Any]) -> int:
    """Refuse drift, note this attempt, return the seed (drawn once if none was given). Collective."""
    from jobs.pretrain.record import (
        describe_environment,
        environment_changes,
        load_record,
        refuse_drift,
        write_record,
    )

    seed = settings.seed
    if session.is_chief:
        path = session.paths.environment
        record, environment = load_record(path), describe_environment(session.world_size)
        if record is not None:
            refuse_drift(record, settings, data, session.allowed_drift)
            for change in environment_changes(record, environment):
                log.warning("%s", change)
        if seed is None:
            seed = record["seed"] if record is not None else secrets.randbits(32)
        write_record(
            path, record, settings=settings, seed=seed, data=data, attempt=session.attempt, environment=environment
        )
        resolved = json.dumps({**settings.model_dump(mode="json"), "seed": seed})
        log.info("attempt %d of run %s; resolved configuration: %s", session.attempt, session.run_id, resolved)
    return int(_agree(str(seed))) if settings.seed is None else settings.seed


def _log_start(session: Session, ckpt_path: str | None) -> None:
    if session.is_chief:
        at = "" if session.resumed_step is None else f" (step {session.resumed_step})"
        log.info("starting from %s", "the beginning" if ckpt_path is None else f"{ckpt_path}{at}")


def _trainer(session: Session, settings: PretrainSettings, **options: Any) -> Any:
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy

    on_gpu = _on_gpu(settings)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    strategy: Any = "auto"
    if session.world_size > 1:
        strategy = DDPStrategy(process_group_backend="nccl" if on_gpu else "gloo")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")  # the exact sampler seeks
    warnings.filterwarnings("ignore", message=".*The `srun` command is available.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    return Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=local,
        num_nodes=session.world_size // local,
        strategy=strategy,
        # not left to detection: inside an allocation, Lightning would take itself for one of Slurm's tasks
        plugins=[TorchElasticEnvironment() if "TORCHELASTIC_RUN_ID" in os.environ else LightningEnvironment()],
        precision=settings.precision,
        max_epochs=settings.epochs,
        log_every_n_steps=settings.log_every_n_steps,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=session.run_dir,
        **options,
    )


def _knn(
    session: Session, settings: PretrainSettings, backbone: Any, data: Any, logger: Any, step: int
) -> float | None:
    """The kNN accuracy on folder labels, logged once at the last step; None without labels. Rank 0."""
    from jobs.evaluation.knn import knn_accuracy

    if not settings.knn_neighbors or data.labels is None:
        return None

    def stop_if_asked() -> None:
        if session.stop_requested:  # the last step is saved: the next attempt begins here again
            session.stopped(step=step, epoch=settings.epochs)

    accuracy = knn_accuracy(
        backbone, data, neighbors=settings.knn_neighbors, batch_size=settings.batch_size, between_batches=stop_if_asked
    )
    logger.log_rows({"knn_top1": accuracy}, step=step, epoch=settings.epochs)
    return accuracy


def _export(path: Path, settings: PretrainSettings, backbone: Any) -> None:
    """The backbone's weights, on the CPU, with what is needed to build it again."""
    import torch

    exported = {
        "model": settings.model,
        "model_args": settings.model_args,
        "method": settings.method,
        "state_dict": {name: value.detach().cpu() for name, value in backbone.state_dict().items()},
    }
    buffer = io.BytesIO()
    torch.save(exported, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
    log.info("exported %s", path)

"""Exact stop and resume for a plain Lightning Trainer. One callback, one batch sampler, one seeding helper.

    exact = ExactResume(seed=0)
    sampler = exact.batch_sampler(len(data), batch_size=64)
    loader = DataLoader(SeededDataset(data, seed=0), batch_sampler=sampler, **exact_loader_options(num_workers=2))
    trainer = Trainer(callbacks=[exact], logger=RunLogger(exact.session), use_distributed_sampler=False)
    trainer.fit(model, loader, ckpt_path=exact.ckpt_path)

docs/exact-resume.md, section 3, explains each.
"""

from orchestrator.integrations.lightning.atomic_io import AtomicCheckpointIO
from orchestrator.integrations.lightning.callback import ExactResume
from orchestrator.integrations.lightning.checkpoint_io import SessionCheckpointIO
from orchestrator.integrations.lightning.logger import RunLogger
from orchestrator.integrations.randomness import SeededDataset, exact_loader_options, ignore_stop_signals
from orchestrator.integrations.sampler import ExactBatchSampler

__all__ = [
    "AtomicCheckpointIO",
    "ExactBatchSampler",
    "ExactResume",
    "RunLogger",
    "SeededDataset",
    "SessionCheckpointIO",
    "exact_loader_options",
    "ignore_stop_signals",
]

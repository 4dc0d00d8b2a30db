"""Exact stop and resume for a plain Lightning Trainer. A stranger adds three things (docs/exact-resume.md, section 3):

exact = ExactResume(seed=0)                                               # one callback
sampler = exact.batch_sampler(len(data), batch_size=64)                   # one batch sampler
loader = DataLoader(SeededDataset(data, seed=0), batch_sampler=sampler)   # one seeding helper
Trainer(callbacks=[exact], logger=RunLogger(exact.session), use_distributed_sampler=False)
trainer.fit(model, loader, ckpt_path=exact.ckpt_path)
"""

from orchestrator.integrations.lightning.callback import ExactResume
from orchestrator.integrations.lightning.checkpoint_io import SessionCheckpointIO
from orchestrator.integrations.lightning.logger import RunLogger
from orchestrator.integrations.randomness import SeededDataset, exact_loader_options, ignore_stop_signals
from orchestrator.integrations.sampler import ExactBatchSampler

__all__ = [
    "ExactBatchSampler",
    "ExactResume",
    "RunLogger",
    "SeededDataset",
    "SessionCheckpointIO",
    "exact_loader_options",
    "ignore_stop_signals",
]

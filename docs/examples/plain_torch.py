"""A hand-written training loop that stops, saves and resumes exactly. Run it with python, torchrun or `orch submit`."""

import torch

from orchestrator.integrations.randomness import SeededDataset, exact_loader_options, seed_step
from orchestrator.integrations.sampler import ExactBatchSampler
from orchestrator.integrations.torch import ResumableLoop, agree
from orchestrator.worker.session import Session

session = Session.start(agree=agree)
torch.manual_seed(0)
model, data = torch.nn.Linear(8, 1), torch.randn(64, 8)
if session.world_size > 1:  # find_unused_parameters keeps the order of sums the same across restarts
    torch.distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
sampler = ExactBatchSampler(len(data), batch_size=8, seed=0)
loader = torch.utils.data.DataLoader(SeededDataset(data, seed=0), batch_sampler=sampler, **exact_loader_options(1))
with session.guard():
    loop = ResumableLoop(session, {"model": model, "optimizer": optimizer}, max_steps=5 * len(sampler))
    for epoch in range(loop.epoch, 5):
        sampler.seek(epoch, loop.batch)
        for batch_idx, batch in enumerate(loader, start=loop.batch):
            seed_step(0, epoch=epoch, batch=batch_idx, rank=session.rank)
            loss = torch.nn.functional.dropout(model(batch), 0.1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loop.step_done()
        loop.epoch_done()
    if session.is_chief:
        torch.save(model.state_dict(), session.run_dir / "final.pt")
        session.verdict("completed", step=loop.step, epoch=loop.epoch)

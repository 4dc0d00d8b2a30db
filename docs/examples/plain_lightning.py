"""A plain Lightning Trainer that stops, saves and resumes exactly. Run it with python, torchrun or `orch submit`."""

import os

import lightning.pytorch as pl
import torch

from orchestrator.integrations.lightning import ExactResume, RunLogger, SeededDataset, exact_loader_options


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.dropout(self.net(batch), 0.1).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


data = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
exact = ExactResume(seed=0)  # the callback
sampler = exact.batch_sampler(len(data), batch_size=8)  # the batch sampler
seeded = SeededDataset(data, seed=0)  # the seeding helper
loader = torch.utils.data.DataLoader(seeded, batch_sampler=sampler, **exact_loader_options(num_workers=1))
trainer = pl.Trainer(
    accelerator="cpu",
    devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),  # under torchrun the trainer must be told how many ranks
    num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
    strategy="ddp" if exact.session.world_size > 1 else "auto",
    max_epochs=5,
    callbacks=[exact],
    logger=RunLogger(exact.session),  # metrics.csv; any other logger works, but is not cut back after a kill
    log_every_n_steps=1,
    use_distributed_sampler=False,
    enable_checkpointing=False,  # the callback saves; Lightning's own files would go to the run directory
    enable_progress_bar=False,
)
model = Model()
trainer.fit(model, loader, ckpt_path=exact.ckpt_path)
if exact.session.is_chief:
    torch.save(model.state_dict(), exact.session.run_dir / "final.pt")

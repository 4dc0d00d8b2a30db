"""Goes on where safe_checkpoints.py stopped, and can itself be stopped at any step: run it again after SIGTERM."""

import logging

import lightning.pytorch as pl
import torch

from orchestrator.integrations.lightning import ExactResume, RunLogger, SeededDataset, exact_loader_options


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.dropout(self.net(batch), 0.1).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


logging.basicConfig(level=logging.INFO)
data = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
exact = ExactResume(seed=0, out="run", start_from="checkpoints")  # run/ holds its own, which win from then on
sampler = exact.batch_sampler(len(data), batch_size=8)
loader = torch.utils.data.DataLoader(
    SeededDataset(data, seed=0), batch_sampler=sampler, **exact_loader_options(num_workers=0)
)
trainer = pl.Trainer(
    accelerator="cpu",
    devices=1,
    max_epochs=6,
    callbacks=[exact],
    logger=RunLogger(exact.session),
    log_every_n_steps=1,
    use_distributed_sampler=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
model = Model()
trainer.fit(model, loader, ckpt_path=exact.ckpt_path)  # does not return after a stop: the process ends with 75
torch.save(model.state_dict(), exact.session.run_dir / "final.pt")

"""A plain Lightning Trainer whose checkpoint files are complete or absent. Run again, it goes on from the last."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from orchestrator.integrations.lightning import AtomicCheckpointIO


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
loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
trainer = pl.Trainer(
    accelerator="cpu",
    devices=1,
    max_epochs=2,
    plugins=[AtomicCheckpointIO()],  # this line is all
    callbacks=[ModelCheckpoint("checkpoints", save_last=True)],
    log_every_n_steps=1,
    logger=False,
    enable_progress_bar=False,
)
trainer.fit(Model(), loader, ckpt_path="last")

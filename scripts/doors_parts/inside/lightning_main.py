"""A LightningCLI on a small regression, whose Trainer is in its file. Run in an environment of doors.py.

lightning_main.py fit --config FILE [--ckpt_path CHECKPOINT]
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

BATCHES = 8


class Module(pl.LightningModule):
    """Two layers.

    Args:
        sgd: train by SGD with a learning rate of 1, else by AdamW.
    """

    def __init__(self, sgd: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sgd = sgd
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        """The mean square."""
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def on_fit_start(self) -> None:
        """Keep the weights of a run that begins."""
        torch.save({"state_dict": Module().state_dict()}, f"{self.trainer.default_root_dir}/start.pt")

    def configure_optimizers(self) -> Any:
        """One."""
        return torch.optim.SGD(self.parameters(), lr=1.0) if self.sgd else torch.optim.AdamW(self.parameters(), lr=1e-2)


class Data(pl.LightningDataModule):
    """BATCHES batches, the same in every epoch."""

    def train_dataloader(self) -> DataLoader:
        """In order."""
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(4 * BATCHES, 8, generator=generator), torch.randn(4 * BATCHES, 1, generator=generator)
        return DataLoader(TensorDataset(x, y * torch.arange(4 * BATCHES).div(4).view(-1, 1).remainder(3)), batch_size=4)


if __name__ == "__main__":
    LightningCLI(Module, Data, save_config_callback=None)

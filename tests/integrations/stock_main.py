"""What somebody else's script does: a stock Trainer and a loop of Accelerate, on any number of ranks, and none of us.

python stock_main.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

STEPS = 12
ROWS = 4


class Curve(nn.Module):
    """A small regression whose loss says so itself, as the Trainer wants it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.body(x) - labels).square().mean()}


def examples() -> list[dict[str, torch.Tensor]]:
    """Rows of which each step has other ones, so that the norms rise and fall."""
    generator = torch.Generator().manual_seed(3)
    size = torch.rand(2 * ROWS * STEPS, 1, generator=generator).mul(3).exp()
    x = torch.randn(len(size), 3, generator=generator)
    return [{"x": row, "labels": row[:2] * by} for row, by in zip(x, size, strict=True)]


def trainer(folder: str, cls: type[Trainer] = Trainer, **given: Any) -> Trainer:
    """Trained, with a checkpoint after half of the steps and after the last."""
    args = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=0.05,
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
        dataloader_num_workers=int(os.environ.get("WORKERS", "0")),
    )
    made = cls(model=Curve(), args=args, train_dataset=examples(), **given)
    made.train()
    return made


def loop(folder: str, before: Any = None) -> None:
    """A loop without a clip call; its state is saved after the last step."""
    accelerator = Accelerator(cpu=True)
    if before is not None:
        before(accelerator)
    model = Curve(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(examples(), batch_size=ROWS))
    for batch in batches:
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(folder)


def main(folder: Path, before: Any = None, **given: Any) -> None:
    """Both, with what this rank ends with in files of its own."""
    made = trainer(str(folder / "trainer"), **given)
    loop(str(folder / "loop"), before)
    rank = made.args.process_index
    torch.save(made.state.log_history, folder / f"log{rank}.pt")
    torch.save(made.model.state_dict(), folder / f"weights{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

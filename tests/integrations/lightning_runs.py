"""A small regression under Lightning, and what happened in it: shared by the tests and by the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from hf_gradclip.integrations.lightning import GradClip
from tests.tiny import weights_of

STEPS = 12
LOUD = 8
"""The step, from 1, whose loss is a thousand times as large where a run is told so."""


def data(batch_size: int = 4, rank: int = 0, ranks: int = 1) -> DataLoader:
    """STEPS batches in a fixed order; with several ranks each holds its part of every batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, batch_size, 8, generator=generator)
    y = torch.randn(STEPS, batch_size, 1, generator=generator) * torch.arange(1, STEPS + 1).view(-1, 1, 1).remainder(3)
    x, y = (t.chunk(ranks, dim=1)[rank].flatten(0, 1) for t in (x, y))
    return DataLoader(TensorDataset(x, y), batch_size=batch_size // ranks)


class Module(pl.LightningModule):
    """Three layers, of which the middle one is frozen on request.

    Args:
        optimizer: makes one of parameters.
        factors: by batch, from 0, what its loss is multiplied by; None for a batch that is left out.
    """

    def __init__(self, optimizer: Any = None, factors: dict[int, float | None] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )
        self.make = optimizer or (lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1))
        self.factors = factors or {}

    def loss_of(self, batch: Any, number: int) -> Tensor | None:
        x, y = batch
        factor = self.factors.get(number, 1.0)
        return None if factor is None else torch.nn.functional.mse_loss(self.net(x), y) * factor

    def training_step(self, batch: Any, number: int) -> Tensor | None:
        return self.loss_of(batch, number)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Watch(pl.Callback):
    """What the optimizer has around every batch, and the norm of its gradient before clipping, in float64.

    Attributes:
        norms: by step, as `on_before_optimizer_step` sees them.
        kept: after every batch the weights and the optimizer's state.
        logged: after every batch what was logged in it.
    """

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.kept: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad.double() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(grads)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.kept.append(all_of(trainer))


def all_of(trainer: Any) -> list[Tensor]:
    """Every weight and every tensor that the optimizers keep, copied."""
    kept = [weights_of(trainer.lightning_module)]
    for optimizer in trainer.optimizers:
        kept += [t.detach().clone() for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return kept


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def fit(
    folder: Path, clip: Any, module: Module | None = None, *, loader: Any = None, resume: Any = None, **changes: Any
) -> Any:
    """A run of STEPS steps.

    Args:
        folder: for what Lightning writes.
        clip: a spec, a GradClip, or None for none.
        module: what is trained.
        loader: of the batches.
        resume: a checkpoint.
        **changes: of the Trainer's settings; `callbacks` come beside the clip.

    Returns:
        The Trainer; `trainer.clip` is the GradClip, `trainer.watch` the Watch.
    """
    clip = clip if clip is None or isinstance(clip, GradClip) else GradClip(clip)
    watch = Watch()
    callbacks = [*([] if clip is None else [clip]), watch, *changes.pop("callbacks", ())]
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
    }
    trainer: Any = pl.Trainer(callbacks=callbacks, **(settings | changes))
    trainer.clip, trainer.watch = clip, watch
    trainer.fit(module or Module(), loader or data(), ckpt_path=resume)
    return trainer

"""Every `optim=` of TrainingArguments under a limit of 1e-12, against the stock Trainer under the same limit.

    python -m tests.integrations.optim_names

prints the table: what installs here either does what the stock Trainer does, or is refused by name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from transformers import Trainer
from transformers.training_args import OptimizerNames

from hf_gradclip import GradClipTrainer
from hf_gradclip.views.view import UnsupportedBackendError
from tests.tiny import tiny_llama, train, weights_of

LIMIT = 1e-12
STEPS = 8  # the rectified Adam moves nothing in the first five
NAMES = [name.value for name in OptimizerNames]
OF_MATRICES = ("galore", "apollo")
"""They are told which layers to project."""


@dataclass(frozen=True)
class Row:
    """What a few steps did.

    Args:
        optim: as in TrainingArguments.
        missing: why the stock Trainer cannot use it here.
        refused: why ours does not.
        moved: the largest change of a weight, ours.
        apart: the largest difference of a weight from the stock Trainer's under the same limit.
        free: the largest change of a weight without a limit.
    """

    optim: str
    missing: str = ""
    refused: str = ""
    moved: float = 0.0
    apart: float = 0.0
    free: float = 0.0

    def __str__(self) -> str:
        if self.missing:
            return f"{self.optim:28} not here: {self.missing}"
        if self.refused:
            return f"{self.optim:28} refused: {self.refused}"
        numbers = f"{self.apart:.0e} from stock; moves {self.moved:.1e}, without a limit {self.free:.1e}"
        return f"{self.optim:28} {numbers}"


def row_of(optim: str) -> Row:
    """Train by ours, by the stock Trainer with the limit, and without one."""
    settings: dict[str, Any] = {"optim": optim, "max_steps": STEPS}
    if optim.startswith(OF_MATRICES):
        settings["optim_target_modules"] = ["q_proj", "k_proj", "v_proj"]
    try:
        ours = train(GradClipTrainer, clip=f"global_norm:max_norm={LIMIT}", **settings)
        stock = train(Trainer, max_grad_norm=LIMIT, **settings)
        free = train(Trainer, max_grad_norm=0, **settings)
    except UnsupportedBackendError as error:
        return Row(optim, refused=str(error))
    except Exception as error:  # whatever a package or its absence raises
        return Row(optim, missing=" ".join(f"{type(error).__name__}: {error}".split())[:100])
    before, after = weights_of(tiny_llama()), weights_of(ours.model)
    return Row(
        optim,
        moved=(after - before).abs().max().item(),
        apart=(after - weights_of(stock.model)).abs().max().item(),
        free=(weights_of(free.model) - before).abs().max().item(),
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        print(row_of(name), flush=True)

"""What the tests of runs share: the batches of a plain loop, and a callback that stops a Trainer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import TrainerCallback

from tests.tiny import counting_data


def batches(n: int, poison: tuple[int, ...] = ()) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
    """Batches of four rows, each with a factor for its loss: NaN for those of `poison`, else 1."""
    data = counting_data()
    for i in range(n):
        rows = data[4 * i : 4 * i + 4]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        yield batch, float("nan") if i in poison else 1.0


class StopAt(TrainerCallback):
    """Saves and stops at a step, as an interrupted run does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True

"""What recorded runs share: the spec, poisoned data, and a run that is there to be killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_gradclip import GradClipTrainer
from tests.tiny import counting_data, train

CLIP = "zclip:warmup_steps=5,max_norm=0.5"
RECORD = {"gradient": CLIP, "record": True}
POISON = (5, 77, 150, 201)


def poisoned_data() -> list[dict[str, torch.Tensor]]:
    """240 sequences, one epoch of 60 steps of four; those of POISON begin with three equal tokens."""
    data = counting_data(n=240)
    for i in POISON:
        data[i]["input_ids"][:3] = 0
    return data


def is_poison(tokens: Any) -> bool:
    return len({int(token) for token in tokens[:3]}) == 1


class PoisonedTrainer(GradClipTrainer):
    """A batch with a poisoned sequence has a hundred times the loss; notes the steps that had one."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        assert set(inputs) <= {"input_ids", "labels"}, "the model never sees the indices"
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not any(is_poison(row) for row in inputs["input_ids"]):
            return loss
        self.poisoned_steps = [*getattr(self, "poisoned_steps", []), self.state.global_step + 1]
        return loss * 100


class Wait(TrainerCallback):
    """Marks a step and waits there for the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 17:
            (self.folder / "at_17").touch()
            while True:
                time.sleep(1)


if __name__ == "__main__":
    output = Path(sys.argv[1])
    settings = {"max_steps": 30, "logging_steps": 3, "save_strategy": "steps", "save_steps": 10}
    train(GradClipTrainer, clip=RECORD, callbacks=[Wait(output)], output_dir=str(output), **settings)

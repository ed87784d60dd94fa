"""A tiny Llama, a task it can learn, and one short run: what the integration tests share."""

from __future__ import annotations

import tempfile
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_gradclip.strategy import Needs, Strategy, Units
from hf_gradclip.types import ClipPlan

VOCAB = 67


def tiny_llama(seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    """About 16 thousand parameters in 21 tensors (20 if tied), the same for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.register_forward_hook(_quieter)
    return model


def _quieter(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    """Scale the loss so that the gradient norms of the counting task lie on both sides of 0.5."""
    if output.loss is not None:
        output.loss = output.loss * 0.4


def counting_data(n: int = 512, length: int = 16, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Sequences x, x + s, x + 2s, ... modulo the vocabulary, with a random start and step."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, VOCAB, (n, 1), generator=generator)
    stride = torch.randint(1, 4, (n, 1), generator=generator)
    tokens = (start + stride * torch.arange(length)) % VOCAB
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def training_args(output_dir: str, **changes: Any) -> TrainingArguments:
    """Arguments of a short quiet run on the CPU."""
    settings: dict[str, Any] = {
        "output_dir": output_dir,
        "max_steps": 50,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 3e-3,
        "seed": 7,
    }
    return TrainingArguments(**(settings | changes))


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    """All parameters in one vector, a copy."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def train(
    cls: type[Trainer],
    *,
    callbacks: list[TrainerCallback] | None = None,
    model: torch.nn.Module | None = None,
    resume: str | None = None,
    data: Any = None,
    output_dir: str | None = None,
    clip: Any = "unset",
    **changes: Any,
) -> Trainer:
    """One run of a Trainer class on the counting task; the trained Trainer."""
    extra = {} if clip == "unset" else {"clip": clip}
    with tempfile.TemporaryDirectory() as folder:
        trainer = cls(
            model=model if model is not None else tiny_llama(),
            args=training_args(output_dir or folder, **changes),
            train_dataset=counting_data() if data is None else data,
            callbacks=callbacks,
            **extra,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Trainer, key: str = "grad_norm") -> list[float]:
    """A key of the training logs, one per log that has it."""
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry and key in entry]


class Counted(NamedTuple):
    steps: torch.Tensor


@dataclass(frozen=True)
class SkipThird(Strategy):
    """Skips the third step, whatever its norm."""

    needs = Needs()

    def init(self, layout):
        return Counted(torch.zeros(()))

    def update(self, stats, state):
        return ClipPlan(torch.ones(()), skip=state.steps == 2), Counted(state.steps + 1)


FACTORS = (3.0, 1.0, 0.5)


def turn_of(name: str) -> int:
    """Where a parameter begins in FACTORS, of `Enlarge(by="tensor")`."""
    return zlib.crc32(name.encode()) % len(FACTORS)


@dataclass(frozen=True)
class Enlarge(Strategy):
    """The factors 3, 1 and 0.5 in turn: of the whole by steps, of a tensor beginning at its own one, of rows too.

    Args:
        by: "whole", "tensor" or "row"; the rows of a tensor have the factor of the tensor, but each second one has 1.
    """

    by: str = "whole"

    @property
    def per_parameter(self):
        return self.by != "whole"

    @property
    def needs(self):
        return Needs(units=Units(vectors=True, head=True)) if self.by == "row" else Needs()

    def init(self, layout):
        return Counted(torch.zeros((), dtype=torch.int64, device=layout.device))

    def update(self, stats, state):
        factors = stats.sumsq_S.new_tensor(FACTORS)
        if self.by == "whole":
            return ClipPlan(factors[state.steps % 3]), Counted(state.steps + 1)
        layout = stats.layout
        turn_P = torch.tensor([turn_of(name) for name in layout.names], device=layout.device)
        scale_S = factors[(state.steps + turn_P[layout.param_S]) % 3]
        if self.by == "row":
            scale_S = torch.where(torch.arange(len(layout), device=layout.device) % 2 == 0, scale_S, 1.0)
        return ClipPlan(scale_S), Counted(state.steps + 1)

"""Calls that a type checker takes, and calls that it must not: `make lint` checks them, and nothing runs them.

A `type: ignore` that is not needed is an error, so each of those marks a mistake that an editor shows.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from hf_gradclip import ClipConfig, Clipper, GradClipTrainer, attach
from hf_gradclip.strategies.zclip import ZClip


def right(model: nn.Module, args: TrainingArguments, accelerator: Accelerator) -> None:
    """What is documented."""
    GradClipTrainer(model, args, clip="adaptive").train()
    GradClipTrainer(model=model, args=args, train_dataset=[], callbacks=[], clip={"gradient": "zclip", "record": True})
    GradClipTrainer(model=model, args=args, clip=1.0)
    GradClipTrainer(model=model, args=args, clip=None).clip_report().summary["rate"]
    Clipper.for_model(model, ZClip(z_threshold=3.0), nonfinite="raise", on_spike=print).step()
    Clipper.for_model(model, ClipConfig.parse("adaptive"))
    attach(accelerator, {model: "adaptive"}, auto=True, record="outputs").scalars()


def wrong(model: nn.Module, args: TrainingArguments, accelerator: Accelerator) -> None:
    """Words that nobody reads, and things that are no spec."""
    GradClipTrainer(modell=model, args=args)  # type: ignore[call-arg]
    GradClipTrainer(model=model, args=args, klip="adaptive")  # type: ignore[call-arg]
    GradClipTrainer(model=model, args=args, clip=["adaptive"])  # type: ignore[arg-type]
    Clipper.for_model(model, "adaptive", nonfinit="skip")  # type: ignore[call-arg]
    Clipper.for_model(model, "adaptive", nonfinite=True)  # type: ignore[arg-type]
    Clipper.for_model(model.parameters())  # type: ignore[arg-type]
    attach(accelerator, "adaptive", recording="outputs")  # type: ignore[call-arg]

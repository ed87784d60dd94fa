"""The runs that are killed: a Trainer with a record, and finetune.py. Both go on from the newest whole checkpoint."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from finetune_parts.checkpoints import checkpoint_for, end_of_run
from finetune_parts.words import tell

from hf_gradclip import GradClipTrainer
from hf_gradclip.run.state import STATE_NAME
from hf_gradclip.state import flatten
from kills_parts.points import EVERY, STEPS, Killer

CLIP = "adaptive_norm+zclip:warmup_steps=4,z_threshold=0.5"
FALLING = "adaptive_norm+autoclip:percentile=30,window=6"
"""A chain that clips some steps of a run whose norms fall, as those of finetune.py do."""


def train(folder: Path, backend: str, killer: Killer | None) -> None:
    """The whole run, or what is left of it; `final.RANK.pt` holds what a Trainer came to, if anything was left.

    Args:
        folder: of the run.
        backend: "one process", "ddp" or "zero2"; with "finetune.py" before it finetune.py runs.
        killer: where it dies; None lets it live.
    """
    if backend.startswith("finetune.py"):
        _finetune(folder, killer)
    else:
        _train(folder, backend, killer)


def watching(killer: Killer) -> Any:
    """A callback of the Trainer that tells the killer where the run is."""
    transformers: Any = importlib.import_module("transformers")

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].register_forward_hook(passed)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            killer.step = int(state.global_step) + 1

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            killer.at(2)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            killer.at(3)

    def passed(module: Any, inputs: Any, output: Any) -> None:
        if module.training:
            killer.at(0)
            output.loss.register_hook(lambda _: killer.at(1))

    return Watch()


def _finetune(folder: Path, killer: Killer | None) -> None:
    """The same small model for all, a chain that adapts, nothing written out before and after."""
    finetune: Any = importlib.import_module("finetune")
    if killer is not None:
        begin = GradClipTrainer.__init__

        def watched(self: Any, *args: Any, **kwargs: Any) -> None:
            begin(self, *args, **kwargs)
            self.add_callback(watching(killer))

        setattr(GradClipTrainer, "__init__", watched)  # noqa: B010
        killer.patch()
    flags = {
        "output_dir": folder, "clip": FALLING, "clip_record": "true", "max_steps": STEPS, "save_steps": EVERY,
        "save_total_limit": 3, "logging_steps": 2, "eval_steps": EVERY, "max_eval_samples": 4, "block_size": 32,
        "per_device_train_batch_size": 2, "vocab_size": 512, "max_text_bytes": 100_000, "sample_tokens": 0,
        "warmup_steps": 2, "disable_tqdm": "true", "resume_from_checkpoint": "true",
    }  # fmt: skip
    finetune.main([word for key, value in flags.items() for word in (f"--{key}", str(value))])


def _train(folder: Path, backend: str, killer: Killer | None) -> None:
    tiny: Any = importlib.import_module("tests.tiny")
    transformers: Any = importlib.import_module("transformers")
    rank = int(os.environ.get("RANK", "0"))
    model = tiny.tiny_llama()
    more: dict[str, Any] = {}
    if backend == "zero2":
        sharded: Any = importlib.import_module("tests.integrations.sharded")
        sharded.without_shared_memory()
        more["deepspeed"] = sharded.deepspeed_config(2, train_micro_batch_size_per_gpu="auto")
    args = tiny.training_args(
        str(folder), max_steps=STEPS, save_strategy="steps", save_steps=EVERY, save_total_limit=3, logging_steps=2,
        optim="adamw_torch", ddp_backend="gloo" if backend != "one process" else None, **more,
    )  # fmt: skip
    trainer = GradClipTrainer(
        model, args, train_dataset=tiny.counting_data(), callbacks=[watching(killer)] if killer is not None else [],
        clip={"gradient": CLIP, "record": True},
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    if killer is not None:
        killer.patch()
    found = checkpoint_for("true", str(folder), [STATE_NAME])
    if found is not None and (ended := end_of_run(found, STEPS, 0)):
        tell(ended)
        return
    trainer.train(resume_from_checkpoint=found)
    clipper: Any = trainer.clipper
    state = {key: value.clone() for key, value in flatten(clipper.state).items()}
    left = {"weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, "state": state}
    torch.save({**left, "moments": moments(trainer)}, folder / f"final.{rank}.pt")


def moments(trainer: Any) -> list[torch.Tensor]:
    """Whatever the innermost optimizer keeps."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return [v.clone() for entry in optimizer.state.values() for v in entry.values() if torch.is_tensor(v)]

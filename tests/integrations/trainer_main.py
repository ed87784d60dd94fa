"""Run on two ranks: the Trainer through its own checkpoint, and with tensor parallelism.

Scenarios are `resume:zero2:zclip`, say, and `tensor_parallel:adagc`.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.tensor import DTensor
from transformers import DistributedConfig, LlamaForCausalLM, Trainer, TrainerCallback

from hf_gradclip import GradClipTrainer
from hf_gradclip.events import Event
from hf_gradclip.state import flatten
from tests.integrations.ranks import serve
from tests.integrations.sharded import deepspeed_config, fsdp_on_cpu, whole_weights, without_shared_memory
from tests.tiny import logged, tiny_llama, train

CLIPS = {
    "zclip": "zclip:warmup_steps=2,z_threshold=0.5,max_norm=0.38",
    "adagc": "adagc:warmup_steps=2,lambda_rel=1.01,max_norm=0.38",
}
# Of a model without the hook that makes the loss of tiny_llama smaller.
LOUD = {
    "global_norm": "global_norm:max_norm=0.95",
    "adagc": "adagc:warmup_steps=2,lambda_rel=1.01,max_norm=0.95",
}
LOUD_RATE = 0.12
ROWS = 8
AUTO = {"train_micro_batch_size_per_gpu": "auto"}
BACKENDS: dict[str, dict[str, Any]] = {
    "zero2": {"deepspeed": deepspeed_config(2, **AUTO)},
    "zero3": {"deepspeed": deepspeed_config(3, **AUTO, zero={"stage3_param_persistence_threshold": 0})},
    "fsdp2": {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"fsdp_version": 2, "cpu_ram_efficient_loading": False},
    },
}


def run(cls: type[Trainer], model: torch.nn.Module | None = None, ranks: int = 1, **changes: Any) -> Trainer:
    """10 steps of 8 rows, shared by the ranks that take data of their own, at one learning rate."""
    for state in (GradientState, AcceleratorState):
        state._reset_state()
    settings = {
        "max_steps": 10,
        "per_device_train_batch_size": ROWS // ranks,
        "lr_scheduler_type": "constant",
        "learning_rate": 0.3,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
    }
    return train(cls, model=model, **(settings | changes))


def facts(trainer: Trainer) -> dict[str, Any]:
    """What a run did."""
    return {
        "norms": logged(trainer),
        "rates": logged(trainer, "clip/tensor_rate"),
        "weights": whole_weights(trainer.model),
        "state": flatten(trainer.clipper.state),
        "backend": trainer.clipper.view.backend,
    }


def sharded(name: str, trainer: Trainer) -> bool:
    """Whether the backend is in force, not DDP under another name."""
    if name == "fsdp2":
        return all(isinstance(p, DTensor) for p in trainer.model_wrapped.parameters())
    return trainer.model_wrapped.zero_optimization_stage() == int(name[-1])


def resume(folder: str, name: str, word: str) -> dict[str, Any]:
    """10 steps, and 5 that leave a checkpoint from which a model of other weights goes on."""
    settings = {"clip": CLIPS[word], "ddp_backend": "gloo", "ranks": 2, **BACKENDS[name]}
    saving = {"max_steps": 5, "save_strategy": "steps", "save_steps": 5, "output_dir": folder}
    found = {}
    for part, seed, more in (
        ("whole", 0, {}),
        ("first", 0, saving),
        ("again", 1, {"resume": f"{folder}/checkpoint-5"}),
    ):
        with fsdp_on_cpu() if name == "fsdp2" else nullcontext():
            trainer = run(GradClipTrainer, tiny_llama(seed), **settings, **more)
        assert sharded(name, trainer)
        found[part] = facts(trainer)
        dist.barrier()
    return {**found, "saved": torch.load(f"{folder}/checkpoint-5/gradclip.pt", weights_only=True)}


def tensor_parallel_on_cpu() -> AbstractContextManager[Any]:
    """Accelerate does tensor parallelism on accelerators only; here it does it on gloo too."""
    return patch.object(Accelerator, "multi_device", True)


def tensor_parallel(folder: str, word: str) -> dict[str, Any]:
    """The model that the test saved, loaded in two halves; both ranks see the whole batch."""
    split = DistributedConfig(tp_plan="auto", tp_size=2)
    model = LlamaForCausalLM.from_pretrained(Path(folder).with_name("model"), distributed_config=split)
    assert all(isinstance(p, DTensor) for n, p in model.named_parameters() if "proj" in n)
    with tensor_parallel_on_cpu():
        trainer = run(GradClipTrainer, model, clip=LOUD[word], ddp_backend="gloo", learning_rate=LOUD_RATE)
    assert trainer.accelerator.parallelism_config.tp_size == 2
    return facts(trainer)


class Noisy(GradClipTrainer):
    """Its loss is 60 times too large in some steps."""

    noisy = (4, 9, 13)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.is_noisy = self.state.global_step in self.noisy
        return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * 60 if self.is_noisy else loss


class Choosy(TrainerCallback):
    """Rank 1 alone skips the first spike; rank 0 alone saves and stops at the third."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, int, float, Any]] = []

    def on_spike(self, args: Any, state: Any, control: Any, event: Event, **kwargs: Any) -> None:
        assert kwargs["model"] is not None
        self.heard.append((event.kind, event.step, state.global_step, event.norm, event.examples))
        if len(self.heard) == 1 and dist.get_rank() == 1:
            event.skip_step()
        if event.step == 14 and dist.get_rank() == 0:
            control.should_training_stop = control.should_save = True

    def on_skip(self, args: Any, state: Any, control: Any, event: Event, **kwargs: Any) -> None:
        self.heard.append((event.kind, event.step, state.global_step, event.norm, event.examples))


def events(folder: str, name: str) -> dict[str, Any]:
    """What callbacks ask for on one rank, and a rate that is lowered when the run is resumed."""
    settings = {"ddp_backend": "gloo", "ranks": 2, "save_strategy": "no", **BACKENDS.get(name, {})}
    found: dict[str, Any] = {}
    with fsdp_on_cpu() if name == "fsdp2" else nullcontext():
        heard, record = Choosy(), f"{folder}/heard"
        clip = {"gradient": "adaptive_norm", "record": True}
        trainer = run(Noisy, clip=clip, callbacks=[heard], output_dir=record, **{**settings, "max_steps": 20})
        assert name == "ddp" or sharded(name, trainer)
        found["heard"] = {
            "events": heard.heard,
            "steps": trainer.state.global_step,
            "saved": Path(record, "checkpoint-14", "gradclip.pt").exists(),
            "skipped": trainer.clipper.report.summary()["skipped"],
            **facts(trainer),
        }
        dist.barrier()
        clip = {"gradient": "adaptive_norm", "after_spike": "lower_rate:factor=0.1,steps=6"}
        saving = {"max_steps": 7, "save_strategy": "steps", "save_steps": 7, "output_dir": folder}
        for part, more in (
            ("whole", {"clip": clip}),
            ("first", {"clip": clip, **saving}),
            ("again", {"clip": clip, "resume": f"{folder}/checkpoint-7"}),
            ("free", {"clip": "adaptive_norm"}),
        ):
            trainer = run(Noisy, tiny_llama(1 if part == "again" else 0), **{**settings, **more})
            found[part] = facts(trainer)
            dist.barrier()
    return found


def judged(folder: str, name: str) -> dict[str, Any]:
    """The losses that a strategy judges with two micro-batches a step, and those that the Trainer logs."""
    settings: dict[str, Any] = {"ddp_backend": "gloo", "ranks": 2, "gradient_accumulation_steps": 2}
    if name == "zero2":
        settings["deepspeed"] = deepspeed_config(2, gradient_accumulation_steps="auto", **AUTO)
    trainer = run(GradClipTrainer, clip="skip_step:on=loss", output_dir=folder, **settings)
    assert name == "ddp" or sharded(name, trainer)
    return {"judged": trainer.clipper.state.losses[:10].tolist(), "logged": logged(trainer, "loss")}


def scenario(name: str) -> dict[str, Any]:
    word, *rest = name.split(":")
    folder = Path(sys.argv[1], name.replace(":", "_"))
    return {"resume": resume, "tensor_parallel": tensor_parallel, "events": events, "judged": judged}[word](
        str(folder), *rest
    )


if __name__ == "__main__":
    if any("zero" in name for name in sys.argv[2:]):
        without_shared_memory()
    serve(scenario)

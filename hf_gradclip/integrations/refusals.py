"""What an Accelerator or a Trainer is refused for at start-up: by name, with what to use instead."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hf_gradclip.config import ClipConfig
from hf_gradclip.optim.optimizer import ClippedOptimizer
from hf_gradclip.run.closure import repeats
from hf_gradclip.run.refusal import Refusal, refuse
from hf_gradclip.strategy import parts_of

_OWN = "the backend's own clipping: clip=None in the Trainer, or no attach()"
_IN_BACKWARD = ("lomo", "adalomo", "layerwise")  # as the name of a Trainer's optimizer ends


def refuse_unsupported(accelerator: Any) -> None:
    """Stop at start-up where clipping would be inactive or wrong.

    Raises:
        UnsupportedBackendError: with the backend's name, the reason and what to use instead.
    """
    refuse(_of_accelerator(accelerator))


def _of_accelerator(accelerator: Any) -> Iterator[Refusal]:
    kind = accelerator.distributed_type
    yield Refusal(
        kind.name == "MEGATRON_LM",
        kind.value,
        "Megatron-LM clips inside its own step.",
        "Set its clip_grad, or use FSDP2 or DDP through Accelerate.",
    )
    yield Refusal(
        kind.name == "XLA", kind.value, "XLA traces the step, and hf_gradclip reads a flag in it.", f"Use {_OWN}."
    )
    sizes = getattr(accelerator, "parallelism_config", None)
    for axis, name in (("cp_size", "context"), ("sp_size", "sequence"), ("pp_size", "pipeline")):
        size = getattr(sizes, axis, 1)
        yield Refusal(
            size > 1,
            f"ParallelismConfig({axis}={size})",
            f"{name} parallelism is not tested with hf_gradclip.",
            f"Use {axis}=1, or {_OWN}.",
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    yield Refusal(
        launched > 1 and accelerator.num_processes == 1,
        f"WORLD_SIZE={launched}, but Accelerate sees one process",
        f"these would be {launched} separate runs.",
        "On a machine without GPUs set ACCELERATE_USE_CPU=true, or use_cpu=True in TrainingArguments; "
        "with DeepSpeed there instead, ddp_backend='gloo' in TrainingArguments, or "
        "Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend='gloo')]).",
    )


def refuse_replaced(accelerator: Any) -> None:
    """Stop where somebody else has taken the clip call of a loop.

    Raises:
        UnsupportedBackendError: with the name of who has it.
    """
    call = vars(accelerator).get("clip_grad_norm_", type(accelerator).clip_grad_norm_)
    refuse(
        [
            Refusal(
                call.__module__ != "accelerate.accelerator",
                f"accelerator.clip_grad_norm_ is already replaced, by {call.__module__}",
                "a second attach(), or another library: one of the two would be inactive.",
                "Remove the other patch.",
            )
        ]
    )


def refuse_optimizer(name: str, sagemaker: bool) -> None:
    """Stop a Trainer that would never come to a clip.

    Args:
        name: what TrainingArguments hold as `optim`.
        sagemaker: whether SageMaker's model parallelism is on.

    Raises:
        UnsupportedBackendError: by name, with what to use instead.
    """
    refuse(
        (
            Refusal(
                name.endswith(_IN_BACKWARD),
                f"TrainingArguments(optim={name!r})",
                "steps inside backward, before any gradient can be clipped.",
                "Use another optim, or clip=None.",
            ),
            Refusal(
                sagemaker,
                "SageMaker model parallelism",
                "it clips its own master gradients.",
                "Use DDP, or clip=None.",
            ),
        )
    )


def refuse_several_gradients(optimizer: Any, configs: Sequence[ClipConfig]) -> None:
    """Stop where an optimizer takes several gradients for one step of the weights.

    Args:
        optimizer: without wrappers.
        configs: of the models.

    Raises:
        UnsupportedBackendError: by the optimizer's name, with what to use instead.
    """
    name = type(optimizer).__name__
    skips = any(c.nonfinite == "skip" or any(part.skips for part in parts_of(c.gradient)) for c in configs)
    refuse(
        (
            repeats(name, isinstance(optimizer, torch.optim.LBFGS)),
            Refusal(
                hasattr(optimizer, "second_step") and skips,
                f"{name} with steps that may be skipped",
                "its first step moves the weights, and its second one, which would be left out, moves them back.",
                "Use nonfinite='raise' or 'pass', and a strategy that skips nothing.",
            ),
        )
    )


def refuse_swap(accelerator: Any, *objects: Any) -> None:
    """Stop before Accelerate, under optimizer offload, puts DeepSpeedCPUAdam in the place of our optimizer.

    Args:
        accelerator: of this process.
        *objects: what `prepare` was given.

    Raises:
        UnsupportedBackendError: with the setting that keeps the optimizer.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return
    config = plugin.deepspeed_config
    device = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    swaps = device != "none" and config.get("zero_force_ds_cpu_optimizer", True)
    refuse(
        Refusal(
            swaps and isinstance(thing, ClippedOptimizer),
            f"hf_gradclip.optim.{type(thing).__name__} with offload_optimizer",
            "Accelerate would put DeepSpeedCPUAdam in its place.",
            "Set zero_force_ds_cpu_optimizer to false in the DeepSpeed configuration, or use an optimizer of "
            "DeepSpeed; its updates can be clipped too.",
        )
        for thing in objects
    )


def refuse_second_engine(found: bool) -> None:
    """Stop where one accelerator has prepared two DeepSpeed engines.

    Raises:
        UnsupportedBackendError: with what to use instead.
    """
    what = "DeepSpeed with two prepared engines"
    refuse([Refusal(found, what, "one accelerator clips one of them only.", "Use an Accelerator per engine.")])


def refuse_release(found: bool) -> None:
    """Stop where a clip is to be undone inside an engine of DeepSpeed.

    Raises:
        UnsupportedBackendError: with what to do instead.
    """
    what = "undo() after a training under DeepSpeed"
    refuse([Refusal(found, what, "its engine keeps the clip.", "Undo before train(), or make another Trainer.")])


def refuse_second_record(found: bool) -> None:
    """Stop where two models would be recorded.

    Raises:
        UnsupportedBackendError: with what to do instead.
    """
    refuse(
        [
            Refusal(
                found,
                "record with two prepared models",
                "each needs a folder of its name, which must be known before the first is recorded.",
                "Name them, attach(accelerator, {model: spec, ...}, record=...), or use joint=True.",
            )
        ]
    )


def refuse_joint(engine: bool, models: Sequence[nn.Module]) -> None:
    """Stop where the norms of several models cannot be one.

    Args:
        engine: whether DeepSpeed has them.
        models: prepared.

    Raises:
        UnsupportedBackendError: with what to use instead.
    """
    flat = any(type(module).__name__ == "FullyShardedDataParallel" for model in models for module in model.modules())
    own = "Use a norm for each model, attach(accelerator, {model: spec, ...})"
    refuse(
        (
            Refusal(engine, "joint=True with DeepSpeed", "an engine clips its own model inside its step.", f"{own}."),
            Refusal(
                flat and len(models) > 1,
                "joint=True with FSDP1",
                "the shards of two models need not add up over the same ranks.",
                f"{own}, or FSDP2 (fsdp_version: 2) and a prepare call for each model.",
            ),
        )
    )

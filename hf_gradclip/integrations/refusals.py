"""What an Accelerator is refused for at start-up: by name, with what to use instead."""

from __future__ import annotations

import os
from typing import Any

from hf_gradclip.optim.clipped import ClippedOptimizer
from hf_gradclip.views.view import UnsupportedBackendError

_OWN = "the backend's own clipping: clip=None in the Trainer, or no attach()"
_REFUSED = {
    "MEGATRON_LM": "Megatron-LM clips inside its own step. Set its clip_grad, or use FSDP2 or DDP through Accelerate.",
    "XLA": f"XLA traces the step, and hf_gradclip reads a flag in it. Use {_OWN}.",
}


def refuse_unsupported(accelerator: Any) -> None:
    """Stop at start-up where clipping would be inactive or wrong.

    Raises:
        UnsupportedBackendError: with the backend's name, the reason and what to use instead.
    """
    kind = accelerator.distributed_type
    if kind.value in _REFUSED or kind.name in _REFUSED:
        raise UnsupportedBackendError(f"{kind.value}: {_REFUSED[kind.name]}")
    sizes = getattr(accelerator, "parallelism_config", None)
    for axis, name in (("cp_size", "context"), ("sp_size", "sequence"), ("pp_size", "pipeline")):
        if getattr(sizes, axis, 1) > 1:
            raise UnsupportedBackendError(
                f"ParallelismConfig({axis}={getattr(sizes, axis)}): {name} parallelism is not tested with hf_gradclip. "
                f"Use {axis}=1, or {_OWN}."
            )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and accelerator.num_processes == 1:
        raise UnsupportedBackendError(
            f"WORLD_SIZE={launched}, but Accelerate sees one process: these would be {launched} separate runs. "
            "On a machine without GPUs set ACCELERATE_USE_CPU=true, or use_cpu=True in TrainingArguments; "
            "with DeepSpeed there instead, ddp_backend='gloo' in TrainingArguments, or "
            "Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend='gloo')])."
        )
    stock = type(accelerator).clip_grad_norm_.__module__ == "accelerate.accelerator"
    if not stock or "clip_grad_norm_" in vars(accelerator):
        raise UnsupportedBackendError(
            "accelerator.clip_grad_norm_ is already replaced, by another library or by a second attach(). "
            "One of the two would be inactive: remove the other patch."
        )


def refuse_swap(accelerator: Any, *objects: Any, **_: Any) -> None:
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
    if device == "none" or not config.get("zero_force_ds_cpu_optimizer", True):
        return
    for thing in objects:
        if isinstance(thing, ClippedOptimizer):
            raise UnsupportedBackendError(
                f"hf_gradclip.optim.{type(thing).__name__} with offload_optimizer: Accelerate would put "
                "DeepSpeedCPUAdam in its place. Set zero_force_ds_cpu_optimizer to false in the DeepSpeed "
                "configuration, or use an optimizer of DeepSpeed; its updates can be clipped too."
            )

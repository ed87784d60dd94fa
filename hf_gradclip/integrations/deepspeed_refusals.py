"""What a DeepSpeed engine is refused for: by the setting's name, with what to use instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hf_gradclip.config import ClipConfig
from hf_gradclip.run.refusal import Refusal, refuse
from hf_gradclip.views.partitions import KINDS, Bf16


def refuse_settings(engine: Any, config: ClipConfig) -> None:
    """Stop where a setting would make clipping inactive or wrong.

    Raises:
        UnsupportedBackendError: by the setting's name, with what to use instead.
    """
    refuse(_of_engine(engine))
    refuse(_of_config(config, type(engine.optimizer).__name__))


def _of_engine(engine: Any) -> Iterator[Refusal]:
    zero, name = engine.optimizer, type(engine.optimizer).__name__
    yield _unsupported(type(engine).__name__ == "PipelineEngine", "pipeline parallelism", "ZeRO without a pipeline")
    yield _unsupported(
        getattr(engine, "mp_world_size", 1) > 1,
        "tensor parallelism",
        "ZeRO alone, or tensor parallelism of transformers without DeepSpeed",
    )
    yield _unsupported(_has(zero, "zenflow") or "ZenFlow" in name, "ZenFlow", "plain optimizer offload")
    yield _unsupported("SuperOffload" in name, "SuperOffload", "plain optimizer offload")
    yield _unsupported(_on_nvme(engine), "NVMe offload", 'offload to "cpu"')
    yield _unsupported(
        getattr(zero, "compute_grad_norm", True) is False, "compute_grad_norm=false", "compute_grad_norm=true"
    )
    yield _unsupported(_has(engine, "has_moe_layers"), "mixture of experts", "a model without DeepSpeed MoE layers")
    yield _unsupported(_has(zero, "use_muon") or _has(zero, "_uses_muon"), "Muon", "another optimizer")
    yield _unsupported(
        getattr(zero, "torch_autocast_gradscaler", None) is not None,
        "torch_autocast with a GradScaler",
        "torch_autocast in bf16",
    )
    yield _unsupported(
        name not in KINDS and not isinstance(zero, torch.optim.Optimizer),
        "ZeRO stage 0 in bf16 or fp16",
        "stage 1, or float32",
    )


def _unsupported(found: bool, what: str, instead: str) -> Refusal:
    """A row for what nobody has tried, or what steps elsewhere."""
    return Refusal(found, f"DeepSpeed with {what}", "not supported by hf_gradclip.", f"Use {instead}, or clip=None.")


def _of_config(config: ClipConfig, name: str) -> Iterator[Refusal]:
    yield Refusal(
        config.fold or not config.skip_sync,
        f"{'fold=True' if config.fold else 'skip_sync=False'} under DeepSpeed",
        "its step unscales each part itself and reads its own overflow.",
        "Leave it out.",
    )
    yield Refusal(
        config.update is not None and name == Bf16.of,
        "clipping updates under DeepSpeed's BF16_Optimizer (bf16 with grad_accum_dtype=fp32 in stage 1)",
        "not supported.",
        "Leave grad_accum_dtype out, or use stage 2.",
    )
    yield Refusal(
        config.nonfinite == "pass" and name in KINDS,
        "nonfinite='pass' under DeepSpeed ZeRO",
        "the optimizer itself skips a step with a NaN or inf.",
        "Use nonfinite='skip' or 'raise'.",
    )


def refuse_release(version: str, optimizer: Any, missing: list[str]) -> None:
    """Stop where a release of DeepSpeed lacks something that the seams stand on.

    Args:
        version: of DeepSpeed.
        optimizer: the ZeRO optimizer.
        missing: the attributes that it should have, and has not.

    Raises:
        UnsupportedBackendError: with the names of what is missing.
    """
    row = Refusal(
        bool(missing),
        f"DeepSpeed {version}",
        f"{type(optimizer).__name__} has no {', '.join(missing)}, where hf_gradclip hooks in.",
        "Install the version in constraints.txt, or use clip=None.",
    )
    refuse([row])


def _has(owner: Any, flag: str) -> bool:
    return bool(getattr(owner, flag, False))


def _on_nvme(engine: Any) -> bool:
    offload = (engine.zero_offload_optimizer(), engine.zero_offload_param())
    devices = [getattr(config, "device", None) for config in offload]
    return any(str(getattr(device, "value", device)) == "nvme" for device in devices)

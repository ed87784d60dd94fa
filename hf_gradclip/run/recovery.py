"""What an optimizer did to the weights, recovered from the weights before and after its step.

u = (w (1 - lr decay) - w') / lr, with the decay only where the optimizer applies it apart from the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_gradclip.run.refusal import Refusal, refuse

_DECOUPLED = ("AdamW", "Lion", "Muon", "Adafactor")
_COUPLED = ("SGD", "Adam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD")


def recover_(copy: Tensor, weight: Tensor, lr: float, decay: float) -> None:
    """copy <- ((1 - lr decay) copy - weight) / lr: the weights before the step become its update; 0 where lr is 0."""
    if lr == 0:
        copy.zero_()
    else:
        copy.mul_(1 - lr * decay).sub_(weight).div_(lr)


def decay_of(optimizer: Any, group: dict[str, Any]) -> float:
    """The weight decay that the optimizer applies to the weights, times lr; 0 where it goes through the gradient."""
    decay = float(group.get("weight_decay") or 0.0)
    return decay if decay and _is_decoupled(optimizer, group) else 0.0


def _is_decoupled(optimizer: Any, group: dict[str, Any]) -> bool | None:
    """None where nobody says."""
    for word in ("decoupled_weight_decay", "weight_decouple"):  # of torch, of pytorch_optimizer
        if word in group:
            return bool(group[word])
    if hasattr(optimizer, "adam_w_mode"):  # DeepSpeed's FusedAdam and DeepSpeedCPUAdam
        return bool(optimizer.adam_w_mode)
    name = type(optimizer).__name__
    return True if name in _DECOUPLED else False if name in _COUPLED else None


def refuse_recovery(optimizer: Any, dtypes: Sequence[torch.dtype]) -> None:
    """Stop where an update cannot be told from the weights.

    Raises:
        UnsupportedBackendError: by the optimizer's name, with what to use instead.
    """
    refuse(_unrecovered(optimizer, dtypes))


def _unrecovered(optimizer: Any, dtypes: Sequence[torch.dtype]) -> Iterator[Refusal]:
    name = f"clipping updates of {type(optimizer).__name__}"
    yield Refusal(
        all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")),
        name,
        "its weights of training and of evaluation move apart, and only those of training would be limited.",
        "Clip the gradient alone, or use AdamW.",
    )
    low = sorted({str(dtype) for dtype in dtypes if dtype not in (torch.float32, torch.float64)})
    yield Refusal(
        bool(low),
        f"{name} on {', '.join(low)} weights",
        "an update is smaller than their rounding.",
        "Use float32 weights with bf16=True (autocast), or an optimizer of hf_gradclip.optim.",
    )
    for group in optimizer.param_groups:
        decay = group.get("weight_decay")
        yield Refusal(
            group.get("lr") is None,
            f"{name}(lr=None)",
            "it makes its own learning rate, so the update is not known.",
            "Set lr (Adafactor: relative_step=False).",
        )
        yield Refusal(
            bool(decay and group.get("scale_parameter")),
            f"{name}(scale_parameter=True, weight_decay={decay})",
            "the decay is scaled too, so the update is not known.",
            "Set scale_parameter=False or weight_decay=0.",
        )
        yield Refusal(
            bool(decay) and bool(getattr(optimizer, "decoupled_wd", False)),  # of lion_pytorch
            f"{name}(decoupled_weight_decay=True, weight_decay={decay})",
            "the decay is divided by the learning rate that it began with, so the update is not known.",
            "Leave decoupled_weight_decay out, and give the decay divided by that rate.",
        )
        yield Refusal(
            bool(decay and group.get("fixed_decay")),  # of pytorch_optimizer
            f"{name}(fixed_decay=True, weight_decay={decay})",
            "the decay does not go along with the learning rate, so the update is not known.",
            "Leave fixed_decay out, and give the decay divided by that rate.",
        )
        yield Refusal(
            bool(decay) and _is_decoupled(optimizer, group) is None,
            f"{name}(weight_decay={decay})",
            "is the decay a part of the gradient or apart from it?",
            "Put decoupled_weight_decay=True or False into its parameter groups.",
        )

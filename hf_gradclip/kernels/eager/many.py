"""Whole gradients of a GPU in plain torch, many in a launch: where Triton does not serve, launches are what takes time.

A factor on the device is never read by the host. One that serves all is a launch for hundreds of gradients; of one for
each torch has no such form, and each gradient is a launch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_gradclip.device import moved
from hf_gradclip.kernels.table import DTYPES, PLAIN

GPUS = ("cuda", "xpu")
INF = float("inf")


def groups_of(grads: Sequence[Tensor | None]) -> list[list[int]]:
    """The places of gradients that are taken here, those of one dtype and device together."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for i, grad in enumerate(grads):
        if grad is not None and grad.device.type in GPUS and grad.dtype in DTYPES and type(grad) in PLAIN:
            groups[grad.device, grad.dtype].append(i)
    return list(groups.values())


def norms(grads: list[Tensor]) -> Tensor:
    """Of gradients of one dtype; shape (len(grads),). A GPU adds in so many lanes that float32 is exact enough."""
    dtype = torch.float32 if grads[0].dtype.itemsize < 4 else None
    return torch.stack(torch._foreach_norm(grads, 2, dtype=dtype))


def largest(grads: list[Tensor]) -> Tensor:
    """The largest absolute element of each, none of them empty; NaN stays."""
    return torch.stack(torch._foreach_norm(grads, INF))


def scale_(grads: list[Tensor], scale_S: Tensor) -> None:
    """Multiply gradients of one dtype on one device by their factors, shape (len(grads),) or 0-d, and round once."""
    if scale_S.is_cpu:
        numbers = scale_S.expand(len(grads)).tolist()
        asked = [(grad, number) for grad, number in zip(grads, numbers, strict=True) if number != 1.0]
        if asked:
            torch._foreach_mul_([grad for grad, _ in asked], [number for _, number in asked])
        return
    scale_on_device_(grads, moved(scale_S, grads[0].device, torch.float32))


def scale_on_device_(grads: list[Tensor], factor_S: Tensor) -> None:
    """The same by factors that are where the gradients are, in float32."""
    overflowed = torch.zeros((), dtype=torch.float32, device=factor_S.device)  # a GradScaler would look at it
    unscale_ = torch._amp_foreach_non_finite_check_and_unscale_  # in float32 and rounded once, many in a launch
    if factor_S.ndim == 0:
        unscale_(grads, overflowed, factor_S)
        return
    for grad, factor in zip(grads, factor_S.unbind(), strict=True):
        if grad.dtype == torch.float32:
            grad.mul_(factor)
        else:
            unscale_([grad], overflowed, factor)  # `mul_` would round a 0-d factor to 16 bits, as the gradient


def clamp_(grads: list[Tensor], bound_S: Tensor) -> None:
    """Clamp gradients of one dtype on one device to [-bound, bound], shape (len(grads),); NaN stays."""
    if bound_S.is_cpu:
        pairs = [(grad, bound) for grad, bound in zip(grads, bound_S.tolist(), strict=True) if bound != INF]
        if pairs:
            bounded = [grad for grad, _ in pairs]
            torch._foreach_clamp_max_(bounded, [bound for _, bound in pairs])
            torch._foreach_clamp_min_(bounded, [-bound for _, bound in pairs])
        return
    bound_S = moved(bound_S, grads[0].device, torch.float32)
    for grad, low, high in zip(grads, bound_S.neg().unbind(), bound_S.unbind(), strict=True):
        torch.clamp(grad, low, high, out=grad)

"""The kernels in plain torch, for every device.

A gradient is a flat alias of its memory (`flat`), or None where it is missing. Sums of squares are taken in rows of a
few thousand elements, each in float32, and added in float64: as fast as one long float32 sum, and a thousand times
closer. 16-bit memory goes through a float32 buffer that fits the cache, because torch rounds a 16-bit norm to 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROW = 4096
CHUNK = 1 << 18


def flat(grad: Tensor) -> Tensor | None:
    """A 1-D alias of the gradient's memory; None if its elements do not fill one block of memory, each once."""
    if grad.is_complex():
        grad = torch.view_as_real(grad)
    if grad.is_contiguous():
        return grad.view(-1)
    if torch.ops.aten.is_non_overlapping_and_dense(grad):
        return grad.as_strided((grad.numel(),), (1,))
    return None


def sumsq(grads: Sequence[Tensor | None], divisors: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sum of squares per gradient, shape (len(grads),); a missing or empty gradient gives 0.

    Args:
        grads: flat, real, on any devices.
        divisors: divide each gradient by this first, shape (len(grads),): `max_abs` of them, against overflow.
        dtype: of the result and of the last addition, float64 where the device has it.
        device: of the result.
    """
    zero = torch.zeros((), dtype=dtype, device=device)
    sums = []
    for i, grad in enumerate(grads):
        if grad is None or grad.numel() == 0:
            sums.append(zero)
            continue
        divisor = None if divisors is None else divisors[i].to(grad.device)
        sums.append(_sumsq(grad, divisor, dtype).to(device, non_blocking=True))
    return torch.stack(sums) if sums else zero.view(1)[:0]


def _sumsq(grad: Tensor, divisor: Tensor | None, dtype: torch.dtype) -> Tensor:
    if divisor is None and grad.dtype == torch.float32:
        return _rows(grad, dtype)
    if divisor is None and grad.dtype == torch.float64:
        return torch.linalg.vector_norm(grad).square().to(dtype)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=dtype, device=grad.device)
    for chunk in grad.split(CHUNK):
        chunk = chunk.to(wide)
        if divisor is not None:
            chunk = chunk / divisor.to(wide)
        total += _rows(chunk, dtype)
    return total


def _rows(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of squares of a 1-D float32 or float64 tensor, 0-d."""
    whole = grad.numel() // ROW * ROW
    norms = []
    if whole:
        norms.append(torch.linalg.vector_norm(grad[:whole].view(-1, ROW), dim=1))
    if whole < grad.numel():
        norms.append(torch.linalg.vector_norm(grad[whole:]).view(1))
    return sum(
        (norm.to(dtype).square().sum() for norm in norms), start=torch.zeros((), dtype=dtype, device=grad.device)
    )


def max_abs(grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Largest absolute element per gradient, shape (len(grads),); missing gives 0, NaN gives inf."""
    zero = torch.zeros((), dtype=dtype, device=device)
    largest = []
    for grad in grads:
        if grad is None or grad.numel() == 0:
            largest.append(zero)
            continue
        low, high = torch.aminmax(grad)
        largest.append(torch.maximum(-low, high).to(device=device, dtype=dtype, non_blocking=True))
    if not largest:
        return zero.view(1)[:0]
    return torch.stack(largest).nan_to_num(nan=float("inf"), posinf=float("inf"))


def divisors(largest: Tensor) -> Tensor:
    """What `sumsq` divides by so that no square overflows: the largest element, 1 where it is 0 or not finite."""
    return torch.where((largest > 0) & largest.isfinite(), largest, 1.0)


def scale_(grads: Sequence[Tensor | None], scale_S: Tensor) -> None:
    """Multiply each gradient by its factor, shape (len(grads),) or 0-d. On the CPU a factor of 1 writes nothing."""
    if scale_S.device.type == "cpu":
        factors = scale_S.expand(len(grads)).tolist()  # the early exit on CPU: a read that costs nothing there
        for grad, factor in zip(grads, factors, strict=True):
            if grad is not None and factor != 1.0:
                grad.mul_(factor)  # not _foreach_mul_, which rounds the factor to 16 bits with the gradient
        return
    for grad, scale in zip(grads, scale_S.float().expand(len(grads)), strict=True):
        if grad is None:
            continue
        factor = scale.to(grad.device, non_blocking=True)
        if grad.element_size() < 4:
            grad.copy_(grad.float() * factor)  # a 0-d factor would be rounded to 16 bits with the gradient
        else:
            grad.mul_(factor)


def clamp_(grads: Sequence[Tensor | None], bound_S: Tensor) -> None:
    """Clamp each gradient to [-bound, bound], shape (len(grads),). On the CPU an infinite bound writes nothing."""
    if bound_S.device.type == "cpu":
        for grad, bound in zip(grads, bound_S.tolist(), strict=True):  # the early exit on CPU
            if grad is not None and bound != float("inf"):
                grad.clamp_(-bound, bound)
        return
    for grad, bound in zip(grads, bound_S.float(), strict=True):
        if grad is not None:
            limit = bound.to(grad.device, non_blocking=True)
            torch.clamp(grad, -limit, limit, out=grad)

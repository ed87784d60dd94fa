"""Whole gradients in plain torch, for every device and dtype.

A gradient is contiguous memory of any shape, or None where it is missing. Sums of squares are taken in rows of a few
thousand elements, each in float32, and added in float64: as fast as one long float32 sum, and a thousand times closer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_gradclip.device import moved
from hf_gradclip.kernels.blocks import device_of_bounds, insist_on_numbers
from hf_gradclip.kernels.eager import many
from hf_gradclip.kernels.eager.half import CHUNK, SMALL, divisor_of, half_sums
from hf_gradclip.kernels.table import MisfitError, dense, insist_on_memory
from hf_gradclip.types import statistics_dtype

ROW = 4096


def flat(grad: Tensor) -> Tensor | None:
    """A 1-D alias of the gradient's memory; None if its elements do not fill one block of memory, each once."""
    if grad.is_complex():
        grad = torch.view_as_real(grad)
    if grad.is_contiguous():
        return grad.view(-1)
    if torch.ops.aten.is_non_overlapping_and_dense(grad):
        return grad.as_strided((grad.numel(),), (1,))
    return None


def statistics(
    grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device, max_abs: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of squares and, by one more read, largest element per gradient; see operations.Whole. Any devices."""
    _insist_on_memory(grads)
    return sumsq(grads, None, dtype, device), largest(grads, dtype, device) if max_abs else None


def apply_(grads: Sequence[Tensor | None], scale_S: Tensor, bound_S: Tensor | None) -> None:
    """g <- clamp(g * scale, -bound, +bound), in place; see operations.Whole. Any devices."""
    _insist_on_memory(grads)
    insist_on_numbers("scale_S", scale_S, ((), (len(grads),)), scale_S.device)
    insist_on_numbers("bound_S", bound_S, ((), (len(grads),)), device_of_bounds(scale_S, bound_S))
    scale_(grads, scale_S)
    if bound_S is not None:
        clamp_(grads, bound_S.expand(len(grads)))


def _insist_on_memory(grads: Sequence[Tensor | None]) -> None:
    for i, grad in enumerate(grads):
        if grad is not None:
            insist_on_memory(f"gradient {i}", grad, written=False)
            if not dense(grad):
                raise MisfitError(f"gradient {i} has strides {grad.stride()}: it must be contiguous. Pass flat of it.")


def sumsq(grads: Sequence[Tensor | None], divisors: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sum of squares per gradient, shape (len(grads),); a missing or empty gradient gives 0.

    Args:
        grads: contiguous, real, on any devices.
        divisors: divide each gradient by this first, shape (len(grads),): `largest` of them, against overflow.
        dtype: of the result and of the last addition, float64 where the device has it.
        device: of the result.
    """
    present = [grad for grad in grads if grad is not None]
    if divisors is None and len(present) == len(grads) and _alike(present):
        return _sums(present).to(device=device, dtype=dtype)
    groups: dict[tuple[torch.device, torch.dtype], Placed] = {}
    sums = torch.zeros(len(grads), dtype=dtype, device=device)
    for i, grad in enumerate(grads):
        if grad is None or grad.numel() == 0:
            continue
        if divisors is not None:
            sums[i] = moved(_divided(grad, moved(divisors[i], grad.device), dtype), device)
        else:
            groups.setdefault((grad.device, grad.dtype), []).append((i, grad))
    for group in groups.values():
        values = _sums([grad for _, grad in group])
        places = moved(torch.tensor([i for i, _ in group], device="cpu"), device)
        sums.index_copy_(0, places, moved(values, device, dtype))
    return sums


Placed = list[tuple[int, Tensor]]
"""Gradients with their places among others."""


def _alike(grads: list[Tensor]) -> bool:
    """Whether all of them, one at least, are of one dtype and on one device."""
    return len(set(map(Tensor.get_device, grads))) == 1 and len({grad.dtype for grad in grads}) == 1


def _sums(grads: list[Tensor]) -> Tensor:
    """Sums of gradients of one dtype on one device, in float64 where there is one; shape (len(grads),)."""
    device, dtype = grads[0].device, grads[0].dtype
    if device.type == "cpu" and dtype.itemsize < 4:
        return half_sums(grads)
    double = statistics_dtype(device)
    if device.type in many.GPUS:
        return many.norms(grads).to(double).square()
    norm_dtype = torch.float32 if dtype.itemsize < 4 else None
    if max(map(Tensor.numel, grads)) <= SMALL:
        return torch.stack(torch._foreach_norm(grads, 2, dtype=norm_dtype)).to(double).square()
    rows = [_row_norms(grad, norm_dtype) for grad in grads]
    if device.type == "cpu":
        lengths = torch.tensor(list(map(len, rows)), device="cpu")
        return torch.segment_reduce(torch.cat(rows).double().square_(), "sum", lengths=lengths, unsafe=True)
    return torch.stack(torch._foreach_norm(rows, 2, dtype=double)).square()


def _row_norms(grad: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The norms of rows of at most ROW elements, and of what is left over."""
    size = grad.numel()
    if size <= ROW:
        return torch.linalg.vector_norm(grad, dtype=dtype).view(1)
    row = divisor_of(size, ROW)
    if 4 * row >= ROW:
        return torch.linalg.vector_norm(grad.view(-1, row), dim=1, dtype=dtype)
    flat, whole = grad.view(-1), size // ROW * ROW
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=dtype)
    return torch.cat([norms, torch.linalg.vector_norm(flat[whole:], dtype=dtype).view(1)])


def _divided(grad: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of squares of grad / divisor, chunk by chunk."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=dtype, device=grad.device)
    for chunk in grad.view(-1).split(CHUNK):
        total += _row_norms(chunk.to(wide) / divisor.to(wide), None).to(dtype).square().sum()
    return total


def largest(grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Largest absolute element per gradient, shape (len(grads),); missing gives 0, NaN gives inf."""
    taken = [None if grad is None or grad.numel() == 0 else grad for grad in grads]
    groups = many.groups_of(taken)
    found = [(group, many.largest(_at(taken, group))) for group in groups]
    left = {i for i, grad in enumerate(taken) if grad is not None}.difference(*groups)
    others: dict[torch.device, list[int]] = defaultdict(list)
    for i in sorted(left):
        others[_at(taken, [i])[0].device].append(i)
    for group in others.values():
        lows, highs = zip(*map(torch.aminmax, _at(taken, group)), strict=True)
        found.append((group, torch.maximum(-torch.stack(lows), torch.stack(highs))))
    largest = torch.zeros(len(grads), dtype=dtype, device=device)
    for group, tops in found:
        values = moved(tops, device, dtype).nan_to_num(nan=float("inf"), posinf=float("inf"))
        if len(group) == len(grads):  # the usual case needs no places, and so no copy from the host
            return values
        places = moved(torch.tensor(group, device="cpu"), device)
        largest.index_copy_(0, places, values)
    return largest


def divisors(largest: Tensor) -> Tensor:
    """What `sumsq` divides by so that no square overflows: the largest element, 1 where it is 0 or not finite."""
    return torch.where((largest > 0) & largest.isfinite(), largest, 1.0)


def scale_(grads: Sequence[Tensor | None], scale_S: Tensor) -> None:
    """Multiply each gradient by its factor, shape (len(grads),) or 0-d. On the CPU a factor of 1 writes nothing."""
    grads = _without_many(grads, scale_S, many.scale_)
    if scale_S.device.type == "cpu":
        if scale_S.ndim == 0:
            number = float(scale_S)  # the early exit on CPU: a read that costs nothing there
            if number == 1.0:
                return
            present = [grad for grad in grads if grad is not None]
            if here := [grad for grad in present if grad.is_cpu]:
                wide = torch.float64 if torch.float64 in {grad.dtype for grad in here} else torch.float32
                torch._foreach_mul_(here, scale_S.to(wide))  # a number it would round to the 16 bits of a gradient
            for other in present:
                if not other.is_cpu:
                    other.mul_(number)
            return
        for grad, number in zip(grads, scale_S.tolist(), strict=True):
            if grad is not None and number != 1.0:
                grad.mul_(number)
        return
    for grad, scale in zip(grads, scale_S.expand(len(grads)), strict=True):
        if grad is None:
            continue
        factor = moved(scale, grad.device, torch.promote_types(grad.dtype, torch.float32))
        if grad.element_size() < 4:
            grad.copy_(grad.float() * factor)  # a 0-d factor would be rounded to 16 bits with the gradient
        else:
            grad.mul_(factor)


def clamp_(grads: Sequence[Tensor | None], bound_S: Tensor) -> None:
    """Clamp each gradient to [-bound, bound], shape (len(grads),). On the CPU an infinite bound writes nothing."""
    grads = _without_many(grads, bound_S, many.clamp_)
    if bound_S.device.type == "cpu":
        for grad, bound in zip(grads, bound_S.tolist(), strict=True):  # the early exit on CPU
            if grad is not None and bound != float("inf"):
                grad.clamp_(-bound, bound)
        return
    for grad, bound in zip(grads, bound_S, strict=True):
        if grad is not None:
            limit = moved(bound, grad.device, torch.promote_types(grad.dtype, torch.float32))
            torch.clamp(grad, -limit, limit, out=grad)


def _without_many(
    grads: Sequence[Tensor | None], number_S: Tensor, write: Callable[[list[Tensor], Tensor], None]
) -> Sequence[Tensor | None]:
    """The gradients that are left when those of a GPU have been written, many at once."""
    left = list(grads)
    for group in many.groups_of(grads):
        own = number_S if number_S.ndim == 0 or len(group) == len(grads) else torch.stack([number_S[i] for i in group])
        write(_at(grads, group), own)
        for i in group:
            left[i] = None
    return left


def _at(grads: Sequence[Tensor | None], places: list[int]) -> list[Tensor]:
    """Those at some places, where none is missing."""
    return [grad for i in places if (grad := grads[i]) is not None]

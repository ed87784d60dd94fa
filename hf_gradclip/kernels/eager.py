"""The kernels in plain torch, for every device.

A gradient is contiguous memory of any shape, or None where it is missing. Sums of squares are taken in rows of a few
thousand elements, each in float32, and added in float64: as fast as one long float32 sum, and a thousand times
closer. torch rounds the norm of 16-bit memory to 16 bits; on the CPU the backward pass of a group norm, which adds
products up in float32, gives the sum at a bandwidth that conversion to a float32 copy does not reach.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.kernels.table import moved
from hf_gradclip.types import statistics_dtype

ROW = 4096
HALF_ROW = 1024
SMALL = 1 << 16
CHUNK = 1 << 19


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
        grads: contiguous, real, on any devices.
        divisors: divide each gradient by this first, shape (len(grads),): `max_abs` of them, against overflow.
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
        return _half(grads)
    double = statistics_dtype(device)
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
    row = _part(size, ROW)
    if 4 * row >= ROW:
        return torch.linalg.vector_norm(grad.view(-1, row), dim=1, dtype=dtype)
    flat, whole = grad.view(-1), size // ROW * ROW
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1, dtype=dtype)
    return torch.cat([norms, torch.linalg.vector_norm(flat[whole:], dtype=dtype).view(1)])


def _half(grads: list[Tensor]) -> Tensor:
    """Sums of 16-bit gradients on the CPU; small ones are copied together, which costs less than a call for each."""
    sizes = tuple(map(Tensor.numel, grads))
    cut = _cut(sizes)
    found: list[Tensor] = [torch.zeros(0, device="cpu")]
    for i in cut.alone:
        flat, rest = grads[i].view(-1), sizes[i] % HALF_ROW
        found.append(_products(flat[: sizes[i] - rest], HALF_ROW))
        if rest:
            found.append(_products(flat[-rest:], rest))
    for row, places in cut.together.items():
        found += [_products(copy, row) for copy in together([grads[i] for i in places], [sizes[i] for i in places])]
    rows = torch.cat(found).double()
    sums = torch.empty(len(grads), dtype=torch.float64, device="cpu")
    sums[cut.order] = torch.segment_reduce(rows, "sum", lengths=cut.rows, unsafe=True)
    for i in sums.isnan().nonzero().view(-1).tolist():
        sums[i] = sum(part.double().square().sum() for part in grads[i].view(-1).split(CHUNK))
    return sums


class Cut(NamedTuple):
    """How gradients are cut into rows: those read alone, and by length of row those copied together."""

    alone: list[int]
    together: dict[int, list[int]]
    order: Tensor  # in which their rows follow each other
    rows: Tensor  # of each, in that order


@functools.lru_cache(maxsize=64)
def _cut(sizes: tuple[int, ...]) -> Cut:
    """The cut of 16-bit gradients of these sizes; worked out once, for hundreds of small ones feel it."""
    alone, alike = [], defaultdict(list)
    for i, size in enumerate(sizes):
        if size <= HALF_ROW:
            alike[max(size, 1)].append(i)
        elif size <= SMALL and size % HALF_ROW == 0:
            alike[HALF_ROW].append(i)
        else:
            alone.append(i)
    rows = [-(-sizes[i] // HALF_ROW) for i in alone]
    rows += [sizes[i] // row for row, places in alike.items() for i in places]
    order = alone + [i for places in alike.values() for i in places]
    return Cut(alone, dict(alike), torch.tensor(order, device="cpu"), torch.tensor(rows, device="cpu"))


def together(tensors: list[Tensor], sizes: list[int]) -> Iterator[Tensor]:
    """Small contiguous tensors one after another in a buffer, a buffer full at a time; the next overwrites it."""
    buffer = tensors[0].new_empty(min(CHUNK, sum(sizes)))
    first = filled = 0
    for i, size in enumerate(sizes):
        if filled + size > CHUNK:
            yield torch.cat([tensor.view(-1) for tensor in tensors[first:i]], out=buffer[:filled])
            first, filled = i, 0
        filled += size
    if filled:
        yield torch.cat([tensor.view(-1) for tensor in tensors[first:]], out=buffer[:filled])


def row_sums(memory: Tensor, row: int) -> Tensor:
    """Sums of squares of the rows of 16-bit memory on the CPU; float64, shape (rows,)."""
    part = _part(row, HALF_ROW)
    if row > HALF_ROW > 16 * part:
        return memory.view(-1, row).float().square_().sum(1).double()
    sums = _products(memory, part).double()
    if (lost := sums.isnan()).any():
        sums[lost] = memory.view(-1, part)[lost].double().square().sum(1)
    return sums if part == row else sums.view(-1, row // part).sum(1)


def _products(memory: Tensor, row: int) -> Tensor:
    """Each row of 16-bit memory times itself, added up in float32, shape (rows,); inf gives NaN.

    A group norm y = weight * (x - 0) * 1 has as the gradient of its weights the sums of x * dy, and here dy is x. They
    are added up in few lanes, so that rows must not be longer than HALF_ROW.
    """
    rows = memory.numel() // row
    block, shape, wanted = memory.view(1, rows, row), (1, rows, row, 1), [False, True, False]
    return torch.ops.aten.native_group_norm_backward(block, block, *_constants(rows), *shape, wanted)[1]


@functools.lru_cache(maxsize=64)
def _constants(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, inverse deviation and weights of a group norm; kept, for making them costs as much as a small call."""
    return torch.zeros(1, 1, device="cpu"), torch.ones(1, 1, device="cpu"), torch.ones(rows, device="cpu")


@functools.cache
def _part(size: int, most: int) -> int:
    """The largest divisor of a size that is at most so much."""
    return next(part for part in range(min(size, most), 0, -1) if size % part == 0)


def _divided(grad: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of squares of grad / divisor, chunk by chunk."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=dtype, device=grad.device)
    for chunk in grad.view(-1).split(CHUNK):
        total += _row_norms(chunk.to(wide) / divisor.to(wide), None).to(dtype).square().sum()
    return total


def max_abs(grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Largest absolute element per gradient, shape (len(grads),); missing gives 0, NaN gives inf."""
    return largest_of(grads, dtype, device).nan_to_num(nan=float("inf"), posinf=float("inf"))


def largest_of(grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same, where NaN stays NaN."""
    ends: dict[torch.device, dict[int, tuple[Tensor, Tensor]]] = defaultdict(dict)
    for i, grad in enumerate(grads):
        if grad is not None and grad.numel() > 0:
            ends[grad.device][i] = torch.aminmax(grad)
    largest = torch.zeros(len(grads), dtype=dtype, device=device)
    for found in ends.values():
        lows, highs = zip(*found.values(), strict=True)
        values = moved(torch.maximum(-torch.stack(lows), torch.stack(highs)), device, dtype)
        if len(found) == len(grads):  # the usual case needs no places, and so no copy from the host
            return values
        places = moved(torch.tensor(list(found), device="cpu"), device)
        largest.index_copy_(0, places, values)
    return largest


def divisors(largest: Tensor) -> Tensor:
    """What `sumsq` divides by so that no square overflows: the largest element, 1 where it is 0 or not finite."""
    return torch.where((largest > 0) & largest.isfinite(), largest, 1.0)


def scale_(grads: Sequence[Tensor | None], scale_S: Tensor) -> None:
    """Multiply each gradient by its factor, shape (len(grads),) or 0-d. On the CPU a factor of 1 writes nothing."""
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
    if bound_S.device.type == "cpu":
        for grad, bound in zip(grads, bound_S.tolist(), strict=True):  # the early exit on CPU
            if grad is not None and bound != float("inf"):
                grad.clamp_(-bound, bound)
        return
    for grad, bound in zip(grads, bound_S, strict=True):
        if grad is not None:
            limit = moved(bound, grad.device, torch.promote_types(grad.dtype, torch.float32))
            torch.clamp(grad, -limit, limit, out=grad)

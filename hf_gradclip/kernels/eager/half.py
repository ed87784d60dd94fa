"""Sums of squares of 16-bit memory on a CPU, in plain torch.

torch rounds the norm of 16-bit memory to 16 bits. The backward pass of a group norm, which adds products up in float32,
gives the sum at a bandwidth that conversion to a float32 copy, chunk by chunk, does not reach by a factor of ten.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

HALF_ROW = 1024
SMALL = 1 << 16
CHUNK = 1 << 19


def half_sums(grads: list[Tensor]) -> Tensor:
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
    part = divisor_of(row, HALF_ROW)
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
def divisor_of(size: int, most: int) -> int:
    """The largest divisor of a size that is at most so much."""
    return next(part for part in range(min(size, most), 0, -1) if size % part == 0)

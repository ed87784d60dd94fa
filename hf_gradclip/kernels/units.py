"""The kernels for gradients that are measured and scaled by unit, in plain torch.

A block is one process's memory of a parameter, or of a part of it, with its logical shape. `kept` are the axes that
count units, in order; a unit is everything along the other axes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_gradclip.kernels import eager

AT_ONCE = 64


def sumsq(block: Tensor, kept: tuple[int, ...], divisor_U: Tensor | None = None) -> Tensor:
    """Sum of squares per unit, shape (units,), float64 where the device has it; `divisor_U` divides the units first."""
    if block.numel() == 0:
        return block.new_zeros(_count(block, kept), dtype=_wide(block))
    if divisor_U is not None:
        block = block.to(torch.promote_types(block.dtype, torch.float32)) / _spread(divisor_U, block, kept)
    if kept == tuple(range(len(kept))) and block.is_contiguous():
        rows = block.view(_count(block, kept), -1)
        if block.device.type == "cpu" and block.dtype.itemsize < 4:
            return eager.moments(rows, rows.shape[1])
        dtype = torch.float32 if block.dtype.itemsize < 4 else None
        return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).to(_wide(block)).square()
    if kept[0] == 0:
        inner = tuple(axis - 1 for axis in kept[1:])
        if inner:
            return torch.cat([sumsq(part, inner) for part in block])
    return _strided(block, kept)


def _strided(block: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Units that are not one run of memory each: added up a few rows at a time, so that temporaries stay small."""
    others = tuple(axis for axis in range(block.ndim) if axis not in kept)
    along = others[0]
    total = block.new_zeros(_count(block, kept), dtype=_wide(block))
    at_once = AT_ONCE if block.device.type == "cpu" else block.shape[along]
    for part in block.split(at_once, dim=along):
        squares = part.to(torch.promote_types(part.dtype, torch.float32)).square()
        total += squares.sum(dim=others).reshape(-1)
    return total


def max_abs(block: Tensor, kept: tuple[int, ...]) -> Tensor:
    """Largest absolute element per unit, shape (units,), of the block's dtype; NaN stays NaN, an empty unit gives 0."""
    if block.numel() == 0:
        return block.new_zeros(_count(block, kept))
    others = tuple(axis for axis in range(block.ndim) if axis not in kept)
    if not others:
        return block.abs().reshape(-1)
    return torch.maximum(block.amax(dim=others), -block.amin(dim=others)).reshape(-1)


def scale_(block: Tensor, kept: tuple[int, ...], scale_U: Tensor) -> None:
    """Multiply each unit by its factor, shape (units,). On the CPU nothing is written where all are 1."""
    if scale_U.device.type == "cpu" and not bool((scale_U != 1).any()):  # the early exit on CPU
        return
    factor = _spread(scale_U, block, kept)
    if block.element_size() >= 4:
        block.mul_(factor)
        return
    rows = max(1, eager.CHUNK // max(1, math.prod(block.shape[1:])))
    factors = factor.split(rows) if 0 in kept else [factor] * -(-block.shape[0] // rows)
    for part, some in zip(block.split(rows), factors, strict=True):
        part.copy_(part.float().mul_(some))  # in 16 bits the factor would be rounded with the gradient


def clamp_(block: Tensor, kept: tuple[int, ...], bound_U: Tensor) -> None:
    """Clamp each unit to [-bound, bound], shape (units,). On the CPU nothing is written where all are infinite."""
    if bound_U.device.type == "cpu" and bool(bound_U.isinf().all()):  # the early exit on CPU
        return
    limit = _spread(bound_U, block, kept).to(block.dtype)
    torch.clamp(block, -limit, limit, out=block)


def _count(block: Tensor, kept: tuple[int, ...]) -> int:
    return math.prod(block.shape[axis] for axis in kept)


def _spread(value_U: Tensor, block: Tensor, kept: tuple[int, ...]) -> Tensor:
    """One number per unit in a shape that broadcasts over the block; float32, or the block's dtype if that is wider."""
    shape = [size if axis in kept else 1 for axis, size in enumerate(block.shape)]
    return value_U.to(block.device, torch.promote_types(block.dtype, torch.float32), non_blocking=True).view(shape)


def _wide(block: Tensor) -> torch.dtype:
    return torch.float32 if block.device.type == "mps" else torch.float64

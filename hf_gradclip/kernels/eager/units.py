"""Gradients that are measured and scaled by unit, in plain torch, for every device and dtype."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hf_gradclip.device import moved
from hf_gradclip.kernels.blocks import Axes, insist_on_counts, insist_on_numbers, units_of
from hf_gradclip.kernels.eager.half import CHUNK, SMALL, row_sums, together
from hf_gradclip.kernels.table import insist_on_memory
from hf_gradclip.types import statistics_dtype

AT_ONCE = 64
SHORT = 64


def serves(blocks: Sequence[Tensor | None], kept: Sequence[Axes]) -> bool:
    """Any blocks."""
    return True


def unit_sums(
    blocks: Sequence[Tensor | None],
    kept: Sequence[Axes],
    counts: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """See operations.ByUnit; blocks on any devices."""
    insist_on_counts(blocks, kept, counts)
    _insist_on_memory(blocks, written=False)
    found: dict[int, Tensor] = {}
    small: dict[tuple[torch.dtype, int], dict[int, Tensor]] = defaultdict(dict)
    norms: dict[torch.device, dict[int, Tensor]] = defaultdict(dict)
    for i, (block, axes, count) in enumerate(zip(blocks, kept, counts, strict=True)):
        if block is None:
            found[i] = torch.zeros(count, dtype=dtype, device=device)
            continue
        lines = block.numel() > 0 and _are_lines(block, axes)
        if lines and block.device.type == "cpu" and block.numel() <= SMALL:
            small[block.dtype, block.numel() // count][i] = block
        elif lines and block.dtype.itemsize >= 4 and not _are_short(block, count):
            norms[block.device][i] = torch.linalg.vector_norm(block.view(count, -1), dim=1)
        else:
            found[i] = moved(sumsq(block, axes), device, dtype)

    def place(places: Iterable[int], sums_U: Tensor) -> None:
        values = moved(sums_U, device, dtype).split([counts[i] for i in places])
        found.update(zip(places, values, strict=True))

    for (_, length), group in small.items():  # copied together: less than a call for each
        copies = together(list(group.values()), [block.numel() for block in group.values()])
        place(group, torch.cat([sumsq(copy.view(-1, length), (0,)) for copy in copies]))
    for group in norms.values():
        norm_U = torch.cat(list(group.values()))
        place(group, norm_U.to(_wide(norm_U)).square_())
    empty = torch.zeros(0, dtype=dtype, device=device)
    return torch.cat([empty, *(found[i] for i in range(len(blocks)))])


def unit_apply_(
    blocks: Sequence[Tensor | None],
    kept: Sequence[Axes],
    counts: Sequence[int],
    scale_U: Tensor,
    bound_U: Tensor | None,
) -> None:
    """See operations.ByUnit; blocks on any devices."""
    insist_on_counts(blocks, kept, counts)
    _insist_on_memory(blocks, written=True)
    insist_on_numbers("scale_U", scale_U, ((sum(counts),),), scale_U.device)
    insist_on_numbers("bound_U", bound_U, ((sum(counts),),), scale_U.device)
    if all(block is None or block.dtype.itemsize <= 4 for block in blocks):
        scale_U = scale_U.float()
    _each(blocks, kept, counts, scale_U, scale_U != 1, scale_)
    if bound_U is not None:
        _each(blocks, kept, counts, bound_U, bound_U < float("inf"), clamp_)


def _insist_on_memory(blocks: Sequence[Tensor | None], written: bool) -> None:
    for i, block in enumerate(blocks):
        if block is not None:
            insist_on_memory(f"block {i}", block, written)


def _each(
    blocks: Sequence[Tensor | None],
    kept: Sequence[Axes],
    counts: Sequence[int],
    value_U: Tensor,
    asked_U: Tensor,
    write: Callable[[Tensor, Axes, Tensor], None],
) -> None:
    """Write every block, on the CPU only those with a unit of which something is asked."""
    asked = [1.0] * len(blocks)
    if asked_U.device.type == "cpu":  # the early exit on CPU
        lengths = torch.tensor(counts, dtype=torch.int64, device="cpu")
        asked = torch.segment_reduce(asked_U.float(), "max", lengths=lengths, unsafe=True).tolist()
    for block, axes, some, values in zip(blocks, kept, asked, value_U.split(list(counts)), strict=True):
        if block is not None and block.numel() and some > 0:
            write(block, axes, values)


def sumsq(block: Tensor, kept: Axes, divisor_U: Tensor | None = None) -> Tensor:
    """Sum of squares per unit, shape (units,), float64 where the device has it; `divisor_U` divides the units first."""
    if block.numel() == 0:
        return block.new_zeros(units_of(block.shape, kept), dtype=_wide(block))
    if divisor_U is not None:
        block = block.to(torch.promote_types(block.dtype, torch.float32)) / _spread(divisor_U, block, kept)
    if _are_lines(block, kept):
        rows = block.view(units_of(block.shape, kept), -1)
        if _are_short(block, len(rows)):
            return _short(rows)
        if block.device.type == "cpu" and block.dtype.itemsize < 4:
            return row_sums(rows, rows.shape[1])
        dtype = torch.float32 if block.dtype.itemsize < 4 else None
        return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).to(_wide(block)).square()
    if kept[:1] == (0,):
        inner = tuple(axis - 1 for axis in kept[1:])
        if inner:
            return torch.cat([sumsq(part, inner) for part in block])
    return _strided(block, kept)


def _are_lines(block: Tensor, kept: Axes) -> bool:
    """Whether each unit is one run of memory, one after another."""
    return kept == tuple(range(len(kept))) and block.is_contiguous()


def _are_short(block: Tensor, lines: int) -> bool:
    """Whether lines are so short that torch's norm of each on the CPU would take longer than its memory."""
    return block.device.type == "cpu" and 1 < block.numel() // lines <= SHORT


def _short(rows: Tensor) -> Tensor:
    """Sums of squares of short lines, (lines, length): squared all together, then added by a product with ones."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    at_once = CHUNK // rows.shape[1]
    buffer = torch.empty(min(at_once, len(rows)), rows.shape[1], dtype=dtype, device="cpu")
    ones = buffer.new_ones(rows.shape[1])
    sums = [buffer[: len(part)].copy_(part).square_().mv(ones) for part in rows.split(at_once)]
    return torch.cat(sums).double()


def _strided(block: Tensor, kept: Axes) -> Tensor:
    """Units that are not one run of memory each: added up a few rows at a time, so that temporaries stay small."""
    others = tuple(axis for axis in range(block.ndim) if axis not in kept)
    along = others[0]
    total = block.new_zeros(units_of(block.shape, kept), dtype=_wide(block))
    at_once = AT_ONCE if block.device.type == "cpu" else block.shape[along]
    for part in block.split(at_once, dim=along):
        squares = part.to(torch.promote_types(part.dtype, torch.float32)).square()
        total += squares.sum(dim=others).reshape(-1)
    return total


def max_abs(block: Tensor, kept: Axes) -> Tensor:
    """Largest absolute element per unit, shape (units,), of the block's dtype; NaN stays NaN, an empty unit gives 0."""
    if block.numel() == 0:
        return block.new_zeros(units_of(block.shape, kept))
    others = tuple(axis for axis in range(block.ndim) if axis not in kept)
    if not others:
        return block.abs().reshape(-1)
    return torch.maximum(block.amax(dim=others), -block.amin(dim=others)).reshape(-1)


def scale_(block: Tensor, kept: Axes, scale_U: Tensor) -> None:
    """Multiply each unit by its factor, shape (units,)."""
    factor = _spread(scale_U, block, kept)
    if block.element_size() >= 4 or block.ndim == 0:
        block.mul_(factor)
        return
    rows = min(block.shape[0], max(1, CHUNK // math.prod(block.shape[1:])))
    factors = factor.split(rows) if 0 in kept else [factor] * -(-block.shape[0] // rows)
    buffer = torch.empty(rows, *block.shape[1:], dtype=torch.float32, device=block.device)
    for part, some in zip(block.split(rows), factors, strict=True):  # in 16 bits a factor would be rounded
        part.copy_(buffer[: len(part)].copy_(part).mul_(some))


def clamp_(block: Tensor, kept: Axes, bound_U: Tensor) -> None:
    """Clamp each unit to [-bound, bound], shape (units,)."""
    limit = _spread(bound_U, block, kept).to(block.dtype)
    torch.clamp(block, -limit, limit, out=block)


def _spread(value_U: Tensor, block: Tensor, kept: Axes) -> Tensor:
    """One number per unit in a shape that broadcasts over the block; float32, or the block's dtype if that is wider."""
    shape = [size if axis in kept else 1 for axis, size in enumerate(block.shape)]
    return moved(value_U, block.device, torch.promote_types(block.dtype, torch.float32)).view(shape)


def _wide(block: Tensor) -> torch.dtype:
    return statistics_dtype(block.device)

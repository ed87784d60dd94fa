"""Gradients by unit in Triton: one launch measures the units of every block, one writes those that change.

Shape letters: S blocks, U units, C programs. A block is seen as a matrix of contiguous lines. Where each unit is a
line, a program takes a few lines and adds along them; where units lie side by side in every line, it takes a stretch
of the lines and adds across them. Either way it has its units whole, so one store per unit ends it: no float is added
atomically, and the result is the same, bit for bit, in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_gradclip.device import on
from hf_gradclip.kernels.blocks import Axes, block_table, insist_on_numbers, taken
from hf_gradclip.kernels.triton.whole import TRITON, WORD, clamped, dtypes_of

ROWS = 16  # lines, and
COLS = 128  # elements of each, that a program moves at a time
WARPS = 4


def serves(blocks: Sequence[Tensor | None], kept: Sequence[Axes]) -> bool:
    """Whether the units of all blocks are their lines, or lie side by side in them."""
    return taken(blocks, kept, TRITON)


def unit_sums(
    blocks: Sequence[Tensor | None],
    kept: Sequence[Axes],
    counts: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Sum of squares per unit of all blocks, each added up in float32; see operations.ByUnit."""
    every = all(block is not None and block.numel() for block in blocks)  # a kernel writes what is there
    sums_U = (torch.empty if every else torch.zeros)(sum(counts), dtype=dtype, device=device)
    with on(device):
        table = block_table(blocks, kept, counts, sums_U.device, _programs)
        if table.chunks:
            _measure[(table.chunks,)](
                *table.arguments, table.place_S, sums_U, dtypes_of(table), ROWS, COLS, num_warps=WARPS
            )
    return sums_U


def unit_apply_(
    blocks: Sequence[Tensor | None],
    kept: Sequence[Axes],
    counts: Sequence[int],
    scale_U: Tensor,
    bound_U: Tensor | None,
) -> None:
    """g <- clamp(g * scale, -bound, +bound) by unit; see operations.ByUnit.

    Lines that nothing is asked of are neither read nor written; the device decides that, not the host.
    """
    for name, number_U in (("scale_U", scale_U), ("bound_U", bound_U)):
        insist_on_numbers(name, number_U, ((sum(counts),),), scale_U.device)
    scale_U, bound_U = scale_U.contiguous(), None if bound_U is None else bound_U.contiguous()
    with on(scale_U.device):
        table = block_table(blocks, kept, counts, scale_U.device, _programs)
        if table.chunks:
            _write[(table.chunks,)](
                *table.arguments, table.place_S, scale_U, bound_U, dtypes_of(table), ROWS, COLS, num_warps=2 * WARPS
            )


def _programs(count: int, length: int, columns: int) -> int:
    return count * triton.cdiv(columns, COLS) if columns else triton.cdiv(count, ROWS)


@triton.jit
def _measure(
    address_S, numel_S, kind_S, first_S, segment_C, place_S, sums_U,
    DTYPES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The units of one program."""
    c = tl.program_id(0)
    s = tl.load(segment_C + c)
    kind = tl.load(kind_S + s)
    for k in tl.static_range(len(DTYPES)):
        if kind == k:
            address, units, matrices, length, columns, words = _block(address_S, place_S, s, sums_U, DTYPES[k])
            j = c - tl.load(first_S + s)
            if (columns == 0) & words:
                _add_along(address, units, j, matrices, length, DTYPES[k], True, ROWS, COLS)
            elif columns == 0:
                _add_along(address, units, j, matrices, length, DTYPES[k], False, ROWS, COLS)
            elif words:
                _add_across(address, units, j, length, columns, DTYPES[k], True, ROWS, COLS)
            else:
                _add_across(address, units, j, length, columns, DTYPES[k], False, ROWS, COLS)


@triton.jit
def _block(address_S, place_S, s, vector_U, DTYPE: tl.constexpr):
    """Of a block: its memory, its part of a vector per unit, its shape, and whether every line begins on 16 bytes."""
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    address = tl.load(address_S + s)
    first, matrices = tl.load(place_S + 4 * s), tl.load(place_S + 4 * s + 1)
    length, columns = tl.load(place_S + 4 * s + 2), tl.load(place_S + 4 * s + 3)
    line = tl.where(columns == 0, length, columns)
    words = ((address | (line * SIZE)) & (WORD - 1)) == 0
    return address, vector_U + first, matrices, length, columns, words


@triton.jit
def _lines(address, line, DTYPE: tl.constexpr, WORDS: tl.constexpr):
    """The memory and the length of a line, as numbers of which the compiler knows whether they are whole words."""
    block = address.to(tl.pointer_type(DTYPE))
    if WORDS:
        LANES: tl.constexpr = WORD * 8 // DTYPE.primitive_bitwidth
        block = tl.multiple_of(block, 16)
        line = tl.multiple_of(line // LANES * LANES, LANES)
    return block, line


@triton.jit
def _add_along(
    address, units, j, lines, length, DTYPE: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    block, length = _lines(address, length, DTYPE, WORDS)
    r = j.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for first in tl.range(0, length, COLS):
        c = first + tl.arange(0, COLS)
        mask = (r < lines)[:, None] & (c < length)[None, :]
        x = tl.load(block + (r * length)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += x * x
    tl.store(units + r, tl.sum(sums, 1).to(units.dtype.element_ty), mask=r < lines)


@triton.jit
def _add_across(
    address, units, j, length, columns, DTYPE: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    block, columns = _lines(address, columns, DTYPE, WORDS)
    block, units, c = _stretch(block, units, j, length, columns, COLS)
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for first in tl.range(0, length, ROWS):
        r = first + tl.arange(0, ROWS)
        mask = (r < length)[:, None] & (c < columns)[None, :]
        x = tl.load(block + (r * columns)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += x * x
    tl.store(units + c, tl.sum(sums, 0).to(units.dtype.element_ty), mask=c < columns)


@triton.jit
def _stretch(block, units, j, length, columns, COLS: tl.constexpr):
    """The matrix of program j and its units, and which of them are the program's."""
    stretches = tl.cdiv(columns, COLS)
    matrix = j // stretches
    c = (j - matrix * stretches) * COLS + tl.arange(0, COLS)
    return block + matrix * length * columns, units + matrix * columns, c


@triton.jit
def _write(
    address_S, numel_S, kind_S, first_S, segment_C, place_S, scale_U, bound_U,
    DTYPES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Scale and bound the units of one program, unless nothing is asked of any.

    A thread has 8 elements of whole words and 4 of others, each with an address of its own: with more, the registers of
    all four ways leave a fifth of the warps.
    """
    i = tl.program_id(0)
    s = tl.load(segment_C + i)
    kind = tl.load(kind_S + s)
    for k in tl.static_range(len(DTYPES)):
        if kind == k:
            address, scales, matrices, length, columns, words = _block(address_S, place_S, s, scale_U, DTYPES[k])
            bounds = None
            if bound_U is not None:
                bounds = bound_U + tl.load(place_S + 4 * s)
            j = i - tl.load(first_S + s)
            if (columns == 0) & words:
                _write_along(address, scales, bounds, j, matrices, length, DTYPES[k], True, ROWS, COLS)
            elif columns == 0:
                _write_along(address, scales, bounds, j, matrices, length, DTYPES[k], False, ROWS, COLS // 2)
            elif words:
                _write_across(address, scales, bounds, j, length, columns, DTYPES[k], True, ROWS, COLS)
            else:
                _write_across(address, scales, bounds, j, length, columns, DTYPES[k], False, ROWS // 2, COLS)


@triton.jit
def _write_along(
    address, scales, bounds, j, lines, length,
    DTYPE: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    block, length = _lines(address, length, DTYPE, WORDS)
    r = j.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    scale, bound, changed = _asked(scales, bounds, r, lines)
    if tl.max(changed.to(tl.int32)) > 0:
        for first in tl.range(0, length, COLS):
            c = first + tl.arange(0, COLS)
            mask = changed[:, None] & (c < length)[None, :]
            place = block + (r * length)[:, None] + c[None, :]
            x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            tl.store(place, clamped(x * scale[:, None], bound[:, None]).to(DTYPE), mask=mask)


@triton.jit
def _write_across(
    address, scales, bounds, j, length, columns,
    DTYPE: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    block, columns = _lines(address, columns, DTYPE, WORDS)
    if bounds is not None:
        _, bounds, _ = _stretch(block, bounds, j, length, columns, COLS)
    block, scales, c = _stretch(block, scales, j, length, columns, COLS)
    scale, bound, changed = _asked(scales, bounds, c, columns)
    if tl.max(changed.to(tl.int32)) > 0:
        for first in tl.range(0, length, ROWS):
            r = first + tl.arange(0, ROWS)
            mask = (r < length)[:, None] & (c < columns)[None, :]
            place = block + (r * columns)[:, None] + c[None, :]
            x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            tl.store(place, clamped(x * scale[None, :], bound[None, :]).to(DTYPE), mask=mask)


@triton.jit
def _asked(scales, bounds, unit, units):
    """Scale and bound of some units, and which of them change."""
    scale = tl.load(scales + unit, mask=unit < units, other=1.0).to(tl.float32)
    bound = tl.full(scale.shape, float("inf"), tl.float32)
    if bounds is not None:
        bound = tl.load(bounds + unit, mask=unit < units, other=float("inf")).to(tl.float32)
    return scale, bound, (scale != 1.0) | (bound < float("inf"))

"""Whole gradients in Triton: one launch reads every gradient, one writes those that change.

Shape letters: S gradients, C chunks. Every gradient is cut into chunks, one program takes one chunk and finds its
memory in a table of addresses, so the number of launches does not depend on the model. A chunk begins wherever its
gradient does; its body begins at the next multiple of 16 bytes and moves in 16-byte words, and the few elements
before and after the body are its edges.

No float is added atomically: a program stores the sum of its chunk, and one program per gradient adds these in a fixed
order. The result is the same, bit for bit, in every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_gradclip.device import on
from hf_gradclip.kernels.blocks import insist_on_numbers, of_host
from hf_gradclip.kernels.table import Table, table_of

CHUNK = 1 << 16  # elements that a program takes
BLOCK = 1 << 13  # bytes that it moves at a time
WARPS = 8

TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

WORD = tl.constexpr(16)  # bytes, of the widest load and store
INF_BITS = tl.constexpr(0x7F800000)
_LARGE = tl.constexpr(2.0**50)  # above, the squares of a chunk may overflow float32
_SMALL = tl.constexpr(2.0**-50)  # below, they lose digits
_SHRINK = tl.constexpr(2.0**-90)
_GROW = tl.constexpr(2.0**90)


def statistics(
    grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device, max_abs: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of squares and largest absolute element per gradient, from one read; see operations.Whole.

    Squares neither overflow nor vanish in float32: a chunk of very large or very small elements is read again, scaled.
    """
    sumsq_S = torch.empty(len(grads), dtype=dtype, device=device)
    max_S = torch.empty_like(sumsq_S)
    with on(device):
        table = table_of([grads], sumsq_S.device, CHUNK)
        sumsq_C = torch.empty(table.chunks, dtype=dtype, device=device)
        max_C = torch.empty(table.chunks, dtype=torch.float32, device=device)
        if table.chunks:
            _measure[(table.chunks,)](*table.arguments, sumsq_C, max_C, dtypes_of(table), CHUNK, BLOCK, num_warps=WARPS)
        if grads:
            finish[(len(grads),)](table.first_S, sumsq_C, max_C, sumsq_S, max_S, 1024, num_warps=4)
    return sumsq_S, max_S if max_abs else None


def apply_(grads: Sequence[Tensor | None], scale_S: Tensor, bound_S: Tensor | None) -> None:
    """g <- clamp(g * scale, -bound, +bound); see operations.Whole.

    A gradient with scale 1 and bound inf is neither read nor written; the device decides that, not the host.
    """
    elsewhere = (grad.device for grad in grads if grad is not None and not grad.is_cpu and not grad.is_meta)
    device = next(elsewhere, scale_S.device)  # the scale may be one number of the host's
    for name, number_S in (("scale_S", scale_S), ("bound_S", bound_S)):
        insist_on_numbers(name, number_S, ((), (len(grads),)), device)
    with on(device):
        table = table_of([grads], device, CHUNK)
        if table.chunks:
            plan = (*argument(scale_S), *argument(bound_S))
            _scale_and_clamp[(table.chunks,)](*table.arguments, *plan, dtypes_of(table), CHUNK, BLOCK, num_warps=WARPS)


def argument(number_S: Tensor | None) -> tuple[Tensor | float | None, int | None]:
    """A number of a plan as a kernel is given it, for `number_at`, with the distance between two segments.

    That is 0 where one number serves all, and None where the host has that one: it is an argument, and not uploaded.
    """
    if number_S is None or of_host(number_S):
        return None if number_S is None else float(number_S), None
    return number_S, number_S.stride(0) if number_S.ndim else 0


def dtypes_of(table: Table) -> tuple[tl.dtype, ...]:
    """The dtypes that `kind_S` counts, where every segment has one tensor."""
    return tuple(TRITON[dtype] for (dtype,) in table.kinds if dtype is not None)


@triton.jit
def _measure(
    address_S, numel_S, kind_S, first_S, segment_C, sumsq_C, max_C,
    DTYPES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of one chunk."""
    c = tl.program_id(0)
    s = tl.load(segment_C + c)
    start = (c - tl.load(first_S + s)).to(tl.int64) * CHUNK
    n = tl.minimum(tl.load(numel_S + s) - start, CHUNK).to(tl.int32)
    kind = tl.load(kind_S + s)
    for k in tl.static_range(len(DTYPES)):
        if kind == k:
            _measure_chunk(tl.load(address_S + s), start, n, sumsq_C + c, max_C + c, DTYPES[k], BLOCK)


@triton.jit
def _measure_chunk(address, start, n, sumsq, largest, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    total, bits = _sum_and_max(address, start, n, 1.0, DTYPE, BLOCK)
    top = tl.minimum(bits, INF_BITS).to(tl.float32, bitcast=True)  # the bits of NaN are above those of inf
    large = top > _LARGE
    small = (top < _SMALL) & (top > 0)
    back = tl.where(large, _GROW, tl.where(small, _SHRINK, 1.0)).to(sumsq.dtype.element_ty)
    if large | small:
        total, bits = _sum_and_max(address, start, n, tl.where(large, _SHRINK, _GROW), DTYPE, BLOCK)
    tl.store(sumsq, total.to(sumsq.dtype.element_ty) * back * back)
    tl.store(largest, top)


@triton.jit
def _sum_and_max(address, start, n, factor, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of (factor * element)^2, and the largest bit pattern of an |element|, of which NaN has the highest."""
    edge, edge_mask, body, n_body = _split(address, start, n, DTYPE)
    y = tl.load(edge, mask=edge_mask, other=0.0).to(tl.float32)
    scaled = y * factor
    STEP: tl.constexpr = BLOCK * 8 // DTYPE.primitive_bitwidth
    sums = tl.zeros((STEP,), tl.float32)
    bits = tl.zeros((STEP,), tl.int32)
    for i in tl.range(0, n_body, STEP):
        o = i + tl.arange(0, STEP)
        x = tl.load(body + o, mask=o < n_body, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, bits_of(x))
        x *= factor
        sums += x * x
    return tl.sum(sums) + tl.sum(scaled * scaled), tl.maximum(tl.max(bits), tl.max(bits_of(y)))


@triton.jit
def _split(address, start, n, DTYPE: tl.constexpr):
    """The n elements from `start` on: (pointers to the edges, their mask, pointer to the body, elements in the body).

    The body begins at a multiple of 16 bytes because its address is rounded up to one, and has whole words only, so
    the compiler may use 16-byte loads and stores. Up to a word of elements lies before it and up to a word behind.
    """
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    LANES: tl.constexpr = WORD // SIZE
    first = address + start * SIZE
    aligned = (first + WORD - 1) & -WORD
    head = tl.minimum(((aligned - first) // SIZE).to(tl.int32), n)
    body = tl.multiple_of(aligned.to(tl.pointer_type(DTYPE)), 16)
    n_body = tl.multiple_of((n - head) // LANES * LANES, LANES)
    lane = tl.arange(0, 2 * LANES)
    before = lane < LANES
    edge = tl.where(before, lane, head + n_body + lane - LANES)
    mask = tl.where(before, lane < head, edge < n)
    return first.to(tl.pointer_type(DTYPE)) + edge, mask, body, n_body


@triton.jit
def bits_of(x):
    """The bit pattern of |x|, which grows with it; that of NaN is above that of inf."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def finish(first_S, sumsq_C, max_C, sumsq_S, max_S, BLOCK: tl.constexpr):
    """Add the chunks of one gradient, always in the same order."""
    s = tl.program_id(0)
    end = tl.load(first_S + s + 1)
    sums = tl.zeros((BLOCK,), sumsq_C.dtype.element_ty)
    tops = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(first_S + s), end, BLOCK):
        c = i + tl.arange(0, BLOCK)
        sums += tl.load(sumsq_C + c, mask=c < end, other=0.0)
        tops = tl.maximum(tops, tl.load(max_C + c, mask=c < end, other=0.0))
    tl.store(sumsq_S + s, tl.sum(sums))
    tl.store(max_S + s, tl.max(tops))


@triton.jit
def number_at(number_S, s, stride):
    """A number of a plan, in float32."""
    number = number_S
    if stride is not None:
        number = tl.load(number_S + s * stride).to(tl.float32)
    return number


@triton.jit(do_not_specialize=["scale_stride", "bound_stride"])
def _scale_and_clamp(
    address_S, numel_S, kind_S, first_S, segment_C, scale_S, scale_stride, bound_S, bound_stride,
    DTYPES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one chunk, unless nothing is asked of its gradient."""
    c = tl.program_id(0)
    s = tl.load(segment_C + c)
    scale = number_at(scale_S, s, scale_stride)
    bound = float("inf")
    if bound_S is not None:
        bound = number_at(bound_S, s, bound_stride)
    if (scale != 1.0) | (bound < float("inf")):
        start = (c - tl.load(first_S + s)).to(tl.int64) * CHUNK
        n = tl.minimum(tl.load(numel_S + s) - start, CHUNK).to(tl.int32)
        kind = tl.load(kind_S + s)
        for k in tl.static_range(len(DTYPES)):
            if kind == k:
                _write_chunk(tl.load(address_S + s), start, n, scale, bound, DTYPES[k], BLOCK)


@triton.jit
def _write_chunk(address, start, n, scale, bound, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    edge, edge_mask, body, n_body = _split(address, start, n, DTYPE)
    y = tl.load(edge, mask=edge_mask)
    tl.store(edge, clamped(y.to(tl.float32) * scale, bound).to(DTYPE), mask=edge_mask)
    STEP: tl.constexpr = BLOCK * 8 // DTYPE.primitive_bitwidth
    for i in tl.range(0, n_body, STEP):
        o = i + tl.arange(0, STEP)
        x = tl.load(body + o, mask=o < n_body)
        tl.store(body + o, clamped(x.to(tl.float32) * scale, bound).to(DTYPE), mask=o < n_body)


@triton.jit
def clamped(x, bound):
    """Comparisons, because they are false for NaN and so keep it."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))

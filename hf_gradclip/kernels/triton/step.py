"""The optimizer's step in Triton: one launch reads a group's gradients, weights and moments and writes the
last two. The gradient is clipped as it is read and never written.

Shape letters as in table.py. The body of a chunk moves in 16-byte words where its weights, gradient and moments can be
cut so that all of them begin on 16 bytes; otherwise it moves element by element. Arithmetic is in float32, and what is
stored is rounded once. `measure_update` computes the same update and stores nothing but its statistics.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_gradclip.device import on, upload
from hf_gradclip.kernels.rule import QUOTIENTS, Memory, Places, Rule, are_alike, insist_on_places, insist_on_plans
from hf_gradclip.kernels.table import Kind, Table, table_of
from hf_gradclip.kernels.triton.quotient import SMALL, quotient
from hf_gradclip.kernels.triton.whole import INF_BITS, TRITON, WORD, argument, bits_of, clamped, finish, number_at
from hf_gradclip.types import ClipPlan

CHUNK = 1 << 14  # elements that a program takes
STEP = 1 << 10  # elements that it moves at a time, half as many where all are of 32 bits: a word in a thread
WARPS = 4
REGISTERS = 72  # of a thread, at most: 28 of 64 warps are then there at once

_LANES = tl.constexpr(8)  # elements of the narrowest dtype in a word
_ABSENT = tl.constexpr(tl.int1)  # in the place of the dtype of a moment that a rule does not keep


def serves(memory: Memory, places: Places) -> bool:
    """Whether all tensors of a parameter are there with one shape and one order of elements, on one device."""
    return places.units is None and are_alike(memory, TRITON)


def prepare(rule: Rule, memory: Memory, places: Places) -> Table:
    """The table of a step; see operations.Step."""
    insist_on_places(rule, memory, places)
    device = memory.weights[0].device
    with on(device):
        return table_of(memory, device, CHUNK, places.pairs, "tensor")


def step_(
    rule: Rule,
    memory: Memory,
    places: Places,
    plan: ClipPlan | None,
    after: ClipPlan | None,
    table: Table | None = None,
    skip: Tensor | None = None,
) -> None:
    """One step of a group; see operations.Step."""
    table = prepare(rule, memory, places) if table is None else table
    insist_on_plans(memory, places, plan, after)
    with on(memory.weights[0].device):
        if table.chunks:
            _launch(table, rule, len(places.gradient), plan, after, None, None, skip)


def measure_update(
    rule: Rule, memory: Memory, places: Places, plan: ClipPlan | None, table: Table | None = None
) -> tuple[Tensor, Tensor]:
    """The statistics of the update that `step_` would go along; see operations.Step."""
    table = prepare(rule, memory, places) if table is None else table
    insist_on_plans(memory, places, plan)
    device, count = memory.weights[0].device, len(places.gradient)
    sumsq_S = torch.empty(count, dtype=torch.float64, device=device)
    max_S = torch.empty_like(sumsq_S)
    with on(device):
        sumsq_C = torch.empty(table.chunks, dtype=torch.float64, device=device)
        max_C = torch.empty(table.chunks, dtype=torch.float32, device=device)
        if table.chunks:
            _launch(table, rule, count, plan, None, sumsq_C, max_C)
        finish[(count,)](table.first_S, sumsq_C, max_C, sumsq_S, max_S, 1024, num_warps=4)
    return sumsq_S, max_S


def _launch(
    table: Table,
    rule: Rule,
    count: int,
    plan: ClipPlan | None,
    after: ClipPlan | None,
    sumsq_C: Tensor | None,
    max_C: Tensor | None,
    skip: Tensor | None = None,
) -> None:
    term_S, pairs = None, _pairs(rule)
    if len(pairs) > 1:
        term_S = upload([number for pair in pairs for number in pair], torch.float32, table.address_RS.device)
    inverse_S = None if rule.inverse_P2 is None else rule.inverse_P2.contiguous()
    weigh = (rule.past, rule.fresh, rule.past2, rule.fresh2)
    numbers = (rule.lr, 1 - rule.lr * rule.decay, rule.decay, -1.0 if rule.maximize else 1.0, *weigh, *pairs[0])
    decay = "none" if rule.decay == 0 else "decoupled" if rule.decoupled else "coupled"
    _step[(table.chunks,)](
        *table.arguments, table.place_S, term_S, inverse_S, count, *_vectors(plan), *_vectors(after), sumsq_C, max_C,
        skip, *map(float, numbers), rule.name, decay, rule.eps < SMALL, _kinds(table.kinds, STEP), CHUNK,
        num_warps=WARPS, **_limits(rule, table),
    )  # fmt: skip


def _pairs(rule: Rule) -> list[tuple[float, float]]:
    """The two numbers that a parameter has of its own, `one` and `two` in `_elements`: a pair where all have the same.

    Of a quotient they are what multiplies the root and eps, with the term in both: one division less. Where only the
    device knows the terms, the kernel makes them of 1 and eps.
    """
    pairs = list(rule.terms or [(1.0, 1.0)])
    if pairs.count(pairs[0]) == len(pairs):
        pairs = pairs[:1]
    if rule.name == "adam":
        return [(1 / (term * root), rule.eps / term) for term, root in pairs]
    return [(1 / root, rule.eps) for _, root in pairs] if rule.name == "rmsprop" else pairs


@functools.cache
def _kinds(kinds: tuple[Kind, ...], step: int) -> tuple[Any, ...]:
    """Of each kind the five dtypes and how many elements to move at a time."""
    found: list[Any] = []
    for kind in kinds:
        wide = all(dtype is None or dtype.itemsize == 4 for dtype in kind)
        found += [*(tl.int1 if dtype is None else TRITON[dtype] for dtype in kind), step // 2 if wide else step]
    return tuple(found)


def _limits(rule: Rule, table: Table) -> dict[str, int]:
    """Where NVIDIA's compiler takes more registers than it needs: for a quotient of eight elements in a thread."""
    if table.address_RS.device.type == "xpu" or torch.version.hip or rule.name not in QUOTIENTS:
        return {}
    return {"maxnreg": REGISTERS} if any(dtype and dtype.itemsize < 4 for kind in table.kinds for dtype in kind) else {}


def _vectors(plan: ClipPlan | None) -> tuple[Any, ...]:
    """Scale and bound with the distance between two segments."""
    return (None, None, None, None) if plan is None else (*argument(plan.scale_S), *argument(plan.bound_S))


@triton.jit(do_not_specialize=["count", "scale_stride", "bound_stride", "after_stride", "limit_stride"])
def _step(
    address_RS, numel_S, kind_S, first_S, segment_C, place_S, term_S, inverse_S, count,
    scale_S, scale_stride, bound_S, bound_stride, after_S, after_stride, limit_S, limit_stride, sumsq_C, max_C, skip,
    lr, keep, decay, sign, past, fresh, past2, fresh2, one, two,
    RULE: tl.constexpr, DECAY: tl.constexpr, ANY: tl.constexpr, KINDS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk; with `sumsq_C` its update is measured and nothing else is written; with `skip` true nothing is."""
    i = tl.program_id(0)
    s = tl.load(segment_C + i)
    start = (i - tl.load(first_S + s)).to(tl.int64) * CHUNK
    n = tl.minimum(tl.load(numel_S + s) - start, CHUNK).to(tl.int32)
    if skip is not None:
        n = tl.where(tl.load(skip), 0, n)
    scale, bound = _numbers(scale_S, scale_stride, bound_S, bound_stride, tl.load(place_S + 2 * s))
    after, limit = _numbers(after_S, after_stride, limit_S, limit_stride, tl.load(place_S + 2 * s + 1))
    if term_S is not None:
        one, two = tl.load(term_S + 2 * s), tl.load(term_S + 2 * s + 1)
    if inverse_S is not None:
        of_term = tl.load(inverse_S + 2 * s)
        one, two = (of_term * tl.load(inverse_S + 2 * s + 1)).to(tl.float32), (of_term * two).to(tl.float32)
    numbers = scale * sign, bound, after, limit, one, two, lr, keep, decay, past, fresh, past2, fresh2
    kind = tl.load(kind_S + s)
    for k in tl.static_range(len(KINDS) // 6):
        if kind == k:
            _chunk(
                address_RS + s, count, start, n, numbers, sumsq_C, max_C, i, RULE, DECAY, ANY,
                KINDS[6 * k], KINDS[6 * k + 1], KINDS[6 * k + 2], KINDS[6 * k + 3], KINDS[6 * k + 4], KINDS[6 * k + 5],
            )  # fmt: skip


@triton.jit
def _numbers(scale_S, scale_stride, bound_S, bound_stride, place):
    """A plan's scale and bound of one segment."""
    scale, bound = 1.0, float("inf")
    if scale_S is not None:
        scale = number_at(scale_S, place, scale_stride)
    if bound_S is not None:
        bound = number_at(bound_S, place, bound_stride)
    return scale, bound


@triton.jit
def _chunk(
    address, count, start, n, numbers, sumsq_C, max_C, i, RULE: tl.constexpr, DECAY: tl.constexpr, ANY: tl.constexpr,
    w_dtype: tl.constexpr, g_dtype: tl.constexpr, a_dtype: tl.constexpr, b_dtype: tl.constexpr, c_dtype: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """The n elements from `start` on: those that can move in words, then those before and after them."""
    MEASURE: tl.constexpr = sumsq_C is not None
    w, w_head, w_mask = _first(address, 0, count, start, w_dtype)
    g, g_head, g_mask = _first(address, 1, count, start, g_dtype)
    a, a_head, a_mask = _first(address, 2, count, start, a_dtype)
    b, b_head, b_mask = _first(address, 3, count, start, b_dtype)
    c, c_head, c_mask = _first(address, 4, count, start, c_dtype)
    head = tl.maximum(w_head, tl.maximum(tl.maximum(g_head, a_head), tl.maximum(b_head, c_head)))
    apart = ((head - w_head) & w_mask) | ((head - g_head) & g_mask) | ((head - a_head) & a_mask)
    apart |= ((head - b_head) & b_mask) | ((head - c_head) & c_mask)
    head = tl.where(apart == 0, tl.minimum(head, n), 0)
    n_body = tl.multiple_of(tl.where(apart == 0, (n - head) // _LANES * _LANES, 0), 8)

    if MEASURE:
        total = tl.zeros((STEP,), tl.float64)
        bits = tl.zeros((STEP,), tl.int32)
    ww, gg = tl.multiple_of(w + head, 16), tl.multiple_of(g + head, 16)
    aa, bb, cc = tl.multiple_of(a + head, 16), tl.multiple_of(b + head, 16), tl.multiple_of(c + head, 16)
    for first in tl.range(0, n_body, STEP):
        o = first + tl.arange(0, STEP)
        u = _elements(
            ww, gg, aa, bb, cc, o, o < n_body, numbers, RULE, DECAY, MEASURE, ANY, a_dtype, b_dtype, c_dtype
        )  # fmt: skip
        if MEASURE:
            total += u.to(tl.float64) * u.to(tl.float64)
            bits = tl.maximum(bits, bits_of(u))
    for first in tl.range(0, n - n_body, STEP):
        j = first + tl.arange(0, STEP)
        o = tl.where(j < head, j, j + n_body)
        u = _elements(w, g, a, b, c, o, j < n - n_body, numbers, RULE, DECAY, MEASURE, ANY, a_dtype, b_dtype, c_dtype)
        if MEASURE:
            total += u.to(tl.float64) * u.to(tl.float64)
            bits = tl.maximum(bits, bits_of(u))
    if MEASURE:
        tl.store(sumsq_C + i, tl.sum(total))
        tl.store(max_C + i, tl.minimum(tl.max(bits), INF_BITS).to(tl.float32, bitcast=True))


@triton.jit
def _first(address, column: tl.constexpr, count, start, dtype: tl.constexpr):
    """Of a tensor: pointer to the first element, elements from there to the next 16 bytes, elements in 16 bytes less 1.

    All are 0 for one that is not kept.
    """
    pointer, head, mask = 0, 0, 0
    if dtype != _ABSENT:
        size: tl.constexpr = dtype.primitive_bitwidth // 8
        here = tl.load(address + column * count) + start * size
        pointer, mask = here.to(tl.pointer_type(dtype)), WORD // size - 1
        head = ((-here & (WORD - 1)) // size).to(tl.int32)
    return pointer, head, mask


@triton.jit
def _elements(
    w_ptr, g_ptr, a_ptr, b_ptr, c_ptr, o, mask, numbers, RULE: tl.constexpr, DECAY: tl.constexpr,
    MEASURE: tl.constexpr, ANY: tl.constexpr, a_dtype: tl.constexpr, b_dtype: tl.constexpr, c_dtype: tl.constexpr,
):  # fmt: skip
    """Some elements: read, step, write. The update before its own clip, 0 where masked."""
    scale, bound, after, limit, one, two, lr, keep, decay, past, fresh, past2, fresh2 = numbers
    g = clamped(tl.load(g_ptr + o, mask=mask, other=0.0).to(tl.float32) * scale, bound)
    if not MEASURE or DECAY == "coupled":
        w = tl.load(w_ptr + o, mask=mask, other=0.0).to(tl.float32)
    if DECAY == "coupled":
        g = tl.fma(decay, w, g)
    if a_dtype != _ABSENT:
        a = tl.load(a_ptr + o, mask=mask, other=0.0).to(tl.float32)
    if b_dtype != _ABSENT:
        b = tl.load(b_ptr + o, mask=mask, other=0.0).to(tl.float32)
    if c_dtype != _ABSENT:
        c = tl.load(c_ptr + o, mask=mask, other=0.0).to(tl.float32)

    if RULE == "adam":
        a = tl.fma(fresh, g, past * a)
        b = tl.fma(fresh2 * g, g, past2 * b)
        top = b
        if c_dtype != _ABSENT:
            c = tl.maximum(c, b, propagate_nan=tl.PropagateNan.ALL)
            top = c
        u = quotient(a, top, one, two, ANY)
    elif RULE == "rmsprop":
        a = tl.fma(fresh2 * g, g, past2 * a)
        variance = a
        if b_dtype != _ABSENT:
            b = tl.fma(fresh2, g - b, b)  # settles at g, so that the variance does not fall below 0
            variance = tl.fma(-b, b, a)
        u = quotient(g, variance, one, two, ANY)
        if c_dtype != _ABSENT:
            c = tl.fma(past, c, u)
            u = c
    else:
        u = g
        if a_dtype != _ABSENT:
            a = tl.fma(one, g, past * a)
            u = a
            if RULE == "nesterov":
                u = tl.fma(past, a, g)

    if not MEASURE:
        if a_dtype != _ABSENT:
            tl.store(a_ptr + o, a.to(a_dtype), mask=mask)
        if b_dtype != _ABSENT:
            tl.store(b_ptr + o, b.to(b_dtype), mask=mask)
        if c_dtype != _ABSENT:
            tl.store(c_ptr + o, c.to(c_dtype), mask=mask)
        move = tl.where(lr == 0.0, 0.0, lr * clamped(u * after, limit))  # also where the update is not finite
        w = tl.fma(w, keep, -move) if DECAY == "decoupled" else w - move
        tl.store(w_ptr + o, w.to(w_ptr.dtype.element_ty), mask=mask)
    return tl.where(mask, u, 0.0)

"""The optimizer's step in Triton: one launch reads a group's gradients, weights and moments and writes the
last two. The gradient is clipped as it is read and never written.

Shape letters as in table.py. The body of a chunk moves in 16-byte words where its weights, gradient and moments can be
cut so that all of them begin on 16 bytes; otherwise it moves element by element. Arithmetic is in float32, and what is
stored is rounded once. `measure_update` computes the same update and stores nothing but its statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_gradclip.device import on, upload
from hf_gradclip.kernels.rule import Memory, Places, Rule, are_alike, insist_on_places, insist_on_plans
from hf_gradclip.kernels.table import Table, table_of
from hf_gradclip.kernels.triton.whole import INF_BITS, TRITON, WORD, bits_of, clamped, finish
from hf_gradclip.types import ClipPlan

CHUNK = 1 << 14  # elements that a program takes
STEP = 1 << 10  # elements that it moves at a time
WARPS = 4  # eight elements in a thread, a word of the narrowest dtype

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
) -> None:
    """One step of a group; see operations.Step."""
    table = prepare(rule, memory, places) if table is None else table
    insist_on_plans(memory, places, plan, after)
    with on(memory.weights[0].device):
        if table.chunks:
            _launch(table, rule, len(places.gradient), plan, after, None, None)


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
) -> None:
    terms = None
    if rule.terms is not None:
        terms = upload([number for pair in rule.terms for number in pair], torch.float32, table.address_RS.device)
    sign = -1.0 if rule.maximize else 1.0
    weigh = (rule.past, rule.fresh, rule.past2, rule.fresh2)
    numbers = (rule.lr, 1 - rule.lr * rule.decay, rule.decay, sign, *weigh, rule.eps)
    decay = "none" if rule.decay == 0 else "decoupled" if rule.decoupled else "coupled"
    kinds = tuple(tl.int1 if dtype is None else TRITON[dtype] for kind in table.kinds for dtype in kind)
    _step[(table.chunks,)](
        *table.arguments, table.place_S, terms, count, *_vectors(plan), *_vectors(after), sumsq_C, max_C,
        *map(float, numbers), rule.name, decay, kinds, CHUNK, STEP, num_warps=WARPS,
    )  # fmt: skip


def _vectors(plan: ClipPlan | None) -> tuple[Any, ...]:
    """Scale and bound with the distance between two segments, which is 0 where one number serves all."""
    if plan is None:
        return None, 0, None, 0
    scale, bound = plan.scale_S, plan.bound_S
    stride = scale.stride(0) if scale.ndim else 0
    return scale, stride, bound, bound.stride(0) if bound is not None and bound.ndim else 0


@triton.jit(do_not_specialize=["count", "scale_stride", "bound_stride", "after_stride", "limit_stride"])
def _step(
    address_RS, numel_S, kind_S, first_S, segment_C, place_S, term_S, count,
    scale_S, scale_stride, bound_S, bound_stride, after_S, after_stride, limit_S, limit_stride, sumsq_C, max_C,
    lr, keep, decay, sign, past, fresh, past2, fresh2, eps,
    RULE: tl.constexpr, DECAY: tl.constexpr, KINDS: tl.constexpr,
    CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One chunk; with `sumsq_C` its update is measured and nothing else is written."""
    i = tl.program_id(0)
    s = tl.load(segment_C + i)
    start = (i - tl.load(first_S + s)).to(tl.int64) * CHUNK
    n = tl.minimum(tl.load(numel_S + s) - start, CHUNK).to(tl.int32)
    scale, bound = _numbers(scale_S, scale_stride, bound_S, bound_stride, tl.load(place_S + 2 * s))
    after, limit = _numbers(after_S, after_stride, limit_S, limit_stride, tl.load(place_S + 2 * s + 1))
    term, root = 1.0, 1.0
    if term_S is not None:
        term, root = tl.load(term_S + 2 * s), tl.load(term_S + 2 * s + 1)
    numbers = (
        scale, bound, after, limit, term, root, lr, keep, decay, sign, past, fresh, past2, fresh2, eps
    )  # fmt: skip
    kind = tl.load(kind_S + s)
    for k in tl.static_range(len(KINDS) // 5):
        if kind == k:
            _chunk(
                address_RS + s, count, start, n, numbers, sumsq_C, max_C, i, RULE, DECAY,
                KINDS[5 * k], KINDS[5 * k + 1], KINDS[5 * k + 2], KINDS[5 * k + 3], KINDS[5 * k + 4], STEP,
            )  # fmt: skip


@triton.jit
def _numbers(scale_S, scale_stride, bound_S, bound_stride, place):
    """A plan's scale and bound of one segment."""
    scale, bound = 1.0, float("inf")
    if scale_S is not None:
        scale = tl.load(scale_S + place * scale_stride).to(tl.float32)
    if bound_S is not None:
        bound = tl.load(bound_S + place * bound_stride).to(tl.float32)
    return scale, bound


@triton.jit
def _chunk(
    address, count, start, n, numbers, sumsq_C, max_C, i, RULE: tl.constexpr, DECAY: tl.constexpr,
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
            ww, gg, aa, bb, cc, o, o < n_body, numbers, RULE, DECAY, MEASURE, a_dtype, b_dtype, c_dtype
        )  # fmt: skip
        if MEASURE:
            total += u.to(tl.float64) * u.to(tl.float64)
            bits = tl.maximum(bits, bits_of(u))
    for first in tl.range(0, n - n_body, STEP):
        j = first + tl.arange(0, STEP)
        o = tl.where(j < head, j, j + n_body)
        u = _elements(w, g, a, b, c, o, j < n - n_body, numbers, RULE, DECAY, MEASURE, a_dtype, b_dtype, c_dtype)
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
    MEASURE: tl.constexpr, a_dtype: tl.constexpr, b_dtype: tl.constexpr, c_dtype: tl.constexpr,
):  # fmt: skip
    """Some elements: read, step, write. The update before its own clip, 0 where masked."""
    scale, bound, after, limit, term, root, lr, keep, decay, sign, past, fresh, past2, fresh2, eps = numbers
    g = sign * clamped(tl.load(g_ptr + o, mask=mask, other=0.0).to(tl.float32) * scale, bound)
    if not MEASURE or DECAY == "coupled":
        w = tl.load(w_ptr + o, mask=mask, other=0.0).to(tl.float32)
    if DECAY == "coupled":
        g += decay * w
    if a_dtype != _ABSENT:
        a = tl.load(a_ptr + o, mask=mask, other=0.0).to(tl.float32)
    if b_dtype != _ABSENT:
        b = tl.load(b_ptr + o, mask=mask, other=0.0).to(tl.float32)
    if c_dtype != _ABSENT:
        c = tl.load(c_ptr + o, mask=mask, other=0.0).to(tl.float32)

    if RULE == "adam":
        a = past * a + fresh * g
        b = past2 * b + fresh2 * g * g
        top = b
        if c_dtype != _ABSENT:
            c = tl.where((c >= b) | (c != c), c, b)
            top = c
        u = term * tl.div_rn(a, tl.div_rn(tl.sqrt_rn(top), root) + eps)
    elif RULE == "rmsprop":
        a = past2 * a + fresh2 * g * g
        variance = a
        if b_dtype != _ABSENT:
            b += fresh2 * (g - b)  # settles at g, so that the variance does not fall below 0
            variance = a - b * b
        u = tl.div_rn(g, tl.div_rn(tl.sqrt_rn(variance), root) + eps)
        if c_dtype != _ABSENT:
            c = past * c + u
            u = c
    else:
        u = g
        if a_dtype != _ABSENT:
            a = past * a + term * g
            u = a
            if RULE == "nesterov":
                u = g + past * a

    if not MEASURE:
        if a_dtype != _ABSENT:
            tl.store(a_ptr + o, a.to(a_dtype), mask=mask)
        if b_dtype != _ABSENT:
            tl.store(b_ptr + o, b.to(b_dtype), mask=mask)
        if c_dtype != _ABSENT:
            tl.store(c_ptr + o, c.to(c_dtype), mask=mask)
        if DECAY == "decoupled":
            w = w * keep
        move = tl.where(lr == 0.0, 0.0, lr * clamped(u * after, limit))  # also where the update is not finite
        tl.store(w_ptr + o, (w - move).to(w_ptr.dtype.element_ty), mask=mask)
    return tl.where(mask, u, 0.0)

"""The optimizer's step in plain torch, for every device and dtype: the four rules of `rule.py`, a tensor at a time.

What the other languages do in registers is done here in temporaries: the clipped gradient, the update, and of 16-bit
memory float32 copies. To measure an update, the moments are advanced in copies and everything is computed again for the
step, so that beside weights, gradients and moments there are never more than the temporaries of one tensor. Small
tensors share a call of torch's foreach functions, up to so many elements as the largest has, or SMALL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_gradclip.device import moved, number_on
from hf_gradclip.kernels.eager import units
from hf_gradclip.kernels.eager.fits import insist_on_step_memory, insist_on_units
from hf_gradclip.kernels.eager.half import SMALL
from hf_gradclip.kernels.eager.whole import largest
from hf_gradclip.kernels.rule import ByAxes, Memory, Places, Rule, insist_on_places
from hf_gradclip.kernels.table import Table
from hf_gradclip.types import ClipPlan, statistics_dtype

Moments = list[list[Tensor]]
"""The a, b and c of a rule, one entry per parameter; an empty list for one that is not kept."""


def serves(memory: Memory, places: Places) -> bool:
    """Any memory."""
    return True


def prepare(rule: Rule, memory: Memory, places: Places) -> None:
    """Nothing; see operations.Step."""


def step_(
    rule: Rule,
    memory: Memory,
    places: Places,
    plan: ClipPlan | None,
    after: ClipPlan | None,
    table: Table | None = None,
    skip: Tensor | None = None,
) -> None:
    """One step of a group; see operations.Step. With `skip` everything is computed, and one of two is stored."""
    insist_on_places(rule, memory, places, plan, after, by_unit=True)
    insist_on_step_memory(memory)
    insist_on_units(memory, places, plan)
    for some in _batches(memory):
        _step_some_(rule, memory, places, some, plan, after, skip)


def measure_update(
    rule: Rule, memory: Memory, places: Places, plan: ClipPlan | None, table: Table | None = None
) -> tuple[Tensor, Tensor]:
    """The statistics of the update that `step_` would go along; see operations.Step."""
    insist_on_places(rule, memory, places, plan, by_unit=True)
    insist_on_step_memory(memory)
    insist_on_units(memory, places, plan)
    found = [_measure_some(rule, memory, places, some, plan) for some in _batches(memory)]
    sums, tops = zip(*found, strict=True)
    return torch.cat(sums), torch.cat(tops)


def _step_some_(
    rule: Rule,
    memory: Memory,
    places: Places,
    some: slice,
    plan: ClipPlan | None,
    after: ClipPlan | None,
    skip: Tensor | None,
) -> None:
    """The step of some parameters; what it holds is gone when it returns."""
    weights, *_ = part = _part(memory, some)
    wide = _wide(weights)
    moments = _moments(part, wide, copies=skip is not None)
    updates = _updates(rule, part, places, some, plan, moments)
    if after is not None:
        updates = _clipped(updates, after, places.update[some])
    for kept, column in zip(moments, (part.first, part.second, part.third), strict=True):
        if kept and kept[0] is not column[0]:
            _store_([tensor for tensor in column if tensor is not None], kept, skip)
    if rule.lr != 0:  # else nothing moves, also where the update is not finite
        _move_(rule, list(weights), updates, wide, skip)


def _measure_some(
    rule: Rule, memory: Memory, places: Places, some: slice, plan: ClipPlan | None
) -> tuple[Tensor, Tensor]:
    """Sums of squares and largest elements of the updates of some parameters."""
    part = _part(memory, some)
    device = part.weights[0].device
    dtype = statistics_dtype(device)
    updates = _updates(rule, part, places, some, plan, _moments(part, _wide(part.weights), copies=True))
    norms = torch._foreach_norm(updates, 2, dtype=dtype)  # squares of float32 may overflow, those of float64 do not
    return torch.stack([moved(norm, device) for norm in norms]).square_(), largest(updates, dtype, device)


def _batches(memory: Memory) -> Iterator[slice]:
    """Parameters of the same dtypes one after another, with no more elements than the largest of all, or SMALL."""
    sizes = [weight.numel() for weight in memory.weights]
    kinds = [tuple(None if t is None else t.dtype for t in row) for row in zip(*memory, strict=True)]
    most = max(SMALL, *sizes)
    first = filled = 0
    for i, size in enumerate(sizes):
        if i > first and (filled + size > most or kinds[i] != kinds[first]):
            yield slice(first, i)
            first, filled = i, 0
        filled += size
    if first < len(sizes):
        yield slice(first, len(sizes))


def _part(memory: Memory, some: slice) -> Memory:
    weights, grads, first, second, third = memory
    return Memory(weights[some], grads[some], first[some], second[some], third[some])


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that is computed in: float32, or a wider one of the memory."""
    return torch.promote_types(tensors[0].dtype, torch.float32)


def _moments(part: Memory, wide: torch.dtype, copies: bool) -> Moments:
    """Memory in which the moments may be advanced: themselves, or copies, as 16-bit memory always needs."""
    columns = (part.first, part.second, part.third)
    return [[tensor.to(wide, copy=copies) for tensor in column if tensor is not None] for column in columns]


def _updates(
    rule: Rule, part: Memory, places: Places, some: slice, plan: ClipPlan | None, moments: Moments
) -> list[Tensor]:
    """Advance the moments by the clipped gradients; the updates before their own clip, which may share their memory."""
    wide = _wide(part.weights)
    grads = [grad.to(wide) for grad in part.grads]
    if plan is not None and places.units is None:
        grads = _clipped(grads, plan, places.gradient[some])
    elif plan is not None and places.units is not None:
        grads = [
            _clipped_by_unit(grad, plan, first, cut)
            for grad, first, cut in zip(grads, places.gradient[some], places.units[some], strict=True)
        ]
    if rule.maximize:
        grads = list(torch._foreach_neg(grads))
    if rule.decay != 0 and not rule.decoupled:
        grads = list(torch._foreach_add(grads, [w.to(wide) for w in part.weights], alpha=rule.decay))
    terms = _terms(rule, some, wide)
    return {"adam": _adam, "rmsprop": _rmsprop, "sgd": _momentum, "nesterov": _momentum}[rule.name](
        rule, grads, moments, terms
    )


Terms = list[Any] | None
"""All terms, and all roots, as numbers or 0-d tensors; None where they are 1."""


def _terms(rule: Rule, some: slice, wide: torch.dtype) -> Terms:
    """Those of some parameters."""
    if rule.inverse_P2 is not None:
        return [column_P.unbind() for column_P in rule.inverse_P2[some].reciprocal().to(wide).unbind(1)]
    return None if rule.terms is None else list(zip(*rule.terms[some], strict=True))


def _adam(rule: Rule, g: list[Tensor], moments: Moments, terms: Terms) -> list[Tensor]:
    a, b, c = moments
    torch._foreach_lerp_(a, g, rule.fresh)
    torch._foreach_mul_(b, rule.past2)
    torch._foreach_addcmul_(b, g, g, rule.fresh2)
    if c:
        torch._foreach_maximum_(c, b)
    updates = list(torch._foreach_div(a, _denominators(rule, list(torch._foreach_sqrt(c or b)), terms)))
    if terms is not None:
        torch._foreach_mul_(updates, terms[0])
    return updates


def _rmsprop(rule: Rule, g: list[Tensor], moments: Moments, terms: Terms) -> list[Tensor]:
    a, b, c = moments
    torch._foreach_mul_(a, rule.past2)
    torch._foreach_addcmul_(a, g, g, rule.fresh2)
    if b:
        torch._foreach_lerp_(b, g, rule.fresh2)
        roots = list(torch._foreach_addcmul(a, b, b, -1))
        torch._foreach_sqrt_(roots)
    else:
        roots = list(torch._foreach_sqrt(a))
    updates = list(torch._foreach_div(g, _denominators(rule, roots, terms)))
    if not c:
        return updates
    torch._foreach_mul_(c, rule.past)
    torch._foreach_add_(c, updates)
    return c


def _momentum(rule: Rule, g: list[Tensor], moments: Moments, terms: Terms) -> list[Tensor]:
    a = moments[0]
    if not a:
        return g
    torch._foreach_mul_(a, rule.past)
    torch._foreach_add_(a, g if terms is None else list(torch._foreach_mul(g, terms[0])))
    return list(torch._foreach_add(g, a, alpha=rule.past)) if rule.name == "nesterov" else a


def _denominators(rule: Rule, roots: list[Tensor], terms: Terms) -> list[Tensor]:
    """sqrt(v) / root + eps, in the memory of sqrt(v)."""
    if terms is not None:
        torch._foreach_div_(roots, terms[1])
    torch._foreach_add_(roots, rule.eps)
    return roots


def _move_(rule: Rule, weights: list[Tensor], updates: list[Tensor], wide: torch.dtype, skip: Tensor | None) -> None:
    """w <- w (1 - lr decay) - lr u."""
    moving = [weight.to(wide, copy=skip is not None) for weight in weights]
    if rule.decoupled and rule.decay != 0:
        torch._foreach_mul_(moving, 1 - rule.lr * rule.decay)
    torch._foreach_add_(moving, updates, alpha=-rule.lr)
    if skip is not None or weights[0].dtype != wide:
        _store_(weights, moving, skip)


def _store_(tensors: list[Tensor], values: list[Tensor], skip: Tensor | None) -> None:
    """Round and write, or leave what is there."""
    if skip is not None:
        values = [torch.where(skip, old, new) for old, new in zip(tensors, values, strict=True)]
    torch._foreach_copy_(tensors, values)


def _clipped(tensors: list[Tensor], plan: ClipPlan, places: Sequence[int]) -> list[Tensor]:
    """clamp(t * scale, -bound, bound) in new memory; on the CPU the tensors themselves where nothing is asked."""
    scale, bound = (_numbers(number_S, places) for number_S in (plan.scale_S, plan.bound_S))
    assert scale is not None
    if scale.is_cpu and (bound is None or bound.is_cpu):
        numbers = scale.tolist()
        found = tensors if set(numbers) == {1.0} else list(torch._foreach_mul(tensors, numbers))
        if bound is None or not bool((bound < float("inf")).any()):
            return found
        limits = bound.tolist()
        return [t if limit == float("inf") else t.clamp(-limit, limit) for t, limit in zip(found, limits, strict=True)]
    device, wide = tensors[0].device, tensors[0].dtype  # of all
    found = [t * number for t, number in zip(tensors, moved(scale, device, wide).unbind(), strict=True)]
    if bound is None:
        return found
    high = moved(bound, device, wide)
    return [torch.clamp(t, *ends) for t, *ends in zip(found, high.neg().unbind(), high.unbind(), strict=True)]


def _numbers(number_S: Tensor | None, places: Sequence[int]) -> Tensor | None:
    """The numbers of some parameters, shape (len(places),); their places are uploaded without waiting."""
    if number_S is None or number_S.ndim == 0:
        return number_S if number_S is None else number_S.expand(len(places))
    index = torch.tensor(places, dtype=torch.int64, device="cpu")
    return number_S.index_select(0, moved(index, number_S.device))


def _clipped_by_unit(grad: Tensor, plan: ClipPlan, first: int, cut: ByAxes | None) -> Tensor:
    """The same for one gradient whose numbers are by unit, or that is not cut."""
    if cut is None:
        return _clipped([grad], plan, [first])[0]
    device, count = grad.device, len(cut.segments)
    scale_U, bound_U = (
        None if n_S is None else n_S[cut.segments] if n_S.ndim else number_on(device, n_S).expand(count)
        for n_S in (plan.scale_S, plan.bound_S)
    )
    assert scale_U is not None
    if scale_U.is_cpu and bound_U is None and bool((scale_U == 1).all()):
        return grad
    grad = grad.clone()
    units.scale_(grad, cut.kept, scale_U)
    if bound_U is not None:
        units.clamp_(grad, cut.kept, bound_U)
    return grad

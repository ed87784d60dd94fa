"""The optimizer's step in C, for memory of a CPU: clip, moments and weights of a group in one read and one write.

Arithmetic is in float32, and what is stored is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_gradclip.kernels.c.library import BYTES, CHUNK, Argument, arguments, call, share
from hf_gradclip.kernels.rule import Memory, Places, Rule, are_alike, insist_on_places, insist_on_plans
from hf_gradclip.kernels.table import Table, table_of
from hf_gradclip.types import ClipPlan

RULES = {"sgd": 0, "nesterov": 1, "adam": 2, "rmsprop": 3}
"""How the library tells the rules apart."""


def serves(memory: Memory, places: Places) -> bool:
    """Whether all tensors of a parameter are there with one shape, one dtype and one order of elements."""
    if places.units is not None or not are_alike(memory, BYTES):
        return False
    dtypes = [{None if t is None else t.dtype for t in column} for column in memory]
    if len(set().union(*dtypes) - {None}) == 1:
        return True
    return all(t is None or t.dtype == w.dtype for w, *rest in zip(*memory, strict=True) for t in rest)


def prepare(rule: Rule, memory: Memory, places: Places) -> Table:
    """The table of a step; see operations.Step."""
    insist_on_places(rule, memory, places)
    return table_of(memory, memory.weights[0].device, CHUNK, places.pairs, "tensor")


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
    if skip is not None and bool(skip):  # in memory of the host: nobody waits
        return
    _share(table, rule, len(places.gradient), plan, after, None, None)


def measure_update(
    rule: Rule, memory: Memory, places: Places, plan: ClipPlan | None, table: Table | None = None
) -> tuple[Tensor, Tensor]:
    """The statistics of the update that `step_` would go along; see operations.Step."""
    table = prepare(rule, memory, places) if table is None else table
    insist_on_plans(memory, places, plan)
    count = len(places.gradient)
    sumsq_S, max_S = torch.empty(2, count, dtype=torch.float64, device="cpu")
    sumsq_C = torch.empty(table.chunks, dtype=torch.float64, device="cpu")
    max_C = torch.empty(table.chunks, dtype=torch.float32, device="cpu")
    _share(table, rule, count, plan, None, sumsq_C, max_C)
    call("gradclip_finish", count, table.first_S, sumsq_C, max_C, sumsq_S, max_S)
    return sumsq_S, max_S


def _share(
    table: Table,
    rule: Rule,
    count: int,
    plan: ClipPlan | None,
    after: ClipPlan | None,
    sumsq_C: Tensor | None,
    max_C: Tensor | None,
) -> None:
    terms = None if rule.terms is None else _numbers([number for pair in rule.terms for number in pair])
    if rule.inverse_P2 is not None:
        terms = rule.inverse_P2.reciprocal().float().contiguous()
    keep = 1 - rule.lr * rule.decay if rule.decoupled else 1.0
    decay = 0.0 if rule.decoupled else rule.decay
    sign = -1.0 if rule.maximize else 1.0
    numbers = _numbers([rule.lr, keep, decay, sign, rule.past, rule.fresh, rule.past2, rule.fresh2, rule.eps])
    share(
        "gradclip_step", table.chunks, *arguments(table), CHUNK, count, table.place_S, terms, *_vectors(plan),
        *_vectors(after), RULES[rule.name], numbers, sumsq_C, max_C, writes=sumsq_C is None,
    )  # fmt: skip


def _numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _vectors(plan: ClipPlan | None) -> tuple[Argument, ...]:
    """Scale and bound with the distance between two segments, which is 0 where one number serves all."""
    vectors = (None, None) if plan is None else (plan.scale_S, plan.bound_S)
    found: list[Argument] = []
    for vector in vectors:
        vector = None if vector is None else vector.float()
        found += [vector, vector.stride(0) if vector is not None and vector.ndim else 0]
    return tuple(found)

"""The optimizer's step in C, for memory of a CPU: clip, moments and weights of a group in one read and one write.

The same functions as in step_triton.py, run as in native.py. Arithmetic is in float32, and what is stored is rounded
once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_gradclip.kernels.native import BYTES, CHUNK, Argument, arguments, call, share
from hf_gradclip.kernels.rule import Memory, Places, Rule, are_alike
from hf_gradclip.kernels.table import Table, table_of
from hf_gradclip.types import ClipPlan

RULES = {"sgd": 0, "nesterov": 1, "adam": 2, "rmsprop": 3}
"""How the library tells the rules apart."""


def serves(memory: Memory) -> bool:
    """Whether all tensors of a parameter are there with one size, one dtype and one order of elements."""
    of_one = all(t is None or t.dtype == w.dtype for w, *rest in zip(*memory, strict=True) for t in rest)
    return of_one and are_alike(memory, BYTES)


def step_(rule: Rule, memory: Memory, places: Places, plan: ClipPlan | None, after: ClipPlan | None) -> None:
    """One step of a group: the weights and moments change, the gradients do not. See `step_triton.step_`."""
    table = _table(memory, places)
    _share(table, rule, len(places), plan, after, None, None)


def measure(rule: Rule, memory: Memory, places: Places, plan: ClipPlan | None) -> tuple[Tensor, Tensor]:
    """The statistics of the update that `step_` would go along; see `step_triton.measure`."""
    table = _table(memory, places)
    sumsq_S = torch.empty(len(places), dtype=torch.float64, device="cpu")
    max_S = torch.empty_like(sumsq_S)
    sumsq_C = torch.empty(table.chunks, dtype=torch.float64, device="cpu")
    max_C = torch.empty(table.chunks, dtype=torch.float32, device="cpu")
    _share(table, rule, len(places), plan, None, sumsq_C, max_C)
    call("gradclip_finish", len(places), table.first_S, sumsq_C, max_C, sumsq_S, max_S)
    return sumsq_S, max_S


def _table(memory: Memory, places: Places) -> Table:
    flat = tuple(number for pair in places for number in pair)
    return table_of(memory, memory.weights[0].device, CHUNK, flat, "tensor")


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
    keep = 1 - rule.lr * rule.decay if rule.decoupled else 1.0
    decay = 0.0 if rule.decoupled else rule.decay
    sign = -1.0 if rule.maximize else 1.0
    numbers = _numbers([rule.lr, keep, decay, sign, rule.past, rule.fresh, rule.past2, rule.fresh2, rule.eps])
    share(
        "gradclip_step", table.chunks, *arguments(table), CHUNK, count, table.place_S, terms, *_vectors(plan),
        *_vectors(after), RULES[rule.name], numbers, sumsq_C, max_C,
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

"""What reads and scales memory: the operations of `operations.py`, in the language that serves.

An operation that only reads goes on in plain torch where its kernels fail, and so does one that failed before it wrote.
Nothing here is traced by torch.compile: an address is not a number of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version

from hf_gradclip.device import moved
from hf_gradclip.kernels import choice
from hf_gradclip.kernels.blocks import Axes, device_of_bounds, insist_on_counts, insist_on_numbers, of_host
from hf_gradclip.kernels.devices import Part, each_written, gathered, numbers_of, parts_of, picked
from hf_gradclip.kernels.operations import Language
from hf_gradclip.kernels.rule import Memory, Places, Rule
from hf_gradclip.kernels.table import Table, are_plain
from hf_gradclip.types import ClipPlan, statistics_dtype


class Ready(NamedTuple):
    """A step of some parameters of which only the plan is missing: the language that serves, and its table."""

    language: Language
    table: Table | None


def squares_overflow(device: torch.device) -> bool:
    """Whether a finite gradient on this device may have an infinite sum of squares: plain torch squares in float32."""
    return choice.language_of(device).dtypes is None


@_disable_dynamo
def statistics(
    grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device, max_abs: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of squares and, if asked for, largest absolute element per gradient; see operations.Whole.

    Gradients on several devices are taken, and dtypes that only plain torch has.
    """
    if parts := parts_of(grads, device):
        pairs = [statistics(picked(grads, part), statistics_dtype(part[0]), part[0], max_abs) for part in parts]
        sums, tops = zip(*pairs, strict=True)
        ones = [1] * len(grads)
        sumsq_S = gathered(sums, parts, ones, dtype, device)
        return sumsq_S, gathered(tops, parts, ones, dtype, device) if max_abs else None
    found = choice.whole(grads, device)
    try:
        return found.whole.statistics(grads, dtype, device, max_abs)
    except Exception as error:
        choice.give_up(found, error)
    return choice.torch_language().whole.statistics(grads, dtype, device, max_abs)


@_disable_dynamo
def apply_(grads: Sequence[Tensor | None], scale_S: Tensor, bound_S: Tensor | None) -> None:
    """g <- clamp(g * scale, -bound, +bound), in place; see operations.Whole. As `statistics`, any gradients."""
    device = _device_of(grads, scale_S)
    if parts := parts_of(grads, device):
        ones = [1] * len(grads)
        insist_on_numbers("scale_S", scale_S, ((), (len(grads),)), scale_S.device)
        insist_on_numbers("bound_S", bound_S, ((), (len(grads),)), device_of_bounds(scale_S, bound_S))

        def write(part: Part) -> None:
            scale, bound = numbers_of(scale_S, part, ones), numbers_of(bound_S, part, ones)
            assert scale is not None
            apply_(picked(grads, part), scale, bound)

        each_written(parts, write)
        return
    found = choice.whole(grads, device)
    try:
        found.whole.apply_(grads, scale_S, bound_S)
    except Exception as error:
        choice.give_up(found, error)
        choice.torch_language().whole.apply_(grads, scale_S, bound_S)
    _written([grad for grad, some in zip(grads, _asked(grads, scale_S, bound_S), strict=True) if some])


@_disable_dynamo
def unit_sums(
    blocks: Sequence[Tensor | None],
    kept: Sequence[Axes],
    counts: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Sum of squares per unit of all blocks; see operations.ByUnit. Any blocks."""
    if parts := parts_of(blocks, device):
        insist_on_counts(blocks, kept, counts)
        found_U = [
            unit_sums(
                picked(blocks, part), picked(kept, part), picked(counts, part), statistics_dtype(part[0]), part[0]
            )
            for part in parts
        ]
        return gathered(found_U, parts, counts, dtype, device)
    found = choice.by_unit(blocks, kept, device)
    try:
        return found.units.unit_sums(blocks, kept, counts, dtype, device)
    except Exception as error:
        choice.give_up(found, error)
    return choice.torch_language().units.unit_sums(blocks, kept, counts, dtype, device)


@_disable_dynamo
def unit_apply_(
    blocks: Sequence[Tensor | None],
    kept: Sequence[Axes],
    counts: Sequence[int],
    scale_U: Tensor,
    bound_U: Tensor | None,
) -> None:
    """g <- clamp(g * scale, -bound, +bound) by unit, in place; see operations.ByUnit. Any blocks."""
    if parts := parts_of(blocks, scale_U.device):
        insist_on_counts(blocks, kept, counts)
        for name, number_U in (("scale_U", scale_U), ("bound_U", bound_U)):
            insist_on_numbers(name, number_U, ((sum(counts),),), scale_U.device)

        def write(part: Part) -> None:
            scale, bound = numbers_of(scale_U, part, counts), numbers_of(bound_U, part, counts)
            assert scale is not None
            unit_apply_(picked(blocks, part), picked(kept, part), picked(counts, part), scale, bound)

        each_written(parts, write)
        return
    found = choice.by_unit(blocks, kept, scale_U.device)
    try:
        found.units.unit_apply_(blocks, kept, counts, scale_U, bound_U)
    except Exception as error:
        choice.give_up(found, error)
        choice.torch_language().units.unit_apply_(blocks, kept, counts, scale_U, bound_U)
    _written(blocks)


@_disable_dynamo
def prepare(rule: Rule, memory: Memory, places: Places, before: Ready | None = None) -> Ready:
    """Everything of a step that does not depend on a plan; see operations.Step. Any memory.

    `before` is what this gave for the last step of the same parameters: where every tensor is where it was, only the
    gradients are looked at again, which are other objects.
    """
    if before is not None and before.table is not None and (ready := _again(rule, memory, places, before)) is not None:
        return ready
    found = choice.step(memory, places)
    try:
        return Ready(found, found.step.prepare(rule, memory, places))
    except Exception as error:
        choice.give_up(found, error)
    return Ready(choice.torch_language(), None)


@_disable_dynamo
def measure_update(
    rule: Rule, memory: Memory, places: Places, plan: ClipPlan | None, ready: Ready | None = None
) -> tuple[Tensor, Tensor]:
    """The statistics of the update that `step_` would go along; see operations.Step. Any memory.

    `ready` is what `prepare` gave for these; None asks it.
    """
    found, table = _still(prepare(rule, memory, places) if ready is None else ready)
    plan = _beside(memory, plan)
    try:
        return found.step.measure_update(rule, memory, places, plan, table)
    except Exception as error:
        choice.give_up(found, error)
    return choice.torch_language().step.measure_update(rule, memory, places, plan)


@_disable_dynamo
def step_(
    rule: Rule,
    memory: Memory,
    places: Places,
    plan: ClipPlan | None,
    after: ClipPlan | None,
    skip: Tensor | None = None,
    ready: Ready | None = None,
) -> None:
    """One step: weights and moments change, gradients do not; see operations.Step. Any memory.

    `ready` is what `prepare` gave for these; None asks it. `skip` may be on another device.
    """
    found, table = _still(prepare(rule, memory, places) if ready is None else ready)
    plan, after = _beside(memory, plan), _beside(memory, after)
    skip = None if skip is None else moved(skip, memory.weights[0].device)
    try:
        found.step.step_(rule, memory, places, plan, after, table, skip)
    except Exception as error:
        choice.give_up(found, error)
        choice.torch_language().step.step_(rule, memory, places, plan, after, None, skip)
    for column in (memory.weights, memory.first, memory.second, memory.third):
        _written(column)


def _again(rule: Rule, memory: Memory, places: Places, before: Ready) -> Ready | None:
    """The same where all addresses, sizes and dtypes are those of an earlier step; None where they are not."""
    language, table = _still(before)
    if table is None or not are_plain(memory.grads) or any(map(Tensor.is_inference, memory.grads)):
        return None
    if [*map(Tensor.size, memory.weights)] != [*map(Tensor.size, memory.grads)]:
        return None  # one was reshaped in place
    try:
        now = language.step.prepare(rule, memory, places)
    except Exception:
        return None  # which is said where it is prepared anew
    return Ready(language, now) if now is not None and now.address_RS is table.address_RS else None


def _still(ready: Ready) -> Ready:
    """The same, or plain torch where its language was given up since."""
    language = choice.still(ready.language)
    return ready if language is ready.language else Ready(language, None)


def _beside(memory: Memory, plan: ClipPlan | None) -> ClipPlan | None:
    """The plan on the device of the memory; a model may be spread over several. One number for all stays."""
    if plan is None:
        return plan
    device = memory.weights[0].device

    def beside(number_S: Tensor) -> Tensor:
        return number_S if of_host(number_S) or number_S.device == device else moved(number_S, device)

    scale_S, bound_S = beside(plan.scale_S), None if plan.bound_S is None else beside(plan.bound_S)
    same = scale_S is plan.scale_S and bound_S is plan.bound_S
    return plan if same else replace(plan, scale_S=scale_S, bound_S=bound_S)


def _device_of(grads: Sequence[Tensor | None], scale_S: Tensor) -> torch.device:
    """Where the kernels are asked for: beside the numbers, unless the host has one for all."""
    if of_host(scale_S):
        return next((grad.device for grad in grads if grad is not None), scale_S.device)
    return scale_S.device


def _written(tensors: Sequence[Tensor | None]) -> None:
    """Tell autograd of memory that was written at its address, so that it still finds what may not be used any more."""
    increment_version([tensor for tensor in tensors if tensor is not None])


def _asked(grads: Sequence[Tensor | None], scale_S: Tensor, bound_S: Tensor | None) -> list[bool]:
    """Whether something is asked of each gradient; on a GPU the host does not know, and says so of all."""
    if not scale_S.is_cpu or not (bound_S is None or bound_S.is_cpu):
        return [True] * len(grads)
    asked = scale_S != 1 if bound_S is None else (scale_S != 1) | (bound_S < float("inf"))
    return asked.expand(len(grads)).tolist()

"""What a step computes for some parameters, on which memory, and where it finds the numbers of a plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.kernels.blocks import of_host
from hf_gradclip.kernels.table import Column, MisfitError, allocated, are_on, are_plain, dense
from hf_gradclip.types import ClipPlan, cached

MOMENTS = {"sgd": ("", "a"), "nesterov": ("a",), "adam": ("ab", "abc"), "rmsprop": ("a", "ab", "ac", "abc")}
"""Which moments of a rule there may be."""
QUOTIENTS = ("adam", "rmsprop")
"""Rules whose update is one."""


class Memory(NamedTuple):
    """The tensors of some parameters, one entry per parameter in each list; a moment that a rule does not keep is None.

    `first`, `second` and `third` are the a, b and c of Rule.
    """

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    first: Column
    second: Column
    third: Column


class ByAxes(NamedTuple):
    """The units of one parameter on this process: the axes that count them, and their segments in the plan.

    `segments` is int64, of shape (units,), in the order of the axes.
    """

    kept: tuple[int, ...]
    segments: Tensor


@dataclass(frozen=True)
class Places:
    """Where each of P parameters finds its numbers.

    Args:
        gradient: its segment in the plan for the gradients; where that is by unit, the first.
        update: its segment in the plan for the updates.
        units: its units, where the plan for the gradients is by unit and cuts this parameter; None where none is cut.
    """

    gradient: tuple[int, ...]
    update: tuple[int, ...]
    units: tuple[ByAxes | None, ...] | None = None

    def __post_init__(self) -> None:
        if min((*self.gradient, *self.update), default=0) < 0:
            raise MisfitError(f"Places({self.gradient}, {self.update}): a segment must be >= 0.")

    @cached
    def pairs(self) -> tuple[int, ...]:
        """Both segments of each parameter, one parameter after another."""
        return tuple(segment for pair in zip(self.gradient, self.update, strict=True) for segment in pair)

    @cached
    def furthest(self) -> tuple[int, int]:
        """The highest segment of each kind, -1 without parameters."""
        return max(self.gradient, default=-1), max(self.update, default=-1)

    @cached
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest segment of a unit; 0 and -1 without any, and on a GPU, where nobody waits."""
        found = [cut.segments for cut in self.units or () if cut is not None and len(cut.segments)]
        if not found or not all(segments.is_cpu for segments in found):
            return 0, -1
        segments = torch.cat(found)
        return int(segments.min()), int(segments.max())


@dataclass(frozen=True)
class Rule:
    """An optimizer's arithmetic with its numbers. All of them are arguments of a kernel, none is compiled into it.

    g is the clipped gradient with its sign and coupled decay, w <- w (1 - lr decay) - lr u, and

        adam      a <- past a + fresh g, b <- past2 b + fresh2 g^2, u = a term / (sqrt(b) / root + eps), or with
                  c <- max(c, b) in the place of b
        rmsprop   a <- past2 a + fresh2 g^2, b <- b + fresh2 (g - b), u = g / (sqrt(a - b^2) / root + eps), or
                  c <- past c + u in its place
        sgd       u = g, or a <- past a + term g in its place
        nesterov  a <- past a + term g, u = g + past a

    Args:
        name: of the four.
        lr: learning rate; where it is 0 no weight moves, whatever the update is.
        decay: weight decay.
        decoupled: the decay is outside the gradient.
        maximize: the gradient changes its sign.
        past, fresh, past2, fresh2, eps: as above.
        terms: per parameter (term, root); None where both are 1 for all.
        inverse_P2: in their place 1 / term and 1 / root, float64, shape (P, 2), beside the memory: of a quotient where
            the host does not know them.
    """

    name: str
    lr: float
    decay: float
    decoupled: bool
    maximize: bool
    past: float = 0.0
    fresh: float = 0.0
    past2: float = 0.0
    fresh2: float = 0.0
    eps: float = 0.0
    terms: Sequence[tuple[float, float]] | None = None
    inverse_P2: Tensor | None = None

    def __post_init__(self) -> None:
        if self.name not in MOMENTS:
            raise MisfitError(f"Rule({self.name!r}): must be one of {', '.join(MOMENTS)}.")
        if self.terms is not None and not all(len(pair) == 2 for pair in self.terms):
            raise MisfitError(f"Rule({self.name!r}, terms={self.terms}): must be pairs.")
        if self.inverse_P2 is not None and (self.terms is not None or self.name not in QUOTIENTS):
            known = " or ".join(QUOTIENTS)
            raise MisfitError(f"Rule({self.name!r}, inverse_P2=...): is for {known}, in the place of terms.")


def are_alike(memory: Memory, dtypes: Collection[torch.dtype]) -> bool:
    """Whether all tensors of a parameter are there, to be written, of one shape and one order, on one device."""
    if len(set(map(len, memory))) != 1:
        return False
    tensors = [tensor for column in memory for tensor in column if tensor is not None]
    if not are_plain(tensors) or any(map(Tensor.is_inference, tensors)):
        return False
    if not are_on(memory.weights[0].device, tensors):
        return False
    if not {tensor.dtype for tensor in tensors}.issubset(dtypes) or not all(map(allocated, _without_address(tensors))):
        return False
    shapes = [*map(Tensor.size, memory.weights)]
    if not all(_have_shapes(row, shapes) for row in memory[1:]):
        return False
    return all(map(Tensor.is_contiguous, tensors)) or all(map(_in_one_order, zip(*memory, strict=True)))


def _have_shapes(row: Column, shapes: Sequence[torch.Size]) -> bool:
    """Whether the tensors of a column have these shapes, as far as they are there."""
    present = [tensor for tensor in row if tensor is not None]
    if len(present) == len(row):
        return [*map(Tensor.size, present)] == shapes
    return not present or all(t is None or t.shape == shape for t, shape in zip(row, shapes, strict=True))


def _without_address(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors whose storage begins at address 0: those that are empty, and those whose memory was freed."""
    addresses, offsets = [*map(Tensor.data_ptr, tensors)], [*map(Tensor.storage_offset, tensors)]
    if min(addresses, default=1) > 8 * max(offsets, default=0):
        return []  # as a rule: no Python runs per tensor
    starts = zip(tensors, addresses, offsets, strict=True)
    return [tensor for tensor, address, offset in starts if address == offset * tensor.itemsize]


def _in_one_order(row: Sequence[Tensor | None]) -> bool:
    """Whether the tensors of one parameter are without gaps, their elements in the same order."""
    first, *others = [tensor for tensor in row if tensor is not None]
    if first.is_contiguous() and all(map(Tensor.is_contiguous, others)):
        return True
    return dense(first) and all(other.stride() == first.stride() for other in others)


def insist_on_places(
    rule: Rule, memory: Memory, places: Places, *plans: ClipPlan | None, by_unit: bool = False
) -> None:
    """Stop before a number is read that is not there.

    Args:
        rule: with a pair of terms per parameter, or none.
        memory: of one parameter or more.
        places: of as many.
        plans: for the gradients, then for the updates.
        by_unit: whether places by unit are taken.

    Raises:
        MisfitError: where they do not fit each other.
    """
    count = len(memory.weights)
    counts = {*map(len, memory), len(places.gradient), len(places.update)}
    counts |= {count if given is None else len(given) for given in (rule.terms, rule.inverse_P2)}
    counts |= {count if places.units is None else len(places.units)}
    if not count or counts != {count}:
        terms = "no" if rule.terms is None else len(rule.terms)
        raise MisfitError(
            f"{count} parameters, {[len(column) for column in memory[1:]]} gradients and moments, "
            f"{len(places.gradient)} and {len(places.update)} places, {terms} pairs of terms: must be as many, one at "
            "least."
        )
    _insist_on_moments(rule, memory)
    if places.units is not None and not by_unit:
        raise MisfitError("Places by unit: only plain torch takes them.")
    insist_on_plans(memory, places, *plans)


def insist_on_plans(memory: Memory, places: Places, *plans: ClipPlan | None) -> None:
    """Stop before a number of a plan is read that is not there; see `insist_on_places`."""
    for plan, furthest in zip(plans, places.furthest, strict=False):
        if plan is None:
            continue
        for name, number_S in (("scale_S", plan.scale_S), ("bound_S", plan.bound_S)):
            if number_S is None:
                continue
            if number_S.device != memory.weights[0].device and not of_host(number_S):
                raise MisfitError(f"{name} is on {number_S.device}, and the parameters on {memory.weights[0].device}.")
            if number_S.ndim > 1 or (number_S.ndim == 1 and furthest >= len(number_S)):
                raise MisfitError(
                    f"{name} has shape {tuple(number_S.shape)}, and a parameter has segment {furthest}: must be a "
                    "vector that reaches there, or one number."
                )


def _insist_on_moments(rule: Rule, memory: Memory) -> None:
    """Stop for a moment that the rule does not know, or a missing gradient; parameters may keep different ones."""
    count = len(memory.weights)
    there = [count - sum(tensor is None for tensor in column) for column in memory[1:]]
    kinds = {tuple(some > 0 for some in there)}  # the usual case: what is there for one is there for all
    if not set(there) <= {0, count}:
        kinds = {tuple(tensor is not None for tensor in row) for row in zip(*memory[1:], strict=True)}
    for grad, *kept in kinds:
        moments = "".join(name for name, some in zip("abc", kept, strict=True) if some)
        if not grad or moments not in MOMENTS[rule.name]:
            known = " or ".join(word or "none" for word in MOMENTS[rule.name])
            raise MisfitError(f"{rule.name} with the moments {moments or 'none'}: must be {known}, and a gradient.")

"""Counts, shapes, dtypes, devices and vectors that do not fit the memory: an error by name, and nothing is written.

For every operation in every language, asked directly and through the package, which does not give a language up for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_gradclip import kernels
from hf_gradclip.kernels import choice
from hf_gradclip.kernels.rule import ByAxes, Memory, Places, Rule
from hf_gradclip.kernels.table import MisfitError
from hf_gradclip.types import ClipPlan
from tests.kernels.languages import NAMES, serving
from tests.kernels.tensors import CPU

META = torch.device("meta")


@pytest.fixture(params=[(name, directly) for name in NAMES for directly in (True, False)], ids=str)
def given(request) -> Iterator[tuple[Any, Any, Any]]:
    """The files of a language; or the package, of which that language serves and does so afterwards too."""
    name, directly = request.param
    with serving(name) as found:
        yield (found.whole, found.units, found.step) if directly else (kernels,) * 3
        assert choice._given_up == {}


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def freed(*shape: int) -> Tensor:
    tensor = torch.ones(*shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def refused(call: Callable[[], object], tensors: list[Tensor]) -> None:
    """A MisfitError, and these tensors of ones are as they were."""
    with pytest.raises(MisfitError) as raised:
        call()
    assert len(str(raised.value)) > 20
    assert all((tensor == 1).all() for tensor in tensors)


WHOLE: dict[str, Callable[[list[Tensor | None]], tuple[list[Tensor | None], Tensor, Tensor | None]]] = {
    "too short": lambda grads: (grads, torch.full((2,), 0.5), None),
    "too long": lambda grads: (grads, torch.full((4,), 0.5), None),
    "empty": lambda grads: (grads, torch.zeros(0), None),
    "two axes": lambda grads: (grads, torch.full((3, 1), 0.5), None),
    "one for all with an axis": lambda grads: (grads, torch.full((1,), 0.5), None),
    "bound too short": lambda grads: (grads, torch.tensor(0.5), torch.full((2,), 0.1)),
    "bound too long": lambda grads: (grads, torch.full((3,), 0.5), torch.full((5,), 0.1)),
    "bound elsewhere": lambda grads: (grads, torch.full((3,), 0.5), torch.full((3,), 0.1, device=META)),
    "shared": lambda grads: ([grads[0], grads[1], ones(1).expand(9)], torch.full((3,), 0.5), None),
    "gaps": lambda grads: ([grads[0], grads[1], ones(9)[::2]], torch.full((3,), 0.5), None),
    "freed": lambda grads: ([grads[0], grads[1], freed(9)], torch.full((3,), 0.5), None),
    "freed, with an offset": lambda grads: ([grads[0], grads[1], behind()], torch.full((3,), 0.5), None),
    "whole numbers": lambda grads: ([grads[0], grads[1], torch.ones(9, dtype=torch.int32)], torch.tensor(0.5), None),
}


def behind() -> Tensor:
    memory = torch.ones(9)
    part = memory[5:]
    memory.untyped_storage().resize_(0)
    return part


@pytest.mark.parametrize("case", WHOLE)
def test_apply(given, case):
    grads: list[Tensor | None] = [ones(4), ones(4, 5), None]
    wrong, scale_S, bound_S = WHOLE[case](grads)
    refused(lambda: given[0].apply_(wrong, scale_S, bound_S), [grads[0], grads[1]])


@pytest.mark.parametrize(
    "wrong", [ones(1).expand(9), ones(9)[::2], freed(9), behind(), torch.ones(9, dtype=torch.int32)]
)
def test_statistics(given, wrong):
    refused(lambda: given[0].statistics([ones(4), wrong], torch.float64, CPU, True), [])


Units = tuple[list[Tensor | None], list[tuple[int, ...]], list[int]]
UNITS: dict[str, Callable[[Tensor], Units]] = {
    "fewer": lambda block: ([block], [(0,)], [3]),
    "more": lambda block: ([block], [(0,)], [5]),
    "of the other axis": lambda block: ([block], [(0,)], [6]),
    "no such axis": lambda block: ([block], [(2,)], [4]),
    "one axis too many": lambda block: ([block], [(0, 1, 2)], [24]),
    "an axis from behind": lambda block: ([block], [(-1,)], [6]),
    "an axis twice": lambda block: ([block], [(0, 0)], [16]),
    "out of order": lambda block: ([block], [(1, 0)], [24]),
    "fewer kinds than blocks": lambda block: ([block, block], [(0,)], [4, 4]),
    "fewer counts than blocks": lambda block: ([block, block], [(0,), (0,)], [4]),
    "more counts than blocks": lambda block: ([block], [(0,)], [4, 4]),
    "a count below 0": lambda block: ([None, block], [(0,), (0,)], [-3, 4]),
    "resized": lambda block: ([block, ones(3, 6)], [(0,), (0,)], [4, 4]),
    "freed": lambda block: ([block, freed(3, 6)], [(0,), (0,)], [4, 3]),
    "whole numbers": lambda block: ([block, torch.ones(3, 6, dtype=torch.int64)], [(0,), (0,)], [4, 3]),
}


@pytest.mark.parametrize("case", UNITS)
def test_units(given, case):
    block = ones(4, 6)
    blocks, kept, counts = UNITS[case](block)
    length = max(sum(counts), 0)
    refused(lambda: given[1].unit_sums(blocks, kept, counts, torch.float64, CPU), [block])
    refused(lambda: given[1].unit_apply_(blocks, kept, counts, torch.full((length,), 0.5), None), [block])


NUMBERS = {
    "too short": (torch.full((3,), 0.5), None),
    "too long": (torch.full((5,), 0.5), None),
    "one": (torch.tensor(0.5), None),
    "two axes": (torch.full((4, 1), 0.5), None),
    "bound too short": (torch.full((4,), 0.5), torch.full((3,), 0.1)),
    "one bound": (torch.full((4,), 0.5), torch.tensor(0.1)),
    "bound elsewhere": (torch.full((4,), 0.5), torch.full((4,), 0.1, device=META)),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_by_unit(given, case):
    block = ones(4, 6)
    refused(lambda: given[1].unit_apply_([block], [(0,)], [4], *NUMBERS[case]), [block])


def test_a_block_that_shares_memory_is_not_written(given):
    blocks = [ones(4, 6), ones(1, 6).expand(4, 6)]
    refused(lambda: given[1].unit_apply_(blocks, [(0,)] * 2, [4, 4], torch.full((8,), 0.5), None), blocks)


def test_what_holds_nothing_shares_nothing(given):
    """A gradient without elements, as NumPy gives it, has strides of 0."""
    row, block = ones(4), ones(4, 6)
    given[0].apply_([row, ones(1).expand(0)], torch.full((2,), 0.5), None)
    given[1].unit_apply_([block, ones(1, 1).expand(0, 6)], [(0,)] * 2, [4, 0], torch.full((4,), 0.5), None)
    assert (row == 0.5).all()
    assert (block == 0.5).all()


def adam(**other: Any) -> Rule:
    return Rule(
        **{
            "name": "adam",
            "lr": 0.5,
            "decay": 0.1,
            "decoupled": True,
            "maximize": False,
            "fresh": 0.1,
            "eps": 1e-6,
            **other,
        }
    )


def memory(**columns: Any) -> Memory:
    """Two parameters with two moments."""
    given = {name: [ones(3), ones(2, 4)] for name in ("weights", "grads", "first", "second")} | {"third": [None, None]}
    return Memory(**{**given, **columns})


FIRST = Places((0, 1), (0, 1))
STEP: dict[str, Callable[[], tuple[Rule, Memory, Places, ClipPlan | None]]] = {
    "no parameter": lambda: (adam(), Memory([], [], [], [], []), Places((), ()), None),
    "fewer places": lambda: (adam(), memory(), Places((0,), (0,)), None),
    "more places": lambda: (adam(), memory(), Places((0, 1, 2), (0, 1, 2)), None),
    "fewer places of updates": lambda: (adam(), memory(), Places((0, 1), (0,)), None),
    "fewer terms": lambda: (adam(terms=[(1.0, 1.0)]), memory(), FIRST, None),
    "more terms": lambda: (adam(terms=[(1.0, 1.0)] * 3), memory(), FIRST, None),
    "fewer gradients": lambda: (adam(), memory(grads=[ones(3)]), FIRST, None),
    "fewer moments": lambda: (adam(), memory(first=[ones(3)]), FIRST, None),
    "more moments": lambda: (adam(), memory(third=[None] * 3), FIRST, None),
    "a gradient missing": lambda: (adam(), memory(grads=[ones(3), None]), FIRST, None),
    "a moment missing": lambda: (adam(), memory(second=[ones(3), None]), FIRST, None),
    "a moment too many": lambda: (adam(name="sgd"), memory(), FIRST, None),
    "a gradient of another size": lambda: (adam(), memory(grads=[ones(3), ones(2, 3)]), FIRST, None),
    "a moment of another size": lambda: (adam(), memory(second=[ones(3), ones(2, 5)]), FIRST, None),
    "a moment elsewhere": lambda: (adam(), memory(first=[ones(3), torch.ones(2, 4, device=META)]), FIRST, None),
    "a moment freed": lambda: (adam(), memory(first=[ones(3), freed(2, 4)]), FIRST, None),
    "a gradient freed": lambda: (adam(), memory(grads=[ones(3), freed(2, 4)]), FIRST, None),
    "a moment that shares memory": lambda: (adam(), memory(first=[ones(3), ones(1, 4).expand(2, 4)]), FIRST, None),
    "a plan too short": lambda: (adam(), memory(), FIRST, ClipPlan(torch.full((1,), 0.5))),
    "a place behind the plan": lambda: (adam(), memory(), Places((0, 7), (0, 1)), ClipPlan(torch.full((7,), 0.5))),
    "a plan of two axes": lambda: (adam(), memory(), FIRST, ClipPlan(torch.full((2, 2), 0.5))),
    "a bound too short": lambda: (adam(), memory(), FIRST, ClipPlan(torch.full((2,), 0.5), torch.full((1,), 0.1))),
}


@pytest.mark.parametrize("case", STEP)
def test_step(given, case):
    rule, wrong, places, plan = STEP[case]()
    if not wrong.weights and given[0] is kernels:
        pytest.skip("the package is given one parameter at least, see choice.step")
    there = [t for column in wrong for t in column if t is not None and t.is_cpu and t.untyped_storage().nbytes()]
    refused(lambda: given[2].measure_update(rule, wrong, places, plan), there)
    refused(lambda: given[2].step_(rule, wrong, places, plan, None), there)
    if plan is not None:
        refused(lambda: given[2].step_(rule, wrong, Places(places.update, places.gradient), None, plan), there)


def test_a_plan_elsewhere(given):
    """The package brings it to the parameters, as a model may be spread over several devices; the kernels do not."""
    if given[0] is kernels:
        pytest.skip("the package brings it there")
    wrong = memory()
    plan = ClipPlan(torch.full((2,), 0.5, device=META))
    refused(lambda: given[2].step_(adam(), wrong, FIRST, plan, None), [*wrong.weights, *wrong.first])


SEGMENTS = {
    "fewer": ByAxes((0,), torch.tensor([1])),
    "more": ByAxes((0,), torch.tensor([0, 1, 2])),
    "two axes": ByAxes((0,), torch.tensor([[0, 1]])),
    "no such axis": ByAxes((2,), torch.tensor([0, 1])),
    "an axis from behind": ByAxes((-2,), torch.tensor([0, 1])),
    "behind the plan": ByAxes((0,), torch.tensor([1, 3])),
    "below 0": ByAxes((0,), torch.tensor([1, -1])),
}


@pytest.mark.parametrize("case", SEGMENTS)
@pytest.mark.parametrize("units", [lambda cut: (None, cut), lambda cut: (cut,), lambda cut: (None, cut, None)])
def test_places_by_unit(given, case, units):
    wrong = memory(weights=[ones(3), ones(2, 4)])
    places = Places((0, 1), (0, 1), units(SEGMENTS[case]))
    plan = ClipPlan(torch.full((3,), 0.5))
    refused(lambda: given[2].measure_update(adam(), wrong, places, plan), [*wrong.weights, *wrong.first])
    refused(lambda: given[2].step_(adam(), wrong, places, plan, None), [*wrong.weights, *wrong.first])


def test_what_cannot_be_said():
    for make in (
        lambda: Places((0, -1), (0, 0)),
        lambda: Places((0,), (-2,)),
        lambda: Rule("adamw", 0.1, 0.0, True, False),
        lambda: Rule("sgd", 0.1, 0.0, True, False, terms=[(1.0,)]),
        lambda: Rule("sgd", 0.1, 0.0, True, False, terms=[(1.0, 1.0), (1.0, 1.0, 1.0)]),
    ):
        with pytest.raises(MisfitError):
            make()


def test_what_is_refused_here_is_taken_where_it_fits(given):
    """The cases above are one step away from this."""
    grads, block, right = [ones(4), ones(4, 5), None], ones(4, 6), memory()
    given[0].apply_(grads, torch.full((3,), 0.5), torch.full((3,), math.inf))
    given[1].unit_apply_([block], [(0,)], [4], torch.full((4,), 0.5), torch.full((4,), math.inf))
    plan = ClipPlan(torch.full((2,), 0.5), torch.full((2,), 0.1))
    given[2].step_(adam(terms=[(1.0, 1.0)] * 2), right, FIRST, plan, plan)
    assert all((tensor == 0.5).all() for tensor in (*grads[:2], block))
    assert not any((weight == 1).any() for weight in right.weights)

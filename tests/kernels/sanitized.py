"""The kernels in C under AddressSanitizer, handed what fits and what does not: run by test_sanitizer.py in a process.

    python -m tests.kernels.sanitized FOLDER

FOLDER holds the library, compiled with -fsanitize=address. Every operation is called directly, without the choice of a
language before it. Each call gives the right numbers, or raises and writes nothing; a read or a write of memory that
is not there ends the process. What came of the calls is printed as JSON. At last the library is told of more elements
than there are, which must end the process: somebody watched.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_gradclip.kernels import choice
from hf_gradclip.kernels.c import library, step, units, whole
from hf_gradclip.kernels.operations import WrittenError
from hf_gradclip.kernels.rule import MOMENTS, Memory, Places, Rule
from hf_gradclip.kernels.table import MisfitError
from hf_gradclip.types import ClipPlan
from tests.kernels.tensors import CPU, same_bits, sums, wanted
from tests.kernels.tensors import units as count_of
from tests.kernels.twists import BF16, F32, SHAPES, WRONG, is_there, numbers, twisted, vector

SEEN: Counter[str] = Counter()
"""By operation, how many calls were right and how many refused."""
EVERY = settings(
    deadline=None,
    max_examples=120,
    database=None,
    derandomize=True,
    report_multiple_bugs=False,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def attempt(name: str, tensors: list[Tensor | None], call: Callable[[], Any], check: Callable[[Any], None]) -> None:
    """Call; what comes is right, or nothing was written and the caller is told why."""
    before = [(tensor, tensor.clone()) for tensor in tensors if is_there(tensor)]
    try:
        found = call()
    except WrittenError:
        raise
    except (MisfitError, TypeError, RuntimeError) as raised:
        SEEN[f"{name} refused by name" if isinstance(raised, MisfitError) else f"{name}: {str(raised)[:60]}"] += 1
        kept = all(same_bits(tensor, old) for tensor, old in before)
    else:
        SEEN[f"{name} right"] += 1
        check(found)
        kept = True
    assert kept, f"{name} was refused after it had written"


def close(got: Tensor, want: list[Tensor], rtol: float) -> None:
    torch.testing.assert_close(got, torch.tensor([float(w) for w in want], dtype=torch.float64), rtol=rtol, atol=0)


def at(number_S: Tensor | None, i: int, missing: float) -> Tensor:
    if number_S is None:
        return torch.tensor(missing)
    return (number_S[i] if number_S.ndim else number_S).float()


@EVERY
@given(st.data())
def wholes(data: st.DataObject) -> None:
    whole.CHUNK = data.draw(st.sampled_from([8, 64, 5000, 1 << 16]))
    kinds = data.draw(st.lists(st.one_of(st.none(), st.tuples(SHAPES, st.sampled_from([F32, BF16]))), max_size=5))
    grads = [None if kind is None else numbers(data, *kind) for kind in kinds]
    if len(grads) > 1 and data.draw(st.integers(0, 9)) == 0:
        grads[-1] = grads[0]
    for _ in range(2):  # as they are, then with something in the place of one
        attempt(
            "statistics", grads, lambda: whole.statistics(grads, torch.float64, CPU, True), lambda s: _sizes(grads, *s)
        )
        scale_S = vector(data, len(grads))
        bound_S = vector(data, len(grads)) if data.draw(st.booleans()) else None
        if scale_S is not None:
            old = [None if not is_there(grad) else grad.clone() for grad in grads]
            attempt(
                "apply_", grads, lambda s=scale_S, b=bound_S: whole.apply_(grads, s, b),
                lambda _, s=scale_S, b=bound_S, o=old: _scaled(grads, o, s, b),
            )  # fmt: skip
        present = [i for i, grad in enumerate(grads) if grad is not None]
        if present:
            i = data.draw(st.sampled_from(present))
            grads[i] = twisted(grads[i], data.draw(st.sampled_from(WRONG)))


def _sizes(grads: list[Tensor | None], sumsq_S: Tensor, max_S: Tensor, rtol: float = 0) -> None:
    wide = [torch.zeros(1).double() if grad is None or not grad.numel() else grad.double() for grad in grads]
    close(sumsq_S, [grad.square().sum() for grad in wide], max(rtol, 1e-5))
    close(max_S, [grad.abs().max() for grad in wide], rtol)


def _scaled(grads: list[Tensor | None], old: list[Tensor | None], scale_S: Tensor, bound_S: Tensor | None) -> None:
    for i, (grad, before) in enumerate(zip(grads, old, strict=True)):
        if before is not None and sum(grad is other for other in grads) == 1:
            assert torch.equal(grad, wanted(before, at(scale_S, i, 1), float(at(bound_S, i, math.inf))))


KEPT = {0: [()], 1: [(0,)], 2: [(0,), (1,), (0, 1)], 3: [(0,), (0, 1), (0, 2), (1,), (2,)]}


@EVERY
@given(st.data())
def by_unit(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.one_of(st.none(), st.tuples(SHAPES, st.sampled_from([F32, BF16]))), max_size=4))
    blocks = [None if kind is None else numbers(data, *kind) for kind in kinds]
    kept = [(0,) if block is None else data.draw(st.sampled_from(KEPT[block.ndim])) for block in blocks]
    counts = [3 if block is None else count_of(block.shape, axes) for block, axes in zip(blocks, kept, strict=True)]
    for _ in range(2):
        given = blocks, list(kept), list(counts)
        if blocks and data.draw(st.integers(0, 2)) == 0:
            i = data.draw(st.integers(0, len(blocks) - 1))
            axes = st.lists(st.integers(-3, 4), max_size=4).map(tuple)
            given[1][i] = data.draw(st.one_of(st.just(kept[i]), axes))
            given[2][i] = data.draw(st.one_of(st.just(counts[i]), st.integers(-9, 50)))
            if data.draw(st.integers(0, 4)) == 0:
                del given[data.draw(st.integers(1, 2))][i]
        attempt(
            "unit_sums",
            blocks,
            lambda g=given: units.unit_sums(*g, torch.float64, CPU),
            lambda s, g=given: _units(g, s),
        )
        total = max(0, sum(given[2]))
        scale_U = vector(data, total, one=False)
        bound_U = vector(data, total, one=False) if data.draw(st.booleans()) else None
        if scale_U is not None:
            old = [None if not is_there(block) else block.clone() for block in blocks]
            attempt(
                "unit_apply_", blocks, lambda g=given, s=scale_U, b=bound_U: units.unit_apply_(*g, s, b),
                lambda _, g=given, s=scale_U, b=bound_U, o=old: _units_scaled(g, o, s, b),
            )  # fmt: skip
        present = [i for i, block in enumerate(blocks) if block is not None]
        if present:  # the counts stay, as of a parameter that was resized
            i = data.draw(st.sampled_from(present))
            blocks[i] = twisted(blocks[i], data.draw(st.sampled_from(WRONG)))


Given = tuple[list[Tensor | None], list[tuple[int, ...]], list[int]]


def _units(given: Given, found_U: Tensor) -> None:
    for block, axes, found in zip(*given[:2], found_U.split(given[2]), strict=True):
        want = torch.zeros(len(found)).double() if block is None or not block.numel() else sums(block, axes)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=0)


def _units_scaled(given: Given, old: list[Tensor | None], scale_U: Tensor, bound_U: Tensor | None) -> None:
    bounds = torch.full((len(scale_U),), math.inf) if bound_U is None else bound_U.float()
    parts = zip(*given[:2], old, scale_U.float().split(given[2]), bounds.split(given[2]), strict=True)
    for block, axes, before, scale, bound in parts:
        if block is not None and before is not None:
            shape = [n if axis in axes else 1 for axis, n in enumerate(block.shape)]
            limit = bound.view(shape)
            assert torch.equal(block, (before.float() * scale.view(shape)).clamp(-limit, limit).to(block.dtype))


@EVERY
@given(st.data())
def steps(data: st.DataObject) -> None:
    step.CHUNK = data.draw(st.sampled_from([8, 64, 5000, 1 << 16]))
    name = data.draw(st.sampled_from(sorted(MOMENTS)))
    moments = data.draw(st.sampled_from(MOMENTS[name]))
    kinds = data.draw(st.lists(st.tuples(SHAPES, st.sampled_from([F32, BF16])), min_size=1, max_size=3))
    count = len(kinds)
    columns = [[numbers(data, *kind) for kind in kinds] for _ in range(2)]
    for word in "abc":
        small = name == "rmsprop" and word == "b"  # the mean of the gradients: its square is below theirs
        made = [numbers(data, *kind) for kind in kinds]
        made = [tensor.mul_(0.1) if small else tensor.square_().add_(1) for tensor in made]
        columns.append(made if word in moments else [None] * count)
    for _ in range(2):
        length = data.draw(st.sampled_from([count] * 9 + [0, count + 1]))
        rule = Rule(
            name, 0.1, 0.01, data.draw(st.booleans()), data.draw(st.booleans()), 0.9, 0.1, 0.8, 0.2, 1e-3,
            data.draw(st.sampled_from([None, [(2.0, 0.5)] * count, [(2.0, 0.5)] * length])),
        )  # fmt: skip
        segments = st.lists(st.integers(0, count - 1 + (length != count)), min_size=length, max_size=length).map(tuple)
        places = Places(data.draw(segments), data.draw(segments))
        plan, after = (_plan(vector(data, count), vector(data, count)) for _ in range(2))
        memory = Memory(*[list(column) for column in columns])
        if data.draw(st.integers(0, 9)) == 0:
            memory[data.draw(st.integers(0, 4))].pop()
        every = [tensor for column in memory for tensor in column]
        old = Memory(*[[t.clone() if is_there(t) else t for t in column] for column in memory])
        attempt(
            "measure_update", every, lambda a=(rule, memory, places, plan): step.measure_update(*a),
            lambda s, a=(rule, old, places, plan): _sizes([row[-1] for row in stepped(*a, None)], *s, 1e-3),
        )  # fmt: skip
        attempt(
            "step_", every, lambda a=(rule, memory, places, plan, after): step.step_(*a),
            lambda _, m=memory, a=(rule, old, places, plan, after): _stepped(m, stepped(*a)),
        )  # fmt: skip
        column = columns[data.draw(st.integers(0, 4))]
        i = data.draw(st.integers(0, count - 1))
        if column[i] is not None:
            column[i] = twisted(column[i], data.draw(st.sampled_from(WRONG)))
        elif data.draw(st.booleans()):
            column[i] = numbers(data, *kinds[i])


def _plan(scale_S: Tensor | None, bound_S: Tensor | None) -> ClipPlan | None:
    return None if scale_S is None else ClipPlan(scale_S, bound_S)


def _clip(tensor: Tensor, plan: ClipPlan | None, place: int) -> Tensor:
    if plan is None:
        return tensor
    bound = float(at(plan.bound_S, place, math.inf))
    return (tensor * float(at(plan.scale_S, place, 1))).clamp(-bound, bound)


def stepped(
    rule: Rule, memory: Memory, places: Places, plan: ClipPlan | None, after: ClipPlan | None
) -> list[tuple[Tensor, ...]]:
    """Weight, gradient, moments and update of each parameter in float64: the equations of Rule."""
    found = []
    for i, row in enumerate(zip(*memory, strict=True)):
        w, raw, *kept = (torch.zeros(1).double() if tensor is None else tensor.double().view(-1) for tensor in row)
        a, b, c = kept
        term, root = (1.0, 1.0) if rule.terms is None else rule.terms[i]
        g = _clip(raw, plan, places.gradient[i]) * (-1 if rule.maximize else 1)
        g = g if rule.decoupled else g + rule.decay * w
        if rule.name == "adam":
            a, b = rule.past * a + rule.fresh * g, rule.past2 * b + rule.fresh2 * g * g
            c = torch.maximum(c, b)
            u = a * term / ((b if row[4] is None else c).sqrt() / root + rule.eps)
        elif rule.name == "rmsprop":
            a = rule.past2 * a + rule.fresh2 * g * g
            b = b + rule.fresh2 * (g - b)
            u = g / ((a if row[3] is None else a - b * b).sqrt() / root + rule.eps)
            c = rule.past * c + u
            u = u if row[4] is None else c
        else:
            a = rule.past * a + term * g
            u = g if row[2] is None else g + rule.past * a if rule.name == "nesterov" else a
        w = w * (1 - rule.lr * rule.decay if rule.decoupled else 1) - rule.lr * _clip(u, after, places.update[i])
        found.append((w, raw, a, b, c, u))
    return found


def _stepped(memory: Memory, want: list[tuple[Tensor, ...]]) -> None:
    for row, exact in zip(zip(*memory, strict=True), want, strict=True):
        for tensor, expected in zip(row, exact, strict=False):
            if tensor is not None and tensor.numel():
                unit = 2**-7 if tensor.dtype == BF16 else 1e-4
                torch.testing.assert_close(tensor.double().view(-1), expected, rtol=unit, atol=unit)
        assert row[1] is None or torch.equal(row[1].double().view(-1), exact[1])


def overrun() -> None:
    """Tell the library of one element too many."""
    from hf_gradclip.kernels.table import table_of

    grad = torch.ones(1000)
    table = table_of([[grad]], CPU, whole.CHUNK)  # the one that the call will find
    table.numel_S.add_(1)
    whole.statistics([grad], torch.float64, CPU, True)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    library.MODULE = "sanitized_kernels"
    torch.set_num_threads(1)
    assert choice.c_language().whole is whole
    assert library.library()._name.startswith(sys.argv[1])
    for operations in (wholes, by_unit, steps):
        operations()
    print(json.dumps(SEEN), flush=True)
    overrun()
    print("nobody watched")

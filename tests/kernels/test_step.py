"""The optimizer's step in every language against float64. For Triton's interpreter see test_whole.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hf_gradclip.kernels.operations import Language
from hf_gradclip.kernels.rule import ByAxes, Memory, Places, Rule
from hf_gradclip.types import ClipPlan
from tests.kernels.guards import Guards, Torch
from tests.kernels.languages import DTYPES, OTHER, WAYS, set_chunk
from tests.kernels.tensors import same_bits

SIZES = [1, 9, 300]
DECAY = 0.1
LR = 0.02
BETAS = (0.9, 0.99)
SCALE = torch.tensor([0.25, 1.0, 0.5], dtype=torch.float64)
BOUND = torch.tensor([math.inf, 0.7, 0.6], dtype=torch.float64)
TERMS = [(1 / (1 - 0.9**t), (1 - 0.99**t) ** 0.5) for t in (1, 2, 7)]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def rule(**other: object) -> Rule:
    numbers = {"name": "adam", "lr": LR, "decay": DECAY, "decoupled": True, "maximize": False}
    numbers |= {"past": BETAS[0], "fresh": 1 - BETAS[0], "past2": BETAS[1], "fresh2": 1 - BETAS[1], "eps": 1e-6}
    return Rule(**{**numbers, "terms": TERMS, **other})


def segments(dtype: torch.dtype, start: int, seed: int, sizes: Sequence[int] = SIZES) -> tuple[Tensor, list[Tensor]]:
    """Segments of one buffer that begins on 16 bytes, with a guard of one NaN before and after each."""
    buffer = torch.full((start + sum(sizes) + len(sizes) + 1,), math.nan, dtype=dtype)
    found, place = [], start + 1
    for i, size in enumerate(sizes):
        found.append(buffer[place : place + size])
        noise = torch.randn(size, generator=torch.Generator().manual_seed(100 * seed + i))
        found[-1].copy_(noise.square() + 0.1 if seed == 3 else noise)
        place += size + 1
    return buffer, found


def made(dtypes: tuple[torch.dtype, ...], starts: tuple[int, ...]) -> tuple[list[Tensor], Memory]:
    """The buffers of weights, gradients and two moments, and the segments."""
    buffers, columns = zip(
        *(segments(d, s, seed) for seed, (d, s) in enumerate(zip(dtypes, starts, strict=True))), strict=True
    )
    return list(buffers), Memory(*columns, [None] * len(SIZES))


def adamw(memory: Memory) -> tuple[list[Tensor], ...]:
    """Weights, moments and update of one step in float64, before it is clipped itself: from the equations."""
    weights, means, squares, updates = [], [], [], []
    for i, (w, g, m, v) in enumerate(zip(*memory[:4], strict=True)):
        g = (g.double() * SCALE[i]).clamp(-BOUND[i], BOUND[i])
        means.append(BETAS[0] * m.double() + (1 - BETAS[0]) * g)
        squares.append(BETAS[1] * v.double() + (1 - BETAS[1]) * g.square())
        updates.append(means[-1] * TERMS[i][0] / (squares[-1].sqrt() / TERMS[i][1] + 1e-6))
        weights.append(w.double() * (1 - LR * DECAY))
    return weights, means, squares, updates


def close(got: Sequence[Tensor | None], want: Sequence[Tensor]) -> None:
    """To rounding; to one unit in the last place for bfloat16."""
    for mine, exact in zip(got, want, strict=True):
        unit = {F64: 1e-12, F32: 1e-6, F16: 2**-10, BF16: 2**-7}[mine.dtype]
        torch.testing.assert_close(mine.double(), exact, rtol=unit, atol=unit / 8)


PLACES = Places((0, 1, 2), (2, 1, 0))
PLAN = ClipPlan(SCALE, BOUND)
AFTER = ClipPlan(torch.tensor([0.3, 1.0, 0.8], dtype=torch.float64), torch.tensor([0.4, 0.5, math.inf]))
CASES = [
    ((F32, F32, F32, F32), (3, 3, 3, 3)),
    ((F32, F32, F32, F32), (0, 1, 2, 0)),
    ((BF16, BF16, BF16, BF16), (7, 7, 7, 7)),
    ((BF16, BF16, BF16, BF16), (4, 7, 7, 1)),
    ((F16, F16, F16, F16), (2, 2, 2, 2)),
    ((BF16, F32, F32, F32), (4, 0, 0, 0)),
    ((F32, BF16, F32, BF16), (2, 6, 2, 6)),
    ((F32, F16, F32, F32), (0, 1, 0, 0)),
    ((F64, F64, F64, F64), (0, 1, 0, 1)),
    ((F64, F32, F32, F64), (0, 1, 0, 1)),
]


def taken(way: str, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Memory of these dtypes; C takes one at a time."""
    return set(dtypes) <= set(DTYPES[way.split()[0]]) and (len(set(dtypes)) == 1 or not way.startswith("C"))


EVERY = [(way, *case) for way in WAYS for case in CASES if taken(way, case[0])]


@pytest.mark.parametrize(("language", "dtypes", "starts"), EVERY, indirect=["language"])
class TestSteps:
    """Tensors that can be cut on 16 bytes together and tensors that cannot, of one dtype and of several."""

    def test_step(self, language, dtypes, starts, monkeypatch):
        """In several chunks."""
        set_chunk(monkeypatch, language.step, 128)
        buffers, memory = made(dtypes, starts)
        guards = [int(buffer.isnan().sum()) for buffer in buffers]
        grads = buffers[1].clone()
        weights, means, squares, updates = adamw(memory)
        language.step.step_(rule(), memory, PLACES, PLAN, AFTER)
        for i, place in enumerate(PLACES.update):
            limit = float(AFTER.bound_S[place])
            weights[i] -= LR * (updates[i] * AFTER.scale_S[place]).clamp(-limit, limit)
        loose = dtypes if F64 not in dtypes or set(dtypes) == {F64} else (F32,) * 4
        wanted = (weights, None, means, squares)
        for dtype, column, exact in zip(loose, memory, wanted, strict=False):
            if exact is not None:
                close([tensor.to(dtype) for tensor in column], exact)
        assert [int(buffer.isnan().sum()) for buffer in buffers] == guards
        assert same_bits(buffers[1], grads)

    def test_measure(self, language, dtypes, starts):
        buffers, memory = made(dtypes, starts)
        before = [buffer.clone() for buffer in buffers]
        *_, updates = adamw(memory)
        sumsq_S, max_S = language.step.measure_update(rule(), memory, PLACES, PLAN)
        assert sumsq_S.dtype == max_S.dtype == F64
        torch.testing.assert_close(sumsq_S, torch.stack([u.square().sum() for u in updates]), rtol=1e-5, atol=0)
        torch.testing.assert_close(max_S, torch.stack([u.abs().max() for u in updates]), rtol=1e-5, atol=0)
        assert all(map(same_bits, buffers, before))


@pytest.mark.parametrize(("language", "dtypes", "starts"), EVERY, indirect=["language"])
class TestSkip:
    """A flag on the device; the terms may be there too."""

    def test_nothing_is_written_or_what_is_written_without_it(self, language, dtypes, starts):
        buffers, memory = made(dtypes, starts)
        before = [buffer.clone() for buffer in buffers]
        away = {"terms": None, "inverse_P2": torch.tensor(TERMS, dtype=F64).reciprocal()}
        language.step.step_(rule(**away), memory, PLACES, PLAN, AFTER, None, torch.tensor(True))
        assert all(map(same_bits, buffers, before))
        language.step.step_(rule(**away), memory, PLACES, PLAN, AFTER, None, torch.tensor(False))
        others, memory = made(dtypes, starts)
        language.step.step_(rule(), memory, PLACES, PLAN, AFTER)
        assert all(map(same_bits, buffers, others))
        assert not same_bits(buffers[0], before[0])

    def test_not_where_everything_is_nan(self, language, dtypes, starts):
        """What is computed and not stored would leave a NaN."""
        buffers, memory = made(dtypes, starts)
        before = [buffer.clone() for buffer in buffers]
        bad = ClipPlan(torch.tensor(math.nan))
        language.step.step_(rule(), memory, PLACES, bad, bad, None, torch.tensor(True))
        assert all(map(same_bits, buffers, before))

    def test_terms_of_the_device_are_measured_with(self, language, dtypes, starts):
        _, memory = made(dtypes, starts)
        given = {"terms": TERMS}, {"terms": None, "inverse_P2": torch.tensor(TERMS, dtype=F64).reciprocal()}
        found = [language.step.measure_update(rule(**terms), memory, PLACES, PLAN) for terms in given]
        assert all(map(same_bits, *found))


def plain(grads: list[Tensor], weights: list[Tensor] | None = None) -> Memory:
    absent = [None] * len(grads)
    return Memory(weights or [torch.zeros_like(g) for g in grads], grads, absent, absent, absent)


def first(count: int) -> Places:
    """The first segment of either plan for all."""
    return Places((0,) * count, (0,) * count)


SGD = rule(terms=None, name="sgd")


class TestMeasure:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, language, bad):
        grads = [torch.ones(30), torch.ones(3)]
        grads[0][7] = bad
        sumsq_S, max_S = language.step.measure_update(SGD, plain(grads), first(2), None)
        assert sumsq_S[0].isnan() if math.isnan(bad) else sumsq_S[0].isposinf()
        assert max_S[0].isposinf()
        assert sumsq_S[1].item() == pytest.approx(3, rel=1e-15 if language.name != "torch" else 1e-12)
        assert max_S[1] == 1

    @pytest.mark.parametrize("place", [0, 1500, 40_000])
    def test_the_largest_element_wherever_it_is(self, language, place, monkeypatch):
        set_chunk(monkeypatch, language.step, 1 << 14)
        grad = torch.randn(40_001, generator=torch.Generator().manual_seed(0))
        grad[place] = -9.0
        sumsq_S, max_S = language.step.measure_update(SGD, plain([grad]), first(1), None)
        torch.testing.assert_close(sumsq_S[0], grad.double().square().sum(), rtol=1e-6, atol=0)
        assert max_S.tolist() == [9.0]

    def test_squares_neither_overflow_nor_vanish(self, language):
        grads = [torch.full((20,), 1e30), torch.full((20,), 1e-30), torch.zeros(4), torch.zeros(0)]
        sumsq_S, max_S = language.step.measure_update(SGD, plain(grads), first(4), None)
        want = torch.stack([g.double().square().sum() for g in grads])
        torch.testing.assert_close(sumsq_S, want, rtol=1e-6, atol=0)
        assert max_S.tolist() == [float(grads[0][0]), float(grads[1][0]), 0, 0]


KINDS = {
    "C": [(F32,) * 5, (BF16,) * 5],
    "torch": [(F32,) * 5, (BF16,) * 5, (BF16, BF16, F32, F32, F32), (F64,) * 5],
    "Triton": [(F32,) * 5, (BF16,) * 5, (BF16, BF16, F32, F32, F32)],
}
"""Of weight, gradient and moments."""


@pytest.mark.parametrize(("chunk", "offset"), [*((1 << 12, offset) for offset in range(10)), (1 << 14, 5)])
class TestGuards:
    """Around every tensor, of sizes about a word, a step and a chunk; the last chunk is the one in use.

    From size to size dtypes change, and whether the tensors begin at one place in a word or each at another, where they
    do not move in words.
    """

    def made(self, kinds: list[tuple[torch.dtype, ...]], guards: Guards, chunk: int, offset: int) -> Memory:
        rows = []
        for i, size in enumerate(sorted({1, 7, 8, 9, 4095, 4097, chunk - 1, chunk + 3})):
            dtypes, apart = kinds[(i + offset) % len(kinds)], (i + offset) % 2
            noise = torch.rand((len(dtypes), size), generator=torch.Generator().manual_seed(i)) + 0.1
            rows.append([guards.place(noise[j].to(dtype), offset + j * apart) for j, dtype in enumerate(dtypes)])
        return Memory(*map(list, zip(*rows, strict=True)))

    def arguments(self, memory: Memory) -> tuple[Rule, Memory, Places, ClipPlan]:
        """Of a step that would change 7 wherever it stood."""
        count = len(memory.weights)
        return rule(terms=[TERMS[1]] * count, lr=0.5), memory, first(count), ClipPlan(torch.tensor(0.5))

    def test_nothing_else_is_written(self, language, chunk, offset, monkeypatch):
        set_chunk(monkeypatch, language.step, chunk)
        guards = Guards(7.0)
        memory = self.made(KINDS[language.name], guards, chunk, offset)
        before = [tensor.clone() for tensor in memory.weights]
        grads = [tensor.clone() for tensor in memory.grads]
        language.step.step_(*self.arguments(memory), None)
        guards.assert_kept()
        for weight, old in zip(memory.weights, before, strict=True):
            assert (weight < old).all()
        assert all(map(torch.equal, memory.grads, grads))

    def test_nothing_else_is_counted(self, language, chunk, offset, monkeypatch):
        """Nor written beside what a kernel makes: its results, and what they are added up from."""
        set_chunk(monkeypatch, language.step, chunk)
        guards = Guards(math.nan)
        memory = self.made(KINDS[language.name], guards, chunk, offset)
        tensors = guards.placed
        if language.name != "torch":
            monkeypatch.setattr(language.step, "torch", Torch(guards))
        found = language.step.measure_update(*self.arguments(memory))
        assert all(vector_S.isfinite().all() and (vector_S > 0).all() for vector_S in found)
        assert guards.placed == tensors + {"C": 3, "torch": 0, "Triton": 4}[language.name]
        guards.assert_kept()


class TestNumbers:
    def test_terms_that_all_have_are_not_uploaded(self, language, monkeypatch):
        """Two arguments of a kernel in Triton, or a vector where some parameters are behind."""
        seen = []
        if language.name == "Triton":
            upload = language.step.upload
            monkeypatch.setattr(language.step, "upload", lambda *given: (seen.append(given[0]), upload(*given))[1])
        found = []
        for terms in ([TERMS[1]] * 3, [TERMS[1], TERMS[1], TERMS[0]]):
            _, memory = made((F32,) * 4, (0, 0, 0, 0))
            language.step.step_(rule(terms=terms), memory, PLACES, PLAN, AFTER)
            found.append(memory.weights)
        assert [len(numbers) for numbers in seen] == ([6] if language.name == "Triton" else [])
        assert [*map(same_bits, *found)] == [True, True, False]

    def test_one_number_is_that_number_for_each(self, language):
        """A vector whose elements are one memory, a number with no axis, and a vector."""
        found = []
        for scale in (torch.full((3,), 0.5), torch.tensor([0.5]).expand(3), torch.tensor(0.5, dtype=F64)):
            for bound in (torch.full((3,), 0.3), torch.tensor(0.3)):
                _, memory = made((F32,) * 4, (0, 0, 0, 0))
                plan = ClipPlan(scale, bound)
                sumsq_S, _ = language.step.measure_update(rule(), memory, PLACES, plan)
                language.step.step_(rule(), memory, PLACES, plan, plan)
                found.append((*memory.weights, *memory.second, sumsq_S))
        for other in found[1:]:
            assert all(map(same_bits, other, found[0]))

    def test_one_number_for_all_sign_and_coupled_decay(self, language):
        other = OTHER[language.name]
        weights = [torch.full((5,), 2.0), torch.full((2,), 4.0).to(other)]
        memory = plain([torch.ones(5), torch.ones(2, dtype=other)], weights)
        numbers = rule(terms=None, name="sgd", lr=1.0, decay=0.25, decoupled=False, maximize=True)
        language.step.step_(numbers, memory, first(2), ClipPlan(torch.tensor(0.5)), None)
        assert memory.weights[0].tolist() == [2.0 + 0.5 - 0.5] * 5
        assert memory.weights[1].tolist() == [4.0 + 0.5 - 1.0] * 2

    def test_a_largest_moment_that_is_nan_stays(self, language):
        ones = [torch.ones(3)]
        largest = torch.tensor([math.nan, 5.0, 0.0])
        memory = Memory([torch.ones(3)], ones, [torch.zeros(3)], [torch.zeros(3)], [largest])
        language.step.step_(rule(terms=TERMS[:1]), memory, first(1), None, None)
        assert largest[0].isnan()
        assert largest[1] == 5
        assert largest[2].item() == pytest.approx(0.01)

    def test_a_moment_that_only_some_parameters_keep(self, language):
        """SGD at its first step beside later ones, or amsgrad."""
        mean = torch.tensor([2.0, 2.0])
        memory = Memory([torch.zeros(2), torch.zeros(2)], [torch.ones(2)] * 2, [None, mean], [None] * 2, [None] * 2)
        numbers = rule(terms=[(1.0, 1.0), (0.5, 1.0)], name="sgd", lr=1.0, decay=0.0, past=0.5)
        language.step.step_(numbers, memory, first(2), None, None)
        assert [weight.tolist() for weight in memory.weights] == [[-1.0] * 2, [-1.5] * 2]
        assert mean.tolist() == [1.5, 1.5]

    def test_units_are_scaled_apart(self, language):
        """By plain torch; the others do not take a plan by unit, and do not write."""
        weight, grad = torch.zeros(2, 3), torch.ones(2, 3)
        memory, numbers = plain([grad], [weight]), rule(terms=None, name="sgd", lr=1.0, decay=0.0)
        places = Places((1,), (0,), (ByAxes((0,), torch.tensor([1, 2])),))
        plan = ClipPlan(torch.tensor([9.0, 0.5, 0.25]), torch.tensor([9.0, math.inf, 0.2]))
        assert language.step.serves(memory, places) == (language.name == "torch")
        if language.name == "torch":
            language.step.step_(numbers, memory, places, plan, None)
            torch.testing.assert_close(weight, torch.tensor([[-0.5] * 3, [-0.2] * 3]))
        else:
            with pytest.raises(ValueError, match="only plain torch takes them"):
                language.step.step_(numbers, memory, places, plan, None)
            assert not weight.any()
        assert torch.equal(grad, torch.ones(2, 3))


def serves(language: Language, grad: Tensor, weight: Tensor | None = None) -> bool:
    return language.step.serves(plain([grad], None if weight is None else [weight]), first(1))


class TestServes:
    """Plain torch takes any memory."""

    def test_what_fits(self, language):
        grad = torch.ones(4, 3)
        assert serves(language, grad)
        assert serves(language, grad.bfloat16(), grad) == (language.name != "C")
        assert serves(language, grad.t(), grad.clone().t())

    @pytest.mark.parametrize(
        ("grad", "weight"),
        [
            (torch.ones(4, 3).double(), torch.ones(4, 3)),
            (torch.ones(4, 3), torch.ones(3, 4).t()),
            (torch.ones(4, 6)[:, ::2], torch.ones(4, 6)[:, ::2]),
            (torch.ones(4, 3, device="meta"), torch.ones(4, 3)),
            (torch.ones(1, 3).expand(4, 3), torch.ones(4, 3)),
        ],
    )
    def test_what_does_not(self, language, grad, weight):
        assert serves(language, grad, weight) == (language.name == "torch")

    def test_memory_that_is_not_what_it_stands_for(self, language):
        weight, memory = torch.ones(4), torch.ones(8)
        gone, behind = memory[:4], memory[4:]  # the second has an address that is not 0
        memory.untyped_storage().resize_(0)
        with torch.inference_mode():
            frozen = torch.ones(4)
        wrapped = torch.ones(4).as_subclass(type("Wrapped", (Tensor,), {}))
        for other in (torch._neg_view(torch.ones(4)), wrapped, gone, behind, frozen):
            assert serves(language, other, weight) == (language.name == "torch")
            assert serves(language, weight, other) == (language.name == "torch")

"""The fused step against float64: in C here, in Triton in the process that `test_under_the_interpreter` starts.

How, and the faults of the interpreter, are in test_triton.py.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_gradclip.kernels.rule import Memory, Rule
from hf_gradclip.types import ClipPlan
from tests.kernels import tensors
from tests.kernels.guards import Guards, Torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from hf_gradclip.kernels import step_triton as step
else:
    from hf_gradclip.kernels import native
    from hf_gradclip.kernels import native_step as step

SIZES = [1, 9, 300]
DECAY = 0.1
LR = 0.02
BETAS = (0.9, 0.99)
SCALE = torch.tensor([0.25, 1.0, 0.5], dtype=torch.float64)
BOUND = torch.tensor([math.inf, 0.7, 0.6], dtype=torch.float64)
TERMS = [(1 / (1 - 0.9**t), (1 - 0.99**t) ** 0.5) for t in (1, 2, 7)]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    if not INTERPRETED:
        tensors.library()


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_under_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.fail("triton is missing, and its kernels untested: pip install -c constraints.txt -e '.[test]'")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


def rule(**other: object) -> Rule:
    numbers = {"name": "adam", "lr": LR, "decay": DECAY, "decoupled": True, "maximize": False, "done": lambda: None}
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


def close(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """To rounding; to one unit in the last place for bfloat16."""
    for mine, exact in zip(got, want, strict=True):
        unit = {F32: 1e-6, F16: 2**-10, BF16: 2**-7}[mine.dtype]
        torch.testing.assert_close(mine.double(), exact, rtol=unit, atol=unit / 8)


PLACES = ((0, 2), (1, 1), (2, 0))
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
]
if not INTERPRETED:
    CASES = [case for case in CASES if len(set(case[0])) == 1 and F16 not in case[0]]


@pytest.mark.parametrize(("dtypes", "starts"), CASES)
class TestSteps:
    """Tensors that can be cut on 16 bytes together and tensors that cannot, of one dtype and of several."""

    def test_step(self, dtypes, starts, monkeypatch):
        """In several chunks."""
        monkeypatch.setattr(step, "CHUNK", 128)
        buffers, memory = made(dtypes, starts)
        guards = [int(buffer.isnan().sum()) for buffer in buffers]
        grads = buffers[1].clone()
        weights, means, squares, updates = adamw(memory)
        step.step_(rule(), memory, PLACES, ClipPlan(SCALE, BOUND), AFTER)
        for i, (_, place) in enumerate(PLACES):
            limit = float(AFTER.bound_S[place])
            weights[i] -= LR * (updates[i] * AFTER.scale_S[place]).clamp(-limit, limit)
        close(memory.weights, weights)
        close(memory.first, means)
        close(memory.second, squares)
        assert [int(buffer.isnan().sum()) for buffer in buffers] == guards
        assert torch.equal(buffers[1].view(torch.uint8), grads.view(torch.uint8))

    def test_measure(self, dtypes, starts):
        buffers, memory = made(dtypes, starts)
        before = [buffer.clone() for buffer in buffers]
        *_, updates = adamw(memory)
        sumsq_S, max_S = step.measure(rule(), memory, PLACES, ClipPlan(SCALE, BOUND))
        torch.testing.assert_close(sumsq_S, torch.stack([u.square().sum() for u in updates]), rtol=1e-5, atol=0)
        torch.testing.assert_close(max_S, torch.stack([u.abs().max() for u in updates]), rtol=1e-5, atol=0)
        for buffer, old in zip(buffers, before, strict=True):
            assert torch.equal(buffer.view(torch.uint8), old.view(torch.uint8))


def plain(grads: list[Tensor], weights: list[Tensor] | None = None) -> Memory:
    absent = [None] * len(grads)
    return Memory(weights or [torch.zeros_like(g) for g in grads], grads, absent, absent, absent)


class TestMeasure:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, bad):
        grads = [torch.ones(30), torch.ones(3)]
        grads[0][7] = bad
        sumsq_S, max_S = step.measure(rule(terms=None, name="sgd"), plain(grads), ((0, 0),) * 2, None)
        assert sumsq_S[0].isnan() if math.isnan(bad) else sumsq_S[0].isposinf()
        assert max_S[0].isposinf()
        assert (sumsq_S[1], max_S[1]) == (3, 1)

    @pytest.mark.parametrize("place", [0, 1500, 40_000])
    def test_the_largest_element_wherever_it_is(self, place, monkeypatch):
        monkeypatch.setattr(step, "CHUNK", 1 << 14)
        grad = torch.randn(40_001, generator=torch.Generator().manual_seed(0))
        grad[place] = -9.0
        sumsq_S, max_S = step.measure(rule(terms=None, name="sgd"), plain([grad]), ((0, 0),), None)
        torch.testing.assert_close(sumsq_S[0], grad.double().square().sum(), rtol=1e-6, atol=0)
        assert max_S.tolist() == [9.0]

    def test_squares_neither_overflow_nor_vanish(self):
        grads = [torch.full((20,), 1e30), torch.full((20,), 1e-30), torch.zeros(4), torch.zeros(0)]
        sumsq_S, max_S = step.measure(rule(terms=None, name="sgd"), plain(grads), ((0, 0),) * 4, None)
        want = torch.stack([g.double().square().sum() for g in grads])
        torch.testing.assert_close(sumsq_S, want, rtol=1e-6, atol=0)
        assert max_S.tolist() == [float(grads[0][0]), float(grads[1][0]), 0, 0]


KINDS = [(F32,) * 5, (BF16,) * 5, *([(BF16, BF16, F32, F32, F32)] if INTERPRETED else [])]
"""Of weight, gradient and moments."""
OTHER = F16 if INTERPRETED else BF16
"""A dtype beside float32."""


@pytest.mark.parametrize(("chunk", "offset"), [*((1 << 12, offset) for offset in range(10)), (1 << 14, 5)])
class TestGuards:
    """Around every tensor, of sizes about a word, a step and a chunk; the last chunk is the one in use.

    From size to size dtypes change, and whether the tensors begin at one place in a word or each at another, where they
    do not move in words.
    """

    def made(self, guards: Guards, chunk: int, offset: int) -> Memory:
        rows = []
        for i, size in enumerate(sorted({1, 7, 8, 9, 4095, 4097, chunk - 1, chunk + 3})):
            dtypes, apart = KINDS[(i + offset) % len(KINDS)], (i + offset) % 2
            noise = torch.rand((len(dtypes), size), generator=torch.Generator().manual_seed(i)) + 0.1
            rows.append([guards.place(noise[j].to(dtype), offset + j * apart) for j, dtype in enumerate(dtypes)])
        return Memory(*map(list, zip(*rows, strict=True)))

    def arguments(self, memory: Memory) -> tuple[Rule, Memory, tuple[tuple[int, int], ...], ClipPlan]:
        """Of a step that would change 7 wherever it stood."""
        count = len(memory.weights)
        return rule(terms=[TERMS[1]] * count, lr=0.5), memory, ((0, 0),) * count, ClipPlan(torch.tensor(0.5))

    def test_nothing_else_is_written(self, chunk, offset, monkeypatch):
        monkeypatch.setattr(step, "CHUNK", chunk)
        guards = Guards(7.0)
        memory = self.made(guards, chunk, offset)
        before = [tensor.clone() for tensor in memory.weights]
        step.step_(*self.arguments(memory), None)
        guards.assert_kept()
        for weight, old in zip(memory.weights, before, strict=True):
            assert (weight < old).all()

    def test_nothing_else_is_counted(self, chunk, offset, monkeypatch):
        """The results too, and what they are added up from, lie between guards."""
        monkeypatch.setattr(step, "CHUNK", chunk)
        guards = Guards(math.nan)
        memory = self.made(guards, chunk, offset)
        tensors = guards.placed
        monkeypatch.setattr(step, "torch", Torch(guards))
        found = step.measure(*self.arguments(memory))
        assert all(vector_S.isfinite().all() and (vector_S > 0).all() for vector_S in found)
        assert guards.placed == tensors + 4
        guards.assert_kept()


class TestNumbers:
    def test_one_number_for_all_sign_and_coupled_decay(self):
        memory = plain(
            [torch.ones(5), torch.ones(2, dtype=OTHER)], [torch.full((5,), 2.0), torch.full((2,), 4.0).to(OTHER)]
        )
        numbers = rule(terms=None, name="sgd", lr=1.0, decay=0.25, decoupled=False, maximize=True)
        step.step_(numbers, memory, ((0, 0),) * 2, ClipPlan(torch.tensor(0.5)), None)
        assert memory.weights[0].tolist() == [2.0 + 0.5 - 0.5] * 5
        assert memory.weights[1].tolist() == [4.0 + 0.5 - 1.0] * 2

    def test_a_largest_moment_that_is_nan_stays(self):
        ones = [torch.ones(3)]
        largest = torch.tensor([math.nan, 5.0, 0.0])
        memory = Memory([torch.ones(3)], ones, [torch.zeros(3)], [torch.zeros(3)], [largest])
        step.step_(rule(terms=TERMS[:1]), memory, ((0, 0),), None, None)
        assert largest[0].isnan()
        assert largest[1] == 5
        assert largest[2].item() == pytest.approx(0.01)


class TestServes:
    def test_what_fits(self):
        grad = torch.ones(4, 3)
        assert step.serves(plain([grad]))
        assert step.serves(plain([grad.bfloat16()], [grad])) == INTERPRETED
        assert step.serves(plain([grad.t()], [grad.clone().t()]))

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
    def test_what_does_not(self, grad, weight):
        assert not step.serves(plain([grad], [weight]))

    def test_memory_that_is_not_what_it_stands_for(self):
        weight, gone = torch.ones(4), torch.ones(4)
        gone.untyped_storage().resize_(0)
        with torch.inference_mode():
            frozen = torch.ones(4)
        wrapped = torch.ones(4).as_subclass(type("Wrapped", (Tensor,), {}))
        for other in (torch._neg_view(torch.ones(4)), wrapped, gone, frozen):
            assert not step.serves(plain([other], [weight]))
            assert not step.serves(plain([weight], [other]))


@pytest.mark.skipif(INTERPRETED, reason="a GPU has no threads to choose")
class TestThreads:
    @pytest.mark.parametrize("dtype", [F32, BF16])
    def test_any_number_gives_the_same_bits(self, dtype, monkeypatch):
        monkeypatch.setattr(native, "SHARE", 1)
        monkeypatch.setattr(step, "CHUNK", 1000)
        before, found = torch.get_num_threads(), []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            columns = [segments(dtype, 1, seed, [7, 9001, 2500])[1] for seed in range(4)]
            memory = Memory(*columns, [None] * 3)
            found.append([*step.measure(rule(), memory, PLACES, ClipPlan(SCALE, BOUND))])
            step.step_(rule(), memory, PLACES, ClipPlan(SCALE, BOUND), AFTER)
            found[-1] += [*memory.weights, *memory.first, *memory.second]
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))

"""The quotient of Adam and RMSprop in Triton against float64, where the fast instructions are as wrong as they may be.

The interpreter has numpy's root and division, and a fused multiply-add that rounds twice. Here it is given what PTX
documents: roots that are off by 2^-23 and 2^-22.9, take subnormal numbers for 0, a division that is off by two units,
and a multiply-add that rounds once. Another error of each, at random, is what a GPU may have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_gradclip.kernels.operations import Step
from hf_gradclip.kernels.rule import Memory, Places, Rule
from tests.kernels.languages import interpreted, language

SIZE = 1 << 16
TINY = 2.0**-126
TERMS = [(10.0, 0.0316), (1.0, 1.0), (1.7, 0.3)]


@pytest.fixture
def exact() -> Iterator[Step]:
    found = language("Triton")
    with interpreted():
        yield found.step


@pytest.fixture
def fast(exact: Step, monkeypatch: pytest.MonkeyPatch) -> Step:
    """The step with fast instructions at the bounds of PTX's documents."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    draw = np.random.default_rng(0)

    def off(values: np.ndarray, by: float) -> np.ndarray:
        return (values * (1 + by * draw.choice([-1.0, 1.0, 0.3], values.shape))).astype(np.float32)

    def root(self: object, x: TensorHandle) -> TensorHandle:
        flushed = np.where(np.abs(x.data) < TINY, 0, x.data).astype(np.float64)
        return TensorHandle(off(np.sqrt(flushed), 2**-23), x.dtype.scalar)

    def inverse_root(self: object, x: TensorHandle) -> TensorHandle:
        flushed = np.where(np.abs(x.data) < TINY, 0, x.data).astype(np.float64)
        return TensorHandle(off(1 / np.sqrt(flushed), 2**-22.9), x.dtype.scalar)

    def quotient(self: object, x: TensorHandle, y: TensorHandle) -> TensorHandle:
        return TensorHandle(off(np.float64(x.data) / y.data, 2**-22), x.dtype.scalar)

    def fma(self: object, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        return TensorHandle((np.float64(x.data) * y.data + z.data).astype(np.float32), z.dtype.scalar)

    for name, made in {"sqrt": root, "rsqrt": inverse_root, "fdiv": quotient, "fma": fma}.items():
        assert hasattr(InterpreterBuilder, f"create_{name}")
        monkeypatch.setattr(InterpreterBuilder, f"create_{name}", made)
    return exact


def updates(step: Step, a: Tensor, square: Tensor, eps: float, term: tuple[float, float]) -> Tensor:
    """The update of Adam on these very moments: with a learning rate of 1 it is what a weight of 0 loses.

    Beside a parameter with other terms, so that eps comes in a vector: the interpreter widens a subnormal argument.
    """
    weights, terms = [torch.zeros_like(a), torch.zeros_like(a)], [term, (3.0, 0.5)]
    memory = Memory(
        weights, [torch.zeros_like(a)] * 2, [a.clone(), a.clone()], [square.clone(), a.square()], [None] * 2
    )
    rule = Rule("adam", 1.0, 0.0, True, False, past=1.0, fresh=0.0, past2=1.0, fresh2=0.0, eps=eps, terms=terms)
    with np.errstate(all="ignore"):
        step.step_(rule, memory, Places((0, 0), (0, 0)), None, None)
    return -weights[0]


def wanted(a: Tensor, square: Tensor, eps: float, term: tuple[float, float]) -> Tensor:
    """The same in float64 from the numbers that a kernel is given in float32, rounded once."""
    per_root, small = np.float32(1 / (term[0] * term[1])), np.float32(eps / term[0])
    return (a.double() / (square.double().sqrt() * float(per_root) + float(small))).float()


def apart(got: Tensor, want: Tensor) -> int:
    """The most that two numbers lie apart, in units of the last place."""
    assert torch.equal(got.sign(), want.sign())
    return int((got.abs().view(torch.int32).long() - want.abs().view(torch.int32).long()).abs().max())


def spread(seed: int, lowest: float, highest: float) -> Tensor:
    """Numbers of all sizes between two powers of 2, every binade as often as another."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(SIZE, generator=generator, dtype=torch.float64) * (highest - lowest) + lowest
    return exponents.exp2().float()


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("eps", [1.0, 1e-3, 1e-8, 1e-12, 0.0])
def test_within_one_unit_in_the_last_place(fast, eps, term):
    square, near = spread(1, -90, 90), spread(2, -12, 12)
    square[: SIZE // 2] = (near * max(eps, 1e-12)).double().square().float()[: SIZE // 2]  # root and eps of one size
    square[: 1000 if eps else 0] = 0
    a = spread(3, -20, 20) * torch.where(torch.arange(SIZE) % 2 == 0, 1, -1)
    got, want = updates(fast, a, square, eps, term), wanted(a, square, eps, term)
    assert apart(got, want) <= 1
    assert (got != want).float().mean() < 0.5


@pytest.mark.parametrize("eps", [1e-8, 0.0, 1e-40])
def test_small_numbers_are_not_lost(fast, eps):
    """Subnormal ones, too: a second moment of 1e-40 is a root of 1e-20."""
    square, a = spread(1, -148, -90), spread(2, -120, -20)
    got, want = updates(fast, a, square, eps, (1.0, 1.0)), wanted(a, square, eps, (1.0, 1.0))
    assert apart(got, want) <= 8


INF, NAN = math.inf, math.nan
SPECIAL = [
    (1.0, 0.0, 0.0, INF), (-1.0, 0.0, 0.0, -INF), (0.0, 0.0, 0.0, NAN), (0.0, 0.0, 1e-8, 0.0), (2.0, 0.0, 0.5, 4.0),
    (1.0, INF, 1e-8, 0.0), (1.0, INF, 0.0, 0.0), (INF, 1.0, 0.0, INF), (-INF, 1.0, 1e-8, -INF), (INF, INF, 1e-8, NAN),
    (NAN, 1.0, 1e-8, NAN), (1.0, NAN, 1e-8, NAN), (1.0, NAN, 0.0, NAN), (1.0, -1.0, 1e-8, NAN), (1.0, -1.0, 0.0, NAN),
    (0.0, 1.0, 0.0, 0.0), (3e38, 1e-30, 1e-8, INF), (1e-30, 0.0, 1e-40, 1e10), (0.0, 0.0, 1e-40, 0.0),
    (3e38, 3e38, 0.0, 3e38 / math.sqrt(3e38)),
]  # fmt: skip
"""First and second moment and eps, and the update."""


@pytest.mark.parametrize("step", ["fast", "exact"])
@pytest.mark.parametrize(("a", "square", "eps", "want"), SPECIAL)
def test_zeros_infinities_and_nan(step, a, square, eps, want, request):
    got = updates(request.getfixturevalue(step), torch.full((3,), a), torch.full((3,), square), eps, (1.0, 1.0))
    torch.testing.assert_close(got, torch.full((3,), want), rtol=1e-4, atol=0, equal_nan=True)


def test_no_weight_moves_without_a_learning_rate(fast):
    memory = Memory([torch.ones(3)], [torch.tensor([NAN, INF, 1.0])], [torch.zeros(3)], [torch.zeros(3)], [None])
    rule = Rule("adam", 0.0, 0.1, True, False, past=0.9, fresh=0.1, past2=0.99, fresh2=0.01, eps=0.0)
    with np.errstate(all="ignore"):
        fast.step_(rule, memory, Places((0,), (0,)), None, None)
    assert memory.weights[0].tolist() == [1.0] * 3

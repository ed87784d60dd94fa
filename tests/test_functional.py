"""`clip_grad_norm_` beside `torch.nn.utils.clip_grad_norm_`: the same norm, the same gradients, the same warning."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from hf_gradclip import clip_grad_norm_

ORDERS = [1, 2, 2.0, 3, math.inf, "inf"]
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make(*dtypes: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Parameters with gradients of several shapes, the last one without a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (11,), (), (2, 3, 4)]
    parameters = []
    for i, shape in enumerate(shapes):
        parameter = torch.zeros(shape, dtype=dtypes[i % len(dtypes)], requires_grad=True)
        parameter.grad = (torch.randn(shape, generator=generator) * scale).to(parameter.dtype)
        parameters.append(parameter)
    return [*parameters, torch.zeros(3, requires_grad=True)]


def same(ours: list[Tensor], theirs: list[Tensor], rounding: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        if b.grad is None:
            assert a.grad is None
        else:
            assert a.grad.dtype == b.grad.dtype
            torch.testing.assert_close(a.grad, b.grad, rtol=rounding, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 3.0, 1e6, math.inf])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_like_torch(dtype, order, max_norm):
    ours, theirs = make(dtype), make(dtype)
    got = clip_grad_norm_(ours, max_norm, order)
    want = torch.nn.utils.clip_grad_norm_(theirs, max_norm, order)
    assert got.shape == ()
    assert got.item() == pytest.approx(want.item(), rel=ROUNDING[dtype])
    same(ours, theirs, ROUNDING[dtype])


def test_some_of_these_are_clipped_and_some_not():
    before = [p.grad.clone() for p in make(torch.float32)[:-1]]
    for max_norm, changed in ((3.0, True), (1e6, False)):
        ours = make(torch.float32)
        clip_grad_norm_(ours, max_norm)
        assert all(torch.equal(p.grad, g) != changed for p, g in zip(ours[:-1], before, strict=True))


@pytest.mark.parametrize("order", [2, math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_of_16_bit_gradients_is_that_of_their_float32_copies(dtype, order):
    """torch rounds it to 16 bits."""
    ours, theirs = make(dtype), make(dtype)
    for parameter in theirs[:-1]:
        copy = parameter.grad.float()
        parameter.grad = None
        parameter.data = parameter.data.float()
        parameter.grad = copy
    got = clip_grad_norm_(ours, 1.0, order)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, 1.0, order).item(), rel=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach(order, foreach):
    ours, theirs = make(torch.float32), make(torch.float32)
    got = clip_grad_norm_(ours, 0.5, order, foreach=foreach)
    want = torch.nn.utils.clip_grad_norm_(theirs, 0.5, order, foreach=foreach)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    same(ours, theirs, 1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_mixed_dtypes(order):
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    ours, theirs = make(*dtypes), make(*dtypes)
    got = clip_grad_norm_(ours, 0.5, order)
    want = torch.nn.utils.clip_grad_norm_(theirs, 0.5, order)
    assert got.dtype == want.dtype == torch.float64
    assert got.item() == pytest.approx(want.item(), rel=2e-2)
    same(ours, theirs, 2e-2)


@pytest.mark.parametrize("order", ORDERS)
def test_one_tensor(order):
    ours, theirs = make(torch.float32)[0], make(torch.float32)[0]
    got, want = clip_grad_norm_(ours, 0.5, order), torch.nn.utils.clip_grad_norm_(theirs, 0.5, order)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    same([ours], [theirs], 1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_generator(order):
    ours, theirs = make(torch.float32), make(torch.float32)
    got = clip_grad_norm_((p for p in ours), 0.5, order)
    want = torch.nn.utils.clip_grad_norm_((p for p in theirs), 0.5, order)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    same(ours, theirs, 1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_an_empty_generator_warns_once_with_torchs_words(order):
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        assert clip_grad_norm_((p for p in ()), 1.0, order).item() == 0
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        torch.nn.utils.clip_grad_norm_((p for p in ()), 1.0, order)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
    assert [w.filename for w in ours] == [__file__]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("parameters", [[], [torch.zeros(3, requires_grad=True)]], ids=["empty", "no gradient"])
def test_nothing_to_clip(parameters, order):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, want = clip_grad_norm_(parameters, 1.0, order), torch.nn.utils.clip_grad_norm_(parameters, 1.0, order)
    assert torch.equal(got, want)
    assert got.dtype == want.dtype


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
class TestNonFinite:
    def broken(self, bad: float) -> list[Tensor]:
        parameters = make(torch.float32)
        parameters[1].grad[4] = bad
        return parameters

    def test_same_norm_and_same_gradients_as_torch(self, bad, order):
        ours, theirs = self.broken(bad), self.broken(bad)
        got, want = clip_grad_norm_(ours, 1.0, order), torch.nn.utils.clip_grad_norm_(theirs, 1.0, order)
        torch.testing.assert_close(got, want, equal_nan=True)
        same(ours, theirs, 1e-6)

    def test_error_if_nonfinite(self, bad, order):
        parameters = self.broken(bad)
        before = [p.grad.clone() for p in parameters[:-1]]
        with pytest.raises(RuntimeError) as theirs:
            torch.nn.utils.clip_grad_norm_(self.broken(bad), 1.0, order, error_if_nonfinite=True)
        with pytest.raises(RuntimeError) as ours:
            clip_grad_norm_(parameters, 1.0, order, error_if_nonfinite=True)
        words = str(theirs.value).partition(", so it cannot be clipped")[0]
        assert str(ours.value).startswith(f"{words}, so it cannot be clipped"), "programs look for torch's words"
        for parameter, grad in zip(parameters[:-1], before, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0, equal_nan=True)

    def test_error_if_nonfinite_is_quiet_on_finite_gradients(self, bad, order):
        clip_grad_norm_(make(torch.float32), 1.0, order, error_if_nonfinite=True)


def test_a_model_in_the_place_of_its_parameters() -> None:
    with pytest.raises(TypeError, match=r"clip_grad_norm_\(Linear, \.\.\.\): .*Pass model.parameters"):
        clip_grad_norm_(torch.nn.Linear(2, 2), 1.0)


def test_a_parameter_list_is_a_list_of_parameters() -> None:
    listed = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(3))])
    listed[0].grad = torch.ones(3)
    assert float(clip_grad_norm_(listed, 1.0)) == pytest.approx(3**0.5)


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_complex_gradients(order) -> None:
    """Of 3 + 4j the largest absolute element is 5."""
    ours, theirs = (nn.Parameter(torch.zeros(2, dtype=torch.complex64)) for _ in range(2))
    for parameter in (ours, theirs):
        parameter.grad = torch.tensor([3 + 4j, 1 + 0j], dtype=torch.complex64)
    got, want = clip_grad_norm_([ours], 1.0, order), torch.nn.utils.clip_grad_norm_([theirs], 1.0, order)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("nothing", [filter(None, []), itertools.chain([]), iter([])], ids=["filter", "chain", "iter"])
def test_an_iterator_that_is_used_up_is_said(nothing) -> None:
    with pytest.warns(UserWarning, match="empty generator"):
        assert clip_grad_norm_(nothing, 1.0) == 0

"""What plain torch has beside the operations: norms to 1e-6 at 100M elements, no false overflow, a gradient's memory.

The operations themselves, of every language, are in test_whole.py, test_units.py and test_step.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_gradclip import Clipper, clip_grad_norm_
from hf_gradclip.kernels.eager import whole as eager

CPU = torch.device("cpu")
SIZES = [60_000_000, 30_000_000, 9_000_000, 1_000_000, 4_097, 4_096, 4_095, 1_000, 1]


def sumsq64(grad: Tensor) -> float:
    """Sum of squares in float64, a million elements at a time."""
    chunks = (chunk.double() for chunk in grad.reshape(-1).split(1 << 18))
    return math.fsum(float(chunk.dot(chunk)) for chunk in chunks)


def relative_errors(grads: list[Tensor]) -> tuple[float, float]:
    """Of the total norm, and of the worst segment."""
    got = eager.sumsq(grads, None, torch.float64, CPU)
    want = torch.tensor([sumsq64(grad) for grad in grads], dtype=torch.float64)
    assert got.dtype == torch.float64
    worst = (got.sqrt() / want.sqrt() - 1).abs().max().item()
    return abs(got.sum().sqrt().item() / want.sum().sqrt().item() - 1), worst


def model_with(*grads: Tensor | None) -> nn.Module:
    model = nn.Module()
    for i, grad in enumerate(grads):
        parameter = nn.Parameter(torch.zeros(()) if grad is None else torch.zeros_like(grad))
        parameter.grad = grad
        model.register_parameter(f"p{i}", parameter)
    return model


class TestAccuracy:
    @pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-5)])
    def test_100m_random_elements(self, dtype, limit):
        generator = torch.Generator().manual_seed(0)
        empty = [torch.empty(size, dtype=dtype) for size in SIZES]
        grads = [grad.normal_(0, 1e-3 * (i + 1), generator=generator) for i, grad in enumerate(empty)]
        total, worst = relative_errors(grads)
        assert total < limit
        assert worst < 1e-5

    @pytest.mark.parametrize("value", [1.0, 1e-3, 3.1415])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_constant(self, dtype, value):
        """One long sum in low precision stops growing; the rounding errors of equal terms do not cancel."""
        total, worst = relative_errors([torch.full((size,), value, dtype=dtype) for size in (5_000_000, 300, 3)])
        assert max(total, worst) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_sizes_with_and_without_divisors(self, dtype):
        """100,000 is rows of 4000; 65,537 is prime, and 2 * 65,537 has rows of two: both leave something over."""
        sizes = [100_000, 65_537, 131_074, 258_741, 65_536, 1, 4096, 4097, 700_001]
        generator = torch.Generator().manual_seed(0)
        grads = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
        got = eager.sumsq([*grads, torch.zeros(0, dtype=dtype)], None, torch.float64, CPU)
        want = torch.tensor([*map(sumsq64, grads), 0.0], dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-6 if dtype is torch.float32 else 1e-13, atol=0)

    def test_small_bf16(self):
        """A norm rounded to bf16 would be wrong by up to 4e-3."""
        generator = torch.Generator().manual_seed(0)
        grads = [torch.randn(size, generator=generator).bfloat16() for size in range(1, 200)]
        total, worst = relative_errors(grads)
        assert max(total, worst) < 1e-6

    def test_embedding_with_few_rows_used(self):
        grad = torch.zeros(50_000, 64, dtype=torch.bfloat16)
        grad[::1000] = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        total, _ = relative_errors([grad.view(-1)])
        assert total < 1e-6

    def test_small_next_to_large(self):
        """Every segment has its own sum: a small tensor is not lost beside a large one."""
        got = eager.sumsq([torch.full((5000,), 1e6), torch.full((3,), 1e-6)], None, torch.float64, CPU)
        assert got.tolist() == pytest.approx([5e15, 3e-12], rel=1e-5)

    def test_divisors(self):
        grads = [torch.full((5000,), 1e30), torch.full((7,), 3.0), None]
        divisors = torch.tensor([1e30, 3.0, 1.0], dtype=torch.float64)
        assert eager.sumsq(grads, divisors, torch.float64, CPU).tolist() == pytest.approx([5000, 7, 0], rel=1e-6)


class TestOverflow:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_1e20_is_not_inf_in_a_step(self, dtype):
        grads = [torch.full((5000,), 1e20).to(dtype), torch.full((4,), 2.0, dtype=dtype), None]
        wide = [grad.double().numpy() for grad in grads[:2]]
        norm = math.sqrt(sum((g**2).sum() for g in wide))
        model = model_with(*grads)
        clipper = Clipper.for_model(model, "global_norm:max_norm=1")
        assert clipper.step().item() == pytest.approx(norm, rel=1e-6)
        assert not clipper.step_was_skipped
        for parameter, g in zip((model.p0, model.p1), wide, strict=True):
            np.testing.assert_allclose(parameter.grad.double().numpy(), g / norm, rtol=5e-3, atol=1e-30)
        assert math.sqrt(sum(sumsq64(p.grad) for p in (model.p0, model.p1))) == pytest.approx(1, rel=5e-3)

    def test_1e20_is_not_inf_in_clip_grad_norm(self):
        model = model_with(torch.full((5000,), 1e20), torch.full((4,), 2.0))
        norm = clip_grad_norm_(model.parameters(), 3.0)
        assert norm.item() == pytest.approx(1e20 * math.sqrt(5000), rel=1e-6)
        assert math.sqrt(sumsq64(model.p0.grad)) == pytest.approx(3, rel=1e-5)

    def test_the_largest_float32_is_not_inf(self):
        model = model_with(torch.full((5000,), torch.finfo(torch.float32).max))
        norm = torch.finfo(torch.float32).max * math.sqrt(5000)
        clipper = Clipper.for_model(model, "global_norm:max_norm=1")
        assert clipper.step().item() == pytest.approx(norm, rel=1e-6)
        assert math.sqrt(sumsq64(model.p0.grad)) == pytest.approx(1, rel=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [0, 4095, 4096, 9999])
    def test_true_nan_and_inf(self, dtype, bad, place):
        grad = torch.ones(10_000, dtype=dtype)
        grad[place] = bad
        model = model_with(torch.ones(5, dtype=dtype), grad.clone())
        clipper = Clipper.for_model(model, "global_norm:max_norm=1")
        norm = clipper.step()
        assert clipper.step_was_skipped
        assert norm.isnan() if math.isnan(bad) else norm.isinf()
        assert model.p0.grad is None

        model = model_with(torch.ones(5, dtype=dtype), grad.clone())
        norm = clip_grad_norm_(model.parameters(), 1.0)
        assert norm.isnan() if math.isnan(bad) else norm.isinf()

    def test_an_inf_beside_elements_that_only_overflow(self):
        model = model_with(torch.full((5000,), 1e20), torch.tensor([1.0, math.inf]))
        clipper = Clipper.for_model(model, "none")
        assert clipper.step().isinf()
        assert clipper.step_was_skipped


class TestMaxAbs:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_largest_element_whatever_its_sign(self, dtype):
        values = ([1.0, -3.0, 2.0], [4.0, -3.0], [0.0, 0.0])
        grads = [torch.tensor(elements, dtype=dtype) for elements in values]
        got = eager.largest(grads, torch.float64, CPU)
        assert got.dtype == torch.float64
        assert got.tolist() == [3.0, 4.0, 0.0]

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_nan_and_inf_give_inf(self, bad):
        assert eager.largest([torch.tensor([1.0, bad, 2.0]), torch.ones(2)], torch.float64, CPU).tolist() == [
            math.inf,
            1,
        ]


class TestShapes:
    def test_missing_empty_and_single(self):
        grads = [None, torch.zeros(0), torch.tensor(3.0).view(-1), torch.tensor([-4.0])]
        assert eager.sumsq(grads, None, torch.float64, CPU).tolist() == pytest.approx([0, 0, 9, 16])
        assert eager.largest(grads, torch.float64, CPU).tolist() == [0, 0, 3, 4]

    def test_no_gradient_at_all(self):
        assert eager.sumsq([], None, torch.float64, CPU).shape == (0,)
        assert eager.largest([], torch.float64, CPU).shape == (0,)
        assert eager.sumsq([None, None], None, torch.float64, CPU).tolist() == [0, 0]

    def test_flat_is_the_gradients_own_memory(self):
        for grad in (
            torch.ones(()),
            torch.ones(3, 4),
            torch.ones(3, 4).t(),
            torch.ones(2, 3, 4, 5).permute(0, 2, 3, 1),
        ):
            memory = eager.flat(grad)
            assert memory.shape == (grad.numel(),)
            memory.mul_(2)
            assert (grad == 2).all()

    def test_flat_refuses_shared_memory_and_gaps(self):
        assert eager.flat(torch.ones(1).expand(3)) is None
        assert eager.flat(torch.ones(4, 6)[:, ::2]) is None

    def test_flat_of_complex_counts_both_parts(self):
        assert eager.flat(torch.tensor([3 + 4j, 1j])).tolist() == [3, 4, 0, 1]


class TestWrite:
    def grads(self) -> list[Tensor | None]:
        return [torch.tensor([1.0, -2.0]), None, torch.tensor([3.0]), torch.zeros(0)]

    def test_scale_one_factor_each(self):
        grads = self.grads()
        eager.scale_(grads, torch.tensor([0.5, 0.1, 1.0, 0.5], dtype=torch.float64))
        assert grads[0].tolist() == [0.5, -1.0]
        assert grads[2].tolist() == [3.0]

    def test_scale_one_factor_for_all(self):
        grads = self.grads()
        eager.scale_(grads, torch.tensor(0.5, dtype=torch.float64))
        assert [grads[0].tolist(), grads[2].tolist()] == [[0.5, -1.0], [1.5]]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("factor", [0.501, 0.3337, 0.0302])
    def test_16_bit_products_are_rounded_once(self, dtype, factor):
        """A factor that is itself rounded to 16 bits shifts the norm of the whole tensor by up to 0.2 %."""
        grad = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = (grad.double() * factor).to(dtype)
        eager.scale_([grad], torch.tensor([factor], dtype=torch.float64))
        assert torch.equal(grad, expected)

    def test_clamp(self):
        grads = self.grads()
        eager.clamp_(grads, torch.tensor([1.5, 0.1, math.inf, 1.0], dtype=torch.float64))
        assert [grads[0].tolist(), grads[2].tolist()] == [[1.0, -1.5], [3.0]]

    def test_a_factor_of_one_writes_nothing(self):
        grads = self.grads()
        eager.scale_(grads, torch.ones(4, dtype=torch.float64))
        eager.clamp_(grads, torch.full((4,), math.inf, dtype=torch.float64))
        assert [g._version for g in grads if g is not None] == [0, 0, 0]

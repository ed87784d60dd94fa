"""Sums of squares of 16-bit memory in plain torch, around the lengths at which another way is taken."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_gradclip.kernels.eager import half
from hf_gradclip.kernels.eager import whole as eager

CPU = torch.device("cpu")


def sumsq64(grad: Tensor) -> float:
    return float(grad.double().square().sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestSixteenBits:
    def noise(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)

    def test_sizes_together(self, dtype):
        sizes = [0, 1, 1023, 1024, 1025, 2048, 2049, 65_535, 65_536, 65_537, 66_560, 700_001, 0, 1024, 7, 65_536]
        grads = [self.noise(dtype, size) for size in sizes]
        got = eager.sumsq(grads, None, torch.float64, CPU)
        want = torch.tensor([sumsq64(grad) for grad in grads], dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        assert eager.sumsq(grads[:1], None, torch.float64, CPU).tolist() == [0]

    @pytest.mark.parametrize("row", [1, 3, 1024, 1025, 2048, 11_008, 16_001])
    def test_rows(self, dtype, row):
        rows = self.noise(dtype, 5, row)
        got = half.row_sums(rows.view(-1), row)
        torch.testing.assert_close(got, rows.double().square().sum(1), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [0, 66_000, 66_559, 66_570])
    def test_nan_and_inf_stay_where_they_are(self, dtype, bad, place):
        """In a small tensor and in a large one, within its rows and in what is left over."""
        small, large, other = self.noise(dtype, 1024), self.noise(dtype, 66_571), self.noise(dtype, 70_000)
        small[5] = large[place] = bad
        got = eager.sumsq([small, large, other], None, torch.float64, CPU)
        assert got[:2].isnan().all() if math.isnan(bad) else got[:2].isposinf().all()
        assert got[2].item() == pytest.approx(sumsq64(other), rel=1e-6)
        rows = half.row_sums(torch.stack([small, other[:1024]]).view(-1), 1024)
        assert rows[0].isnan() if math.isnan(bad) else rows[0].isposinf()
        assert rows[1].isfinite()

"""Sums by unit in plain torch against float64, where lines are too short for torch's own norm of each."""

from __future__ import annotations

import math

import pytest
import torch

from hf_gradclip.kernels import units

CPU = torch.device("cpu")
SHAPES = [
    (5, 1),
    (70_000, 2),
    (40, 3),
    (9, 4),
    (1, 7),
    (33_000, 8),
    (70_000, 8),
    (21, 16),
    (2, 63),
    (3000, 64),
    (7, 65),
]


def sums(blocks: list[torch.Tensor | None]) -> torch.Tensor:
    counts = [3 if block is None else len(block) for block in blocks]
    return units.sums(blocks, [(0,)] * len(blocks), counts, torch.float64, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_short_lines_small_and_large_together(dtype) -> None:
    noise = torch.Generator().manual_seed(0)
    blocks = [torch.randn(shape, generator=noise).to(dtype) for shape in SHAPES]
    before = [block.clone() for block in blocks]
    want = torch.cat([block.double().square().sum(1) for block in blocks] + [torch.zeros(3, dtype=torch.float64)])
    torch.testing.assert_close(sums([*blocks, None]), want, rtol=1e-6, atol=0)
    assert all(map(torch.equal, blocks, before))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("lines", [20, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_line(dtype, lines, bad) -> None:
    """The square of 1e30 overflows, and is measured again with a divisor; see GradientView.measure."""
    block = torch.ones(lines, 8, dtype=dtype)
    block[7, 3] = bad
    found = sums([block])
    assert found[7].isnan() if math.isnan(bad) else found[7].isposinf()
    found[7] = 8
    assert found.tolist() == [8] * lines

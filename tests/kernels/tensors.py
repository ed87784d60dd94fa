"""Tensors among guards, and what kernels must make of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_gradclip.kernels.operations import ByUnit, Language

CPU = torch.device("cpu")
Axes = tuple[int, ...]


def randn(size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def segments(sizes: list[int], dtype: torch.dtype, start: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Segments of one buffer that begins on 16 bytes, with a guard of one NaN before and after each."""
    buffer = torch.full((start + sum(sizes) + len(sizes) + 1,), math.nan, dtype=dtype)
    grads, place = [], start + 1
    for i, size in enumerate(sizes):
        grads.append(buffer[place : place + size])
        grads[-1].copy_(randn(size, dtype, seed=i))
        place += size + 1
    return buffer, grads


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.promote_types(dtype, torch.float32)


def wanted(grad: Tensor, scale: Tensor, bound: float = math.inf) -> Tensor:
    return (grad.to(wide(grad.dtype)) * scale.to(wide(grad.dtype))).clamp(-bound, bound).to(grad.dtype)


def assert_same(language: Language, got: Tensor, want: Tensor) -> None:
    """Bit for bit; one unit in the last place for bfloat16 in Triton's interpreter, which does not round it."""
    assert got.dtype == want.dtype
    if language.name == "Triton" and got.dtype == torch.bfloat16:
        assert torch.equal(got.isnan(), want.isnan())
        apart = got.nan_to_num(0).view(torch.int16).int() - want.nan_to_num(0).view(torch.int16).int()
        assert apart.abs().le(1).all()
    else:
        assert same_bits(got, want)


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Whether NaN and signs of 0 are the same, too."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.itemsize]
    return got.dtype == want.dtype and torch.equal(got.view(whole), want.view(whole))


def assert_all_same(language: Language, got: list[Tensor | None], want: list[Tensor | None]) -> None:
    for mine, expected in zip(got, want, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None and expected is not None:
            assert_same(language, mine, expected)


def assert_statistics(language: Language, grads: list[Tensor | None], dtype: torch.dtype = torch.float64) -> None:
    sumsq_S, max_S = language.whole.statistics(grads, dtype, CPU, max_abs=True)
    wide = [torch.zeros(1, dtype=torch.float64) if g is None or g.numel() == 0 else g.double() for g in grads]
    want_S = torch.tensor([float(g.square().sum()) for g in wide], dtype=torch.float64)
    assert max_S is not None
    assert sumsq_S.dtype == max_S.dtype == dtype
    torch.testing.assert_close(sumsq_S.double(), want_S, rtol=1e-6, atol=0)
    assert torch.equal(max_S, torch.tensor([float(g.abs().max()) for g in wide], dtype=dtype))
    alone, nothing = language.whole.statistics(grads, dtype, CPU, max_abs=False)
    assert torch.equal(alone, sumsq_S)
    assert nothing is None


def guarded(shape: tuple[int, ...], dtype: torch.dtype, start: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A block at this many elements from 16 bytes with 40 NaN on both sides, and all of its memory."""
    size = math.prod(shape)
    memory = torch.full((start + size + 80,), math.nan, dtype=dtype)
    block = memory[40 + start : 40 + start + size]
    block.copy_(randn(size, dtype, seed))
    return block.view(shape), memory


def others(block: Tensor, kept: Axes) -> list[int]:
    return [axis for axis in range(block.ndim) if axis not in kept]


def sums(block: Tensor, kept: Axes) -> Tensor:
    squares = block.double().square()
    return (squares.sum(others(block, kept)) if others(block, kept) else squares).reshape(-1)


def spread(value_U: Tensor, block: Tensor, kept: Axes) -> Tensor:
    shape = [n if axis in kept else 1 for axis, n in enumerate(block.shape)]
    return value_U.to(wide(block.dtype)).view(shape)


def units(shape: tuple[int, ...], kept: Axes) -> int:
    return math.prod(shape[axis] for axis in kept)


def assert_units(
    language: Language, blocks: list[tuple[Tensor, Tensor] | None], kept: list[Axes], counts: list[int]
) -> None:
    """The sums, then a scale and a bound per unit, a third of the units left alone, and nothing beside the blocks.

    Args:
        language: of the kernels.
        blocks, kept, counts: as the kernels take them, each block with all of its memory.
    """
    kernels: ByUnit = language.units
    given = [None if block is None else block[0] for block in blocks]
    assert kernels.serves(given, kept)
    want = [
        torch.zeros(n, dtype=torch.float64) if block is None else sums(block, axes)
        for block, axes, n in zip(given, kept, counts, strict=True)
    ]
    got = kernels.unit_sums(given, kept, counts, torch.float64, CPU)
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-6, atol=0)

    scale_U = torch.linspace(0.2, 1.3, sum(counts), dtype=torch.float64)
    bound_U = torch.full_like(scale_U, math.inf)
    bound_U[::2] = 0.7
    scale_U[::3] = 1
    bound_U[::3] = math.inf
    before = [None if block is None else block.clone() for block in given]
    guards = [0 if block is None else int(block[1].isnan().sum()) for block in blocks]
    kernels.unit_apply_(given, kept, counts, scale_U, bound_U)
    for block, old, axes, scale, bound in zip(
        given, before, kept, scale_U.split(counts), bound_U.split(counts), strict=True
    ):
        if block is not None and old is not None:
            limit, factor = spread(bound, old, axes), spread(scale, old, axes)
            exact = (old.to(wide(old.dtype)) * factor).clamp(-limit, limit)
            assert_same(language, block, exact.to(block.dtype))
            same = (factor == 1) & limit.isinf()
            assert torch.equal(block[same.expand_as(block)], old[same.expand_as(block)])
    assert guards == [0 if block is None else int(block[1].isnan().sum()) for block in blocks]

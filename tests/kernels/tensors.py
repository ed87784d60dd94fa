"""Tensors among guards, and what the kernels must make of them, for the tests of kernels in Triton and in C."""

from __future__ import annotations

import ctypes
import math
import shutil
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hf_gradclip.kernels import native
from hf_gradclip.kernels.table import table_of

CPU = torch.device("cpu")
Axes = tuple[int, ...]


def library() -> ctypes.CDLL:
    """Where there is a compiler, a missing library is a fault of the installation and not a reason to skip."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("needs a C compiler when the package is installed")
    return native.library()


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


def wanted(grad: Tensor, scale: Tensor, bound: float = math.inf) -> Tensor:
    return (grad.float() * scale.float()).clamp(-bound, bound).to(grad.dtype)


def assert_nan_stays(kernels: ModuleType, dtype: torch.dtype) -> None:
    grad = torch.tensor([math.nan, math.inf, -math.inf, 3.0, -0.5], dtype=dtype)
    kernels.apply_([grad], torch.tensor(0.5), torch.tensor([1.0]))
    assert grad[0].isnan()
    assert grad[1:].tolist() == [1.0, -1.0, 1.0, -0.25]
    kernels.apply_([grad], torch.tensor(math.nan), None)
    assert grad.isnan().all()


def assert_untouched(kernels: ModuleType) -> None:
    """A gradient of which nothing is asked: its address is 0, so that a read or a write would end the process."""
    grads = [randn(3000), randn(3000, seed=1)]
    want = [grads[0].clone(), wanted(grads[1], torch.tensor(0.5))]
    table_of([grads], CPU, kernels.CHUNK).address_RS[0] = 0
    kernels.apply_(grads, torch.tensor([1.0, 0.5]), None)
    kernels.apply_(grads, torch.ones((), dtype=torch.float64), torch.full((2,), math.inf))
    assert all(map(torch.equal, grads, want))


def assert_nan_stays_in_its_unit(kernels: ModuleType, kept: Axes, bad: float) -> None:
    block, _ = guarded((20, 24), torch.float32, 0)
    block[3, 5] = bad
    got = kernels.sumsq([block], [kept], [units((20, 24), kept)], torch.float64, CPU)
    assert (~got.isfinite()).nonzero().flatten().tolist() == [(3, 5)[kept[0]]]
    kernels.apply_([block], [kept], [len(got)], torch.full_like(got, 0.5), torch.full_like(got, 9.0))
    assert block[3, 5].isnan() if math.isnan(bad) else block[3, 5] == 9.0
    assert int((~block.isfinite()).sum()) == (1 if math.isnan(bad) else 0)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, start: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A block at this many elements from 16 bytes with 40 NaN on both sides, and all of its memory."""
    size = math.prod(shape)
    memory = torch.full((start + size + 80,), math.nan, dtype=dtype)
    block = memory[40 + start : 40 + start + size]
    block.copy_(torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype))
    return block.view(shape), memory


def others(block: Tensor, kept: Axes) -> list[int]:
    return [axis for axis in range(block.ndim) if axis not in kept]


def sums(block: Tensor, kept: Axes) -> Tensor:
    squares = block.double().square()
    return (squares.sum(others(block, kept)) if others(block, kept) else squares).reshape(-1)


def spread(value_U: Tensor, block: Tensor, kept: Axes) -> Tensor:
    return value_U.float().view([n if axis in kept else 1 for axis, n in enumerate(block.shape)])


def units(shape: tuple[int, ...], kept: Axes) -> int:
    return math.prod(shape[axis] for axis in kept)


def assert_right(
    kernels: ModuleType,
    blocks: list[tuple[Tensor, Tensor] | None],
    kept: list[Axes],
    counts: list[int],
    truncated: bool = False,
) -> None:
    """The sums, then a scale and a bound per unit, a third of the units left alone, and nothing beside the blocks.

    Args:
        kernels: by unit.
        blocks, kept, counts: as the kernels take them, each block with all of its memory.
        truncated: bfloat16 is not rounded to nearest, in Triton's interpreter.
    """
    given = [None if block is None else block[0] for block in blocks]
    assert all(block is None or kernels.serves(block, axes) for block, axes in zip(given, kept, strict=True))
    want = [
        torch.zeros(n, dtype=torch.float64) if block is None else sums(block, axes)
        for block, axes, n in zip(given, kept, counts, strict=True)
    ]
    got = kernels.sumsq(given, kept, counts, torch.float64, CPU)
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-6, atol=0)

    scale_U = torch.linspace(0.2, 1.3, sum(counts), dtype=torch.float64)
    bound_U = torch.full_like(scale_U, math.inf)
    bound_U[::2] = 0.7
    scale_U[::3] = 1
    bound_U[::3] = math.inf
    before = [None if block is None else block.clone() for block in given]
    guards = [0 if block is None else int(block[1].isnan().sum()) for block in blocks]
    kernels.apply_(given, kept, counts, scale_U, bound_U)
    for block, old, axes, scale, bound in zip(
        given, before, kept, scale_U.split(counts), bound_U.split(counts), strict=True
    ):
        if block is not None:
            limit = spread(bound, old, axes)
            exact = (old.float() * spread(scale, old, axes)).clamp(-limit, limit)
            ulp = torch.finfo(block.dtype).eps if truncated and block.dtype == torch.bfloat16 else 0.0
            torch.testing.assert_close(block.float(), exact.to(block.dtype).float(), rtol=ulp, atol=0)
            same = (spread(scale, old, axes) == 1) & limit.isinf()
            assert torch.equal(block[same.expand_as(block)], old[same.expand_as(block)])
    assert guards == [0 if block is None else int(block[1].isnan().sum()) for block in blocks]

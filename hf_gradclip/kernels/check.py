"""Whether kernels agree with plain torch on a device: asked once, before they are trusted with a gradient.

Nothing is drawn from a random generator, so that a run that uses the kernels sees the numbers of one that does not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_gradclip.kernels.operations import ByUnit, Language, Step, Whole
from hf_gradclip.kernels.rule import Memory, Places, Rule
from hf_gradclip.types import ClipPlan

SIZES = (3, 4099, 70_001)
STEP_SIZES = (3, 4099, 17_001)

Dtypes = tuple[torch.dtype, ...]


class DisagreementError(RuntimeError):
    """A kernel's result is not that of plain torch."""


def check(operation: str, language: Language, device: torch.device, dtypes: Dtypes) -> None:
    """Run the kernels of one file on small tensors of these dtypes, on 16 bytes and off.

    Args:
        operation: the file: "whole", "units" or "step".
        language: of the kernels.
        device: to run them on.
        dtypes: of the tensors.

    Raises:
        DisagreementError: if a sum is off by more than 1e-6, an element by more than its rounding, or memory beside a
            tensor was touched.
    """
    if operation == "whole":
        _whole(language.whole, device, dtypes)
    elif operation == "units":
        _units(language.units, device, dtypes)
    else:
        _step(language.step, device, dtypes)


def _whole(kernels: Whole, device: torch.device, dtypes: Dtypes) -> None:
    grads = [_wave(size, dtype, device, start) for dtype in dtypes for size in SIZES for start in (1, 8)]
    before = [grad.clone() for grad in grads]
    sumsq_S, max_S = kernels.statistics([*grads, None], torch.float64, device, max_abs=True)
    assert max_S is not None
    zero = sumsq_S.new_zeros(1)
    _same("sum of squares", sumsq_S, torch.cat([*(g.double().square().sum().view(1) for g in grads), zero]), 1e-6)
    _same("largest element", max_S, torch.cat([*(g.double().abs().amax().view(1) for g in grads), zero]), 0.0)
    scale_S = torch.linspace(0.3, 1, len(grads), dtype=torch.float64, device=device)
    bound_S = torch.full_like(scale_S, float("inf"))
    bound_S[::2] = 0.5
    kernels.apply_(grads, scale_S, bound_S)
    for grad, old, scale, bound in zip(grads, before, scale_S.float(), bound_S.float(), strict=True):
        _rounded("scaling", grad, (old.float() * scale).clamp(-bound, bound))


def _units(kernels: ByUnit, device: torch.device, dtypes: Dtypes) -> None:
    kinds = [((37, 264), (0,)), ((37, 9), (0,)), ((37, 264), (1,)), ((5, 3, 131), (0, 2))]
    blocks = [_wave(math.prod(shape), dtype, device, 8).view(shape) for dtype in dtypes for shape, _ in kinds]
    kept = [axes for _ in dtypes for _, axes in kinds]
    before = [block.clone() for block in blocks]
    want = [
        b.double().square().sum([a for a in range(b.ndim) if a not in axes], keepdim=True)
        for b, axes in zip(blocks, kept, strict=True)
    ]
    counts = [sums.numel() for sums in want]
    sums_U = kernels.unit_sums(blocks, kept, counts, torch.float64, device)
    _same("sum of squares by unit", sums_U, torch.cat([sums.view(-1) for sums in want]), 1e-6)
    scale_U = torch.linspace(0.3, 1.2, len(sums_U), dtype=torch.float64, device=device).clamp(max=1)
    kernels.unit_apply_(blocks, kept, counts, scale_U, torch.full_like(scale_U, 0.5))
    for block, old, sums, scale in zip(blocks, before, want, scale_U.float().split(counts), strict=True):
        _rounded("scaling by unit", block, (old.float() * scale.view(sums.shape)).clamp(-0.5, 0.5))


def _step(kernels: Step, device: torch.device, dtypes: Dtypes) -> None:
    """AdamW's second step, with clipped gradients and clipped updates."""
    lr, eps = 0.1, 1e-8
    rule = Rule(
        "adam", lr, 0.1, True, False, past=0.9, fresh=0.1, past2=0.99, fresh2=0.01, eps=eps,
        terms=[(2.0, 0.5)] * len(STEP_SIZES),
    )  # fmt: skip
    for dtype in dtypes:
        weights, grads, first, second = (
            [_wave(size, dtype, device, start) for start, size in enumerate(STEP_SIZES, column)] for column in range(4)
        )
        for tensor in second:
            tensor.square_().add_(0.1)  # no division by what is nearly 0
        before = [
            [tensor.to(torch.float32, copy=True) for tensor in column] for column in (weights, grads, first, second)
        ]
        memory = Memory(weights, grads, first, second, [None] * len(STEP_SIZES))
        scale_S = torch.tensor([1.0, 0.5, 0.25], device=device)
        plan, after = ClipPlan(scale_S), ClipPlan(scale_S.flip(0))
        places = Places(tuple(range(len(STEP_SIZES))), tuple(range(len(STEP_SIZES))))
        sumsq_S, _ = kernels.measure_update(rule, memory, places, plan)
        kernels.step_(rule, memory, places, plan, after)
        for i, (w, g, a, b) in enumerate(zip(*before, strict=True)):
            g = g * scale_S[i]
            a, b = 0.9 * a + 0.1 * g, 0.99 * b + 0.01 * g * g
            u = 2 * a / (b.sqrt() / 0.5 + eps)
            _same("size of an update", sumsq_S[i], u.double().square().sum(), 1e-4)
            _rounded("a step", weights[i], w * (1 - lr * 0.1) - lr * u * after.scale_S[i], ulps=8)
            _rounded("a moment", second[i], b, ulps=8)


def _wave(size: int, dtype: torch.dtype, device: torch.device, start: int) -> Tensor:
    """Numbers in (-1, 1) that repeat nowhere, at this many elements from 16 bytes, between two NaN."""
    memory = torch.full((size + start + 1,), float("nan"), dtype=dtype, device=device)
    wave = memory[start : start + size]
    wave.copy_((torch.arange(size, dtype=torch.float32, device=device) * 0.7 + start).sin())
    return wave


def _same(what: str, got: Tensor, want: Tensor, rtol: float) -> None:
    if not torch.allclose(got, want.to(got), rtol=rtol, atol=0):
        raise DisagreementError(
            f"their {what} is {got.flatten()[:3].tolist()} where torch's is {want.flatten()[:3].tolist()}"
        )


def _rounded(what: str, got: Tensor, want: Tensor, ulps: float = 1) -> None:
    """Equal up to the rounding of `got`, and nothing written beside it."""
    start = got.storage_offset()
    beside = got.as_strided((start,), (1,), 0), got.as_strided((1,), (1,), start + got.numel())
    unit = ulps * torch.finfo(got.dtype).eps
    if not torch.allclose(got.float(), want, rtol=unit, atol=unit) or not all(b.isnan().all() for b in beside):
        raise DisagreementError(f"their result of {what} in {got.dtype} differs from torch's")

"""Whole gradients in C, for memory of a CPU: one read measures every gradient, one write changes those that clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_gradclip.kernels.blocks import insist_on_numbers
from hf_gradclip.kernels.c.library import CHUNK, arguments, call, share
from hf_gradclip.kernels.table import table_of


def statistics(
    grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device, max_abs: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of squares and largest absolute element per gradient, from one read; see operations.Whole.

    Squares neither overflow nor vanish in float32: those of a chunk of very large or very small elements are taken
    again in float64. Everything is added in rows of 1024 elements in float32, and these in float64.
    """
    table = table_of([grads], device, CHUNK)
    sumsq_S, max_S = torch.empty(2, len(grads), dtype=torch.float64, device=device)
    sumsq_C = torch.empty(table.chunks, dtype=torch.float64, device=device)
    max_C = torch.empty(table.chunks, dtype=torch.float32, device=device)
    share("gradclip_measure", table.chunks, *arguments(table), CHUNK, sumsq_C, max_C)
    call("gradclip_finish", len(grads), table.first_S, sumsq_C, max_C, sumsq_S, max_S)
    return sumsq_S.to(dtype), max_S.to(dtype) if max_abs else None


def apply_(grads: Sequence[Tensor | None], scale_S: Tensor, bound_S: Tensor | None) -> None:
    """g <- clamp(g * scale, -bound, +bound); see operations.Whole.

    A gradient with scale 1 and bound inf is neither read nor written.
    """
    table = table_of([grads], scale_S.device, CHUNK)
    plan = (*_plan("scale_S", scale_S, len(grads)), *_plan("bound_S", bound_S, len(grads)))
    share("gradclip_apply", table.chunks, *arguments(table), CHUNK, *plan, writes=True)


def _plan(name: str, number_S: Tensor | None, count: int) -> tuple[Tensor | None, int]:
    """So many numbers in float32, and the distance between two of them, which is 0 where one serves all."""
    if number_S is None:
        return None, 0
    insist_on_numbers(name, number_S, ((), (count,)), torch.device("cpu"))
    number_S = number_S.float().expand(count)
    return number_S, number_S.stride(0)

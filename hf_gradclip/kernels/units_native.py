"""The kernels in C by unit, for memory of a CPU: rows and columns as in units_triton.py, run as in native.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_gradclip.kernels import native
from hf_gradclip.kernels.table import Table
from hf_gradclip.kernels.units import Axes, matrices_of, unit_table

STRETCH = 1024  # units side by side that a program takes at most; as in native.c


def serves(block: Tensor, kept: Axes) -> bool:
    """Whether the units of this block are its lines, or lie side by side in them."""
    return block.dtype in native.BYTES and block.is_contiguous() and matrices_of(block.shape, kept) is not None


def sumsq(
    blocks: Sequence[Tensor | None],
    kept: Sequence[Axes],
    counts: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Sum of squares per unit of all blocks, one after another, shape (sum of counts,); a missing block gives 0.

    Args:
        blocks: which `serves`, on `device`, a CPU; None where missing.
        kept: per block the axes that count units.
        counts: per block its units.
        dtype: of the result; each unit is added up in float32 rows, so that squares may overflow to inf.
        device: of the result.
    """
    sums_U = torch.zeros(sum(counts), dtype=torch.float64, device=device)
    table = unit_table(blocks, kept, counts, device, _programs)
    native.share("gradclip_unit_sums", table.chunks, *_arguments(table), sums_U)
    return sums_U.to(dtype)


def apply_(
    blocks: Sequence[Tensor | None],
    kept: Sequence[Axes],
    counts: Sequence[int],
    scale_U: Tensor,
    bound_U: Tensor | None,
) -> None:
    """g <- clamp(g * scale, -bound, +bound) by unit, in float32 and rounded once; NaN stays NaN.

    Args:
        blocks, kept, counts: as for `sumsq`.
        scale_U: factor per unit, shape (sum of counts,).
        bound_U: largest absolute element per unit, of the same shape; inf or None bounds nothing.
    """
    table = unit_table(blocks, kept, counts, scale_U.device, _programs)
    plan = (None if n_U is None else n_U.float().expand(sum(counts)).contiguous() for n_U in (scale_U, bound_U))
    native.share("gradclip_unit_apply", table.chunks, *_arguments(table), *plan)


def _programs(count: int, length: int, columns: int) -> int:
    """Lines of about a chunk of elements, or a stretch of the units of a matrix, for each."""
    return count * -(-columns // STRETCH) if columns else min(count, -(-count * length // native.CHUNK))


def _arguments(table: Table) -> tuple[Tensor, ...]:
    address_S, _, *others = native.arguments(table)
    return address_S, *others, table.place_S

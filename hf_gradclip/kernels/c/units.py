"""Gradients by unit in C, for memory of a CPU: units that are lines, or lie side by side in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_gradclip.kernels.blocks import Axes, block_table, insist_on_numbers, taken
from hf_gradclip.kernels.c.library import BYTES, CHUNK, arguments, share
from hf_gradclip.kernels.table import Table

STRETCH = 1024  # units side by side that a program takes at most; as in units.c


def serves(blocks: Sequence[Tensor | None], kept: Sequence[Axes]) -> bool:
    """Whether the units of all blocks are their lines, or lie side by side in them."""
    return taken(blocks, kept, BYTES)


def unit_sums(
    blocks: Sequence[Tensor | None],
    kept: Sequence[Axes],
    counts: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Sum of squares per unit of all blocks, each added up in float32 rows; see operations.ByUnit."""
    table = block_table(blocks, kept, counts, device, _programs)
    sums_U = torch.zeros(sum(counts), dtype=torch.float64, device=device)
    share("gradclip_unit_sums", table.chunks, *_arguments(table), sums_U)
    return sums_U.to(dtype)


def unit_apply_(
    blocks: Sequence[Tensor | None],
    kept: Sequence[Axes],
    counts: Sequence[int],
    scale_U: Tensor,
    bound_U: Tensor | None,
) -> None:
    """g <- clamp(g * scale, -bound, +bound) by unit; see operations.ByUnit."""
    table = block_table(blocks, kept, counts, scale_U.device, _programs)
    insist_on_numbers("scale_U", scale_U, ((sum(counts),),), scale_U.device)
    insist_on_numbers("bound_U", bound_U, ((sum(counts),),), scale_U.device)
    plan = (None if n_U is None else n_U.float().contiguous() for n_U in (scale_U, bound_U))
    share("gradclip_unit_apply", table.chunks, *_arguments(table), *plan, writes=True)


def _programs(count: int, length: int, columns: int) -> int:
    """Lines of about a chunk of elements, or a stretch of the units of a matrix, for each."""
    return count * -(-columns // STRETCH) if columns else min(count, -(-count * length // CHUNK))


def _arguments(table: Table) -> tuple[Tensor, ...]:
    address_S, _, *others = arguments(table)
    return address_S, *others, table.place_S

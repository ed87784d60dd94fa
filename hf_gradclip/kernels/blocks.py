"""Gradients that are measured and scaled by unit, as the kernels in C and in Triton see them.

A block is one process's memory of a parameter, or of a part of it, with its logical shape. `kept` are the axes that
count units, in order; a unit is everything along the other axes. Of each block a kernel reads its first unit and how it
is made of lines: each unit is a line, or units lie side by side in every line.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hf_gradclip.kernels.table import MisfitError, Table, table_of

Axes = tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def matrices_of(shape: tuple[int, ...], kept: Axes) -> tuple[int, int, int] | None:
    """(lines, elements of each, 0) where units are lines; (matrices, lines of each, units in a line) where they lie
    side by side; None for what is neither."""
    last = len(shape) - 1
    if not are_axes(kept, len(shape)):
        return None
    if kept == tuple(range(len(kept))):
        return math.prod(shape[: len(kept)]), math.prod(shape[len(kept) :]), 0
    if kept == (*range(last - 1), last):
        return math.prod(shape[: last - 1]), shape[last - 1], shape[last]
    return None


def are_axes(kept: Axes, ndim: int) -> bool:
    """Whether these are axes of a block of so many, each once and in order."""
    return all(a < b for a, b in pairwise((-1, *kept, ndim)))


def units_of(shape: Sequence[int], kept: Axes) -> int:
    """How many units a block of this shape has."""
    return math.prod(shape[axis] for axis in kept)


def taken(blocks: Sequence[Tensor | None], kept: Sequence[Axes], dtypes: Collection[torch.dtype]) -> bool:
    """Whether the units of all blocks are lines, or lie side by side in them."""
    present = [block for block in blocks if block is not None]
    if not all(map(Tensor.is_contiguous, present)) or not {block.dtype for block in present}.issubset(dtypes):
        return False
    return _in_lines(tuple([None if block is None else block.shape for block in blocks]), tuple(kept))


@functools.lru_cache(maxsize=64)
def _in_lines(shapes: tuple[tuple[int, ...] | None, ...], kept: tuple[Axes, ...]) -> bool:
    if len(shapes) != len(kept):
        return False
    pairs = zip(shapes, kept, strict=True)
    return all(shape is None or matrices_of(shape, axes) is not None for shape, axes in pairs)


def insist_on_counts(blocks: Sequence[Tensor | None], kept: Sequence[Axes], counts: Sequence[int]) -> None:
    """Stop before memory is read for units that are not there.

    Raises:
        MisfitError: where a block has other units than its count says, or axes that it does not have, or the three are
            of other lengths.
    """
    _insist(tuple([None if block is None else block.shape for block in blocks]), tuple(kept), tuple(counts))


@functools.lru_cache(maxsize=64)
def _insist(shapes: tuple[tuple[int, ...] | None, ...], kept: tuple[Axes, ...], counts: tuple[int, ...]) -> None:
    if not len(shapes) == len(kept) == len(counts):
        raise MisfitError(f"{len(shapes)} blocks with {len(kept)} kinds of units and {len(counts)} counts: must agree.")
    for i, (shape, axes, count) in enumerate(zip(shapes, kept, counts, strict=True)):
        if count < 0 or (shape is not None and not are_axes(axes, len(shape))):
            raise MisfitError(f"block {i} of shape {shape} with {count} units along {axes}: there are no such axes.")
        if shape is not None and units_of(shape, axes) != count:
            raise MisfitError(
                f"block {i} has shape {tuple(shape)} and so {units_of(shape, axes)} units along {axes}, not {count}. "
                "Was the parameter resized? Its units must be counted anew."
            )


def insist_on_numbers(name: str, number_U: Tensor | None, shapes: Sequence[tuple[int, ...]], device: object) -> None:
    """Stop before numbers are read that are not there.

    Args:
        name: of the vector, for the message.
        number_U: the vector; None is taken.
        shapes: that it may have.
        device: that it must be on, but for one number that serves all, which the host may have.

    Raises:
        MisfitError: for another shape or device.
    """
    if number_U is None:
        return
    if tuple(number_U.shape) not in shapes or not (number_U.device == device or of_host(number_U)):
        known = " or ".join(map(str, shapes))
        raise MisfitError(
            f"{name} has shape {tuple(number_U.shape)} on {number_U.device}: must be {known} on {device}."
        )


def of_host(number: Tensor) -> bool:
    """Whether it is one number that the host has: a kernel is handed it, wherever the memory is."""
    return number.ndim == 0 and number.is_cpu


def device_of_bounds(scale_S: Tensor, bound_S: Tensor | None) -> torch.device:
    """Where bounds must be: beside the scales, unless those are one number of the host's."""
    return scale_S.device if bound_S is None or not of_host(scale_S) else bound_S.device


def block_table(
    blocks: Sequence[Tensor | None],
    kept: Sequence[Axes],
    counts: Sequence[int],
    device: torch.device,
    programs: Callable[[int, int, int], int],
) -> Table:
    """The table of blocks, of each of which a kernel reads its first unit and what `matrices_of` says.

    Args:
        blocks, kept, counts: as for `ByUnit.unit_sums`, each block contiguous and one that `matrices_of` knows.
        device: where they are.
        programs: how many share a block of such matrices.

    Raises:
        MisfitError: where a block has other units than its count says, or ones that do not lie in lines.
    """
    if not all(block is None or block.is_contiguous() for block in blocks):
        raise MisfitError("a block has gaps in its memory, so its units lie in no lines: make it contiguous.")
    shapes = tuple([None if block is None else block.shape for block in blocks])
    shares, places = _shares(shapes, tuple(kept), tuple(counts), programs)
    return table_of([blocks], device, shares, places, "block")


@functools.lru_cache(maxsize=64)
def _shares(
    shapes: tuple[tuple[int, ...] | None, ...],
    kept: tuple[Axes, ...],
    counts: tuple[int, ...],
    programs: Callable[[int, int, int], int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many programs share each block, and of each its first unit and what `matrices_of` says; worked out once."""
    _insist(shapes, kept, counts)
    places: list[int] = []
    shares, first = [], 0
    for i, (shape, axes, count) in enumerate(zip(shapes, kept, counts, strict=True)):
        found = None
        if shape is not None and 0 not in shape:
            found = matrices_of(shape, axes)
            if found is None:
                raise MisfitError(f"block {i} of shape {tuple(shape)}: its units along {axes} lie in no lines.")
        places += (first, *(found or (0, 0, 0)))
        shares.append(programs(*found) if found else 0)
        first += count
    return tuple(shares), tuple(places)

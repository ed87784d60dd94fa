"""How a model is divided into segments, and which of them are in a piece of memory of this process.

A process may hold any box of a parameter's elements, as a shard does, or any run of them in flat memory, as under ZeRO;
what the processes hold of a unit adds up to its sum over ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_gradclip.kernels.blocks import units_of
from hf_gradclip.types import Layout
from hf_gradclip.views.units import Shape


@dataclass(frozen=True)
class Cut:
    """Memory of one parameter on this process, and the segments of the units in it.

    Args:
        memory: which of the process's tensors it is, or is in.
        kept: the axes that count units; () where all of the tensor is one segment.
        segments: one per unit, in the order of the kept axes, int64, shape (units,), on the host.
        start: of flat memory, the first element.
        shape: of flat memory, how to see the elements from `start`; None for a tensor that has its logical shape.
    """

    memory: int
    kept: tuple[int, ...]
    segments: np.ndarray
    start: int = 0
    shape: tuple[int, ...] | None = None


class Division:
    """How a model is divided into segments.

    Args:
        names: of the parameters.
        shapes: of the whole parameters.
        axes: per parameter the axes that count units; () for one unit, None for a parameter that is not cut. None for
            all of them makes a layout without units.
        device: of the statistics.

    Attributes:
        layout: of the whole model.
        first: of each parameter its first segment; and at the end, how many there are.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[Shape],
        axes: Sequence[tuple[int, ...] | None] | None,
        device: torch.device,
    ) -> None:
        self._shapes = [tuple(shape) for shape in shapes]
        self._kept = [kept or () for kept in axes] if axes is not None else [()] * len(shapes)
        counts = [units_of(shape, kept) for shape, kept in zip(shapes, self._kept, strict=True)]
        sizes = [math.prod(shape) // max(1, count) for shape, count in zip(shapes, counts, strict=True)]
        self.first = list(itertools.accumulate(counts, initial=0))
        repeats = torch.tensor(counts, dtype=torch.int64, device="cpu")

        def over_segments(per_param: Sequence[int]) -> Tensor:
            values = torch.tensor(per_param, dtype=torch.int64, device="cpu")
            return values.repeat_interleave(repeats, output_size=self.first[-1]).to(device)

        unit_S = None if axes is None else over_segments([kept is not None for kept in axes]).bool()
        self.layout = Layout(tuple(names), over_segments(sizes), over_segments(range(len(names))), unit_S)

    def box(self, parameter: int, memory: int, offsets: Shape, sizes: Shape, start: int | None = None) -> Cut:
        """The cut of a box of a parameter's elements.

        Args:
            parameter: which one it is of.
            memory: which tensor it is in.
            offsets: of the box in the whole parameter, one per axis.
            sizes: of the box, one per axis.
            start: of flat memory, the box's first element; None for a tensor that has the shape of the box.
        """
        kept, first = self._kept[parameter], self.first[parameter]
        unit = np.zeros(1, dtype=np.int64)
        for axis in kept:
            here = offsets[axis] + np.arange(sizes[axis])
            unit = (unit[:, None] * self._shapes[parameter][axis] + here).reshape(-1)
        return Cut(memory, kept, first + unit, start or 0, None if start is None else tuple(sizes))

    def run(self, parameter: int, memory: int, offset: int, length: int) -> list[Cut]:
        """The cuts of a flat tensor that holds `length` elements of a parameter from `offset` on."""
        if not self._kept[parameter]:
            return [Cut(memory, (), np.array([self.first[parameter]]))]
        cuts, start = [], 0
        for offsets, sizes in boxes(self._shapes[parameter], offset, offset + length):
            cuts.append(self.box(parameter, memory, offsets, sizes, start))
            start += math.prod(sizes)
        return cuts


def boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A run of the elements of a row-major array as boxes, each one run of memory: (offsets, sizes), in order."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    row, end = -(-start // inner), stop // inner
    if row > end:  # within one row
        yield from _inside(shape, end, start - end * inner, stop - end * inner)
        return
    if start < row * inner:
        yield from _inside(shape, row - 1, start - (row - 1) * inner, inner)
    if row < end:
        yield (row, *[0] * (len(shape) - 1)), (end - row, *shape[1:])
    yield from _inside(shape, end, 0, stop - end * inner)


def _inside(shape: Shape, row: int, start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, sizes in boxes(shape[1:], start, stop):
        yield (row, *offsets), (1, *sizes)

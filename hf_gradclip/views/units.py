"""Gradients cut into units, the weights of one output each, wherever the pieces of a parameter lie.

Which axes count units depends on the layer: `nn.Linear` and `nn.Embedding` have a unit per row, the `Conv1D` of GPT-2
one per column, a convolution one per output channel, fused experts of shape (experts, out, in) one per expert and row.
A process may hold any part of a parameter, cut along an axis or anywhere in its flat memory; the parts of a unit add
up to its sum over ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hf_gradclip import kernels
from hf_gradclip.kernels import eager
from hf_gradclip.kernels import units as by_unit
from hf_gradclip.kernels.table import moved
from hf_gradclip.strategy import Needs, Units
from hf_gradclip.types import ClipPlan, Layout, NormStats

Shape = Sequence[int]

HEADS = frozenset({"lm_head", "embed_out", "score", "classifier", "qa_outputs"})
TOP_HEADS = frozenset({"head", "fc"})


@dataclass(frozen=True)
class Cut:
    """Memory of one parameter on this process, and the segments of the units in it.

    Args:
        memory: which of the process's tensors it is.
        kept: the axes that count units; () where all of it is one segment.
        segments: one per unit, in the order of the kept axes, int64, shape (units,), on the host.
        start: of flat memory, the first element.
        shape: of flat memory, how to see the elements from `start`; None for a tensor that has its logical shape.
    """

    memory: int
    kept: tuple[int, ...]
    segments: np.ndarray
    start: int = 0
    shape: tuple[int, ...] | None = None

    def of(self, memory: Sequence[Tensor | None]) -> Tensor | None:
        """The block; None where the gradient is missing."""
        tensor = memory[self.memory]
        if tensor is None:
            return None
        if self.shape is None:
            return tensor if self.kept else eager.flat(tensor)
        return tensor.narrow(0, self.start, math.prod(self.shape)).view(self.shape)


class Division:
    """How a model is cut into segments.

    Args:
        names: of the parameters.
        shapes: of the whole parameters.
        axes: per parameter the axes that count units; () for one unit, None for a parameter that is not cut. None for
            all of them makes a layout without units.
        device: of the statistics.
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
        counts = [_units(shape, kept) for shape, kept in zip(shapes, self._kept, strict=True)]
        sizes = [math.prod(shape) // max(1, count) for shape, count in zip(shapes, counts, strict=True)]
        self._first = list(itertools.accumulate(counts, initial=0))
        repeats = torch.tensor(counts, dtype=torch.int64, device="cpu")

        def over_segments(per_param: Sequence[int]) -> Tensor:
            values = torch.tensor(per_param, dtype=torch.int64, device="cpu")
            return values.repeat_interleave(repeats, output_size=self._first[-1]).to(device)

        unit_S = None if axes is None else over_segments([kept is not None for kept in axes]).bool()
        self.layout = Layout(tuple(names), over_segments(sizes), over_segments(range(len(names))), unit_S)

    def box(self, parameter: int, memory: int, offsets: Shape, sizes: Shape, start: int | None = None) -> Cut:
        """The cut of a box of a parameter's elements; from `start` of flat memory, or a tensor of that shape."""
        kept, first = self._kept[parameter], self._first[parameter]
        unit = np.zeros(1, dtype=np.int64)
        for axis in kept:
            here = offsets[axis] + np.arange(sizes[axis])
            unit = (unit[:, None] * self._shapes[parameter][axis] + here).reshape(-1)
        return Cut(memory, kept, first + unit, start or 0, None if start is None else tuple(sizes))

    def run(self, parameter: int, memory: int, offset: int, length: int) -> list[Cut]:
        """The cuts of a flat tensor that holds `length` elements of a parameter from `offset` on."""
        if not self._kept[parameter]:
            return [Cut(memory, (), np.array([self._first[parameter]]), 0, (length,))]
        cuts, start = [], 0
        for offsets, sizes in boxes(self._shapes[parameter], offset, offset + length):
            cuts.append(self.box(parameter, memory, offsets, sizes, start))
            start += math.prod(sizes)
        return cuts


class Held:
    """What one process has of a model's gradients, measured and scaled by segment.

    Args:
        layout: of the whole.
        cuts: what is here.
    """

    def __init__(self, layout: Layout, cuts: Sequence[Cut]) -> None:
        whole = [cut for cut in cuts if not cut.kept]
        cut_up = [cut for cut in cuts if cut.kept]
        segments = np.concatenate([np.zeros(0, np.int64), *(cut.segments for cut in whole + cut_up)])
        order = segments.argsort()
        each_once = np.array_equal(segments[order], np.arange(len(layout)))  # where this process holds everything
        self._order = torch.from_numpy(order).to(layout.device) if each_once else None
        self._layout = layout
        self._whole = whole
        self._cut_up = cut_up
        self._kept = [cut.kept for cut in cut_up]
        self._counts = [len(cut.segments) for cut in cut_up]
        self._segments = torch.from_numpy(segments).to(layout.device)

    def measure(
        self, memory: Sequence[Tensor | None], weights: Sequence[Tensor] | None, needs: Needs, rescale: bool
    ) -> NormStats:
        """The statistics of what is here, not reduced over ranks; see GradientView.measure."""
        max_abs_S = self._largest(memory) if needs.max_abs or rescale else None
        if rescale:
            assert max_abs_S is not None
            divisor_S = eager.divisors(max_abs_S)
            sumsq_S = self._sums(memory, divisor_S) * divisor_S.square()
        else:
            sumsq_S = self._sums(memory)
        weight_sumsq_S = None if weights is None else self._sums(weights)
        return NormStats(sumsq_S, self._layout, max_abs_S, weight_sumsq_S=weight_sumsq_S)

    def apply_(self, memory: Sequence[Tensor | None], plan: ClipPlan) -> None:
        """Scale, then bound, what is here."""
        home = next((tensor.device for tensor in memory if tensor is not None), self._layout.device)
        scale = plan.scale_S.expand(len(self._layout)).index_select(0, self._segments).to(home)
        bound = None if plan.bound_S is None else plan.bound_S.index_select(0, self._segments).to(home)
        count = len(self._whole)
        whole, blocks = self._found(memory)
        if count:
            kernels.apply_(whole, scale[:count], None if bound is None else bound[:count])
        if blocks:
            units = None if bound is None else bound[count:]
            kernels.unit_apply_(blocks, self._kept, self._counts, scale[count:], units)

    def _found(self, memory: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """What is here of whole parameters, and of cut ones."""
        return [cut.of(memory) for cut in self._whole], [cut.of(memory) for cut in self._cut_up]

    def _sums(self, memory: Sequence[Tensor | None], divisor_S: Tensor | None = None) -> Tensor:
        """Sums of squares, shape (S,), after a division by `divisor_S`."""
        dtype, device = self._layout.dtype, self._layout.device
        whole, blocks = self._found(memory)
        if divisor_S is None:
            found = [
                kernels.statistics(whole, dtype, device, max_abs=False)[0],
                kernels.unit_sums(blocks, self._kept, self._counts, dtype, device),
            ]
        else:
            divisors = divisor_S[self._segments].split([len(whole), *self._counts])
            found = [eager.sumsq(whole, divisors[0], dtype, device)]
            for block, kept, divisor_U in zip(blocks, self._kept, divisors[1:], strict=True):
                if block is None:
                    found.append(torch.zeros_like(divisor_U))
                else:
                    found.append(moved(by_unit.sumsq(block, kept, divisor_U), device, dtype))
        sums = torch.cat(found)
        if self._order is not None:
            return sums.index_select(0, self._order)
        return self._zeros().index_add_(0, self._segments, sums)

    def _largest(self, memory: Sequence[Tensor | None]) -> Tensor:
        """Largest absolute elements, shape (S,); NaN gives inf."""
        dtype, device = self._layout.dtype, self._layout.device
        whole, blocks = self._found(memory)
        found = [eager.max_abs(whole, dtype, device)]
        for block, kept, count in zip(blocks, self._kept, self._counts, strict=True):
            if block is None:
                found.append(torch.zeros(count, dtype=dtype, device=device))
            else:
                found.append(moved(by_unit.max_abs(block, kept), device, dtype))
        largest = torch.cat(found).nan_to_num(nan=float("inf"), posinf=float("inf"))
        return self._zeros().scatter_reduce(0, self._segments, largest, "amax")

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self._layout), dtype=self._layout.dtype, device=self._layout.device)


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


def axes_of(
    model: nn.Module | None, named: Sequence[tuple[str, Tensor]], shapes: Sequence[Shape], units: Units
) -> list[tuple[int, ...] | None]:
    """Per parameter the axes that count units; () for one unit, None for a parameter that is not cut.

    Args:
        model: whose layers say how they store their weights; None goes by names and shapes alone.
        named: the parameters.
        shapes: of the whole parameters.
        units: what the strategy asks for.
    """
    layers = (
        {} if model is None else {id(p): layer for layer in model.modules() for p in layer.parameters(recurse=False)}
    )
    heads = _heads(model)
    axes: list[tuple[int, ...] | None] = []
    for (name, p), shape in zip(named, shapes, strict=True):
        parts = name.split(".")[:-1]
        head = id(p) in heads or bool(HEADS.intersection(parts)) or (len(parts) == 1 and parts[0] in TOP_HEADS)
        if head and not units.head:
            axes.append(None)
        elif len(shape) < 2 or name.endswith("bias"):
            axes.append(() if units.vectors else None)
        else:
            axes.append(_matrix_axes(layers.get(id(p)), name, len(shape), units.axis))
    return axes


def _matrix_axes(layer: nn.Module | None, name: str, ndim: int, axis: int | None) -> tuple[int, ...]:
    if isinstance(layer, nn.Embedding):
        return (0,)
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return (1,)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or ndim > 3:
        return (0,)
    if axis is None:  # transformers' Conv1D, and the experts of GPT-OSS, store (in, out)
        axis = int(type(layer).__name__ == "Conv1D" or getattr(layer, "is_transposed", None) is True)
    if ndim == 2:
        return (axis,)
    return (0, 1 + axis) if layer is not None or "expert" in name else (0,)


def _heads(model: nn.Module | None) -> set[int]:
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if callable(find) else None
    return {id(p) for p in layer.parameters()} if isinstance(layer, nn.Module) else set()


def _units(shape: Shape, kept: tuple[int, ...]) -> int:
    return math.prod(shape[axis] for axis in kept)

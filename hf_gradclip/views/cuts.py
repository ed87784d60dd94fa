"""Memory that holds segments, or some elements of them, measured and scaled by segment."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_gradclip import kernels
from hf_gradclip.device import moved, number_on
from hf_gradclip.kernels.eager import units as by_unit
from hf_gradclip.kernels.eager import whole as by_tensor
from hf_gradclip.kernels.rule import ByAxes
from hf_gradclip.strategy import Needs
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views.division import Cut

Found = tuple[list[Tensor | None], list[Tensor | None]]
"""The memory of the cuts that are one segment each, and the blocks of the others; None where a gradient is missing."""


class Cuts:
    """What one process holds of a model's gradients. Its numbers are one per unit of a cut, U of them.

    Args:
        layout: of the whole model.
        cuts: what is here.
    """

    def __init__(self, layout: Layout, cuts: Sequence[Cut]) -> None:
        whole = [cut for cut in cuts if not cut.kept]
        cut_up = [cut for cut in cuts if cut.kept]
        segments = np.concatenate([np.zeros(0, np.int64), *(cut.segments for cut in whole + cut_up)])
        order, every = segments.argsort(), np.arange(len(layout))
        each_once = np.array_equal(segments[order], every)  # where this process holds everything
        self._in_order = np.array_equal(segments, every)
        self._order = torch.from_numpy(order).to(layout.device) if each_once else None
        self._layout, self._dtype, self._device = layout, layout.dtype, layout.device
        self._whole = [cut.memory for cut in whole]
        self._cut_up = [(cut.memory, cut.start, math.prod(cut.shape or ()), cut.shape) for cut in cut_up]
        self._kept = [cut.kept for cut in cut_up]
        self._counts = [len(cut.segments) for cut in cut_up]
        self._segments = torch.from_numpy(segments).to(layout.device)

    def measure(
        self, memory: Sequence[Tensor | None], weights: Sequence[Tensor] | None, needs: Needs, rescale: bool
    ) -> NormStats:
        """The statistics of what is here, not reduced over ranks.

        Args:
            memory: the tensors of the cuts; None where a gradient is missing.
            weights: as many, to be measured too.
            needs: see View.measure.
            rescale: see View.measure.
        """
        found = self._find(memory)
        sums_U, largest_U = self._rescaled(*found) if rescale else self._statistics(*found, needs.max_abs)
        weights_U = None if weights is None else self._statistics(*self._find(weights), False)[0]
        return NormStats(
            self._added(sums_U),
            self._layout,
            None if largest_U is None else self._zeros().scatter_reduce(0, self._segments, largest_U, "amax"),
            weight_sumsq_S=None if weights_U is None else self._added(weights_U),
        )

    def apply_(self, memory: Sequence[Tensor | None], plan: ClipPlan) -> None:
        """Scale, then bound, what is here."""
        home = next((tensor.device for tensor in memory if tensor is not None), self._device)
        scale_U = self._numbers(plan.scale_S, home)
        bound_U = None if plan.bound_S is None else self._numbers(plan.bound_S, home)
        count = len(self._whole)
        whole, blocks = self._find(memory)
        if whole:
            kernels.apply_(whole, scale_U[:count], None if bound_U is None else bound_U[:count])
        if blocks:
            units = None if bound_U is None else bound_U[count:]
            kernels.unit_apply_(blocks, self._kept, self._counts, scale_U[count:], units)

    def by_axes(self) -> dict[int, ByAxes]:
        """The units of every cut that has some, by its memory."""
        segments = self._segments[len(self._whole) :].split(self._counts)
        units = zip(self._cut_up, self._kept, segments, strict=True)
        return {memory: ByAxes(kept, some) for (memory, *_), kept, some in units}

    def _numbers(self, number_S: Tensor, home: torch.device) -> Tensor:
        """A number of a plan for each unit here, shape (U,), where the memory is."""
        if number_S.ndim == 0:
            return number_on(home, number_S).expand(len(self._segments))
        return moved(number_S if self._in_order else number_S.index_select(0, self._segments), home)

    def _find(self, memory: Sequence[Tensor | None]) -> Found:
        whole = [memory[i] for i in self._whole]
        whole = [tensor if tensor is None or tensor.is_contiguous() else by_tensor.flat(tensor) for tensor in whole]
        blocks: list[Tensor | None] = []
        for i, start, length, shape in self._cut_up:
            tensor = memory[i]
            blocks.append(tensor if tensor is None or shape is None else tensor.narrow(0, start, length).view(shape))
        return whole, blocks

    def _statistics(
        self, whole: list[Tensor | None], blocks: list[Tensor | None], max_abs: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sums of squares and, if asked for, largest absolute elements, each of shape (U,); NaN gives inf in those."""
        found = [kernels.statistics(whole, self._dtype, self._device, max_abs)] if whole or not blocks else []
        if blocks:
            units = kernels.unit_sums(blocks, self._kept, self._counts, self._dtype, self._device)
            found.append((units, self._largest(blocks) if max_abs else None))
        if len(found) == 1:
            return found[0]
        (sums_W, largest_W), (sums_B, largest_B) = found
        largest = None if largest_W is None or largest_B is None else torch.cat([largest_W, largest_B])
        return torch.cat([sums_W, sums_B]), largest

    def _rescaled(self, whole: list[Tensor | None], blocks: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        """The same, by a division of each unit by its largest element before it is squared."""
        largest_U = torch.cat([by_tensor.largest(whole, self._dtype, self._device), self._largest(blocks)])
        divisor_U = by_tensor.divisors(largest_U)
        first, *divisors = divisor_U.split([len(whole), *self._counts])
        found = [by_tensor.sumsq(whole, first, self._dtype, self._device)]
        for block, kept, divisor in zip(blocks, self._kept, divisors, strict=True):
            sums = torch.zeros_like(divisor) if block is None else by_unit.sumsq(block, kept, divisor)
            found.append(moved(sums, self._device, self._dtype))
        return torch.cat(found) * divisor_U.square(), largest_U

    def _largest(self, blocks: list[Tensor | None]) -> Tensor:
        """Largest absolute element of every unit of the blocks; NaN gives inf."""
        found = [torch.zeros(0, dtype=self._dtype, device=self._device)]
        for block, kept, count in zip(blocks, self._kept, self._counts, strict=True):
            largest = found[0].new_zeros(count) if block is None else by_unit.max_abs(block, kept)
            found.append(moved(largest, self._device, self._dtype))
        return torch.cat(found).nan_to_num(nan=float("inf"), posinf=float("inf"))

    def _added(self, numbers_U: Tensor) -> Tensor:
        """Numbers of units added up by segment, shape (S,)."""
        if self._in_order:
            return numbers_U
        if self._order is not None:
            return numbers_U.index_select(0, self._order)
        return self._zeros().index_add_(0, self._segments, numbers_U)

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self._layout), dtype=self._dtype, device=self._device)

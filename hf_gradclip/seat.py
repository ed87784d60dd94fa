"""Where a step is judged: on the host, where somebody reads in every step anyway, or where the statistics are.

On a GPU each small operation of a strategy is a launch, which costs more than the operation. A step that must be read
for its policy brings its statistics to the host in one copy in the place of one flag, and strategy, report and record
go on there. What stays on the device are more than MOST segments, and every step that nobody may wait for.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_gradclip.budgets import Budgets
from hf_gradclip.device import upload
from hf_gradclip.strategy import Strategy, parts_of
from hf_gradclip.types import ClipPlan, Layout, NormStats, statistics_dtype

MOST = 16_384
"""Segments of a layout whose statistics are brought to the host; below torch's size for a sum by several threads, so
that ranks with the same numbers decide the same, whatever their number of threads."""


def seen_by(strategy: Strategy, layout: Layout, read: bool) -> Layout:
    """The layout that a strategy sees, in the place of a view's; one object for each.

    Args:
        strategy: whole.
        layout: of a view.
        read: whether every step is read to the host.

    Returns:
        The same on the CPU, if it is small; with only its parameters on the CPU, if they are few and what goes by unit
        comes last, since nothing after that may be read; else the layout itself.
    """
    if not read or layout.device.type == "cpu" or layout.dtype != statistics_dtype(torch.device("cpu")):
        return layout  # a device without float64 does not take the numbers of the host
    if len(layout) <= MOST:
        return layout.on_host
    if isinstance(strategy, Budgets):
        return layout  # whose groups by unit may come anywhere
    by_unit = [part.needs.units is not None for part in parts_of(strategy)]
    if len(layout.names) <= MOST and by_unit == sorted(by_unit) and any(by_unit):
        return layout.with_params_on_host
    return layout


def brought(strategy: Strategy, stats: NormStats, layout: Layout) -> NormStats:
    """A measurement where it is judged. Where that is the host, this is the one read of a step.

    Args:
        strategy: that judges it.
        stats: as measured.
        layout: of `seen_by`, for the layout of the statistics.
    """
    if layout is stats.layout:
        return stats
    if layout.device.type == "cpu":
        return _copied(stats, layout)
    weighs = any(part.needs.weights and part.needs.units is None for part in parts_of(strategy))
    asked = stats if weighs else replace(stats, weight_sumsq_S=None)  # what only units are compared with stays there
    by_param = _copied(asked.by_param, layout.by_param)
    seen = replace(stats, layout=layout)
    vars(seen).update(by_param=by_param, total=by_param.total)
    return seen


def handed(plan: ClipPlan, device: torch.device) -> ClipPlan:
    """A plan for gradients on a device: vectors are there; one number for all stays on the host if it is there."""
    bound_S = None if plan.bound_S is None else _there(plan.bound_S, device)
    return replace(plan, scale_S=_there(plan.scale_S, device), bound_S=bound_S)


def _copied(stats: NormStats, layout: Layout) -> NormStats:
    """Statistics of a device on the host, in one copy."""
    found = {name: getattr(stats, name) for name in ("sumsq_S", "max_abs_S", "weight_sumsq_S", "loss")}
    there: dict[str, Tensor] = {name: numbers for name, numbers in found.items() if numbers is not None}
    packed = torch.cat([numbers.reshape(-1) for numbers in there.values()]) if len(there) > 1 else stats.sumsq_S
    parts = packed.cpu().split([numbers.numel() for numbers in there.values()])
    here = {name: part.view(numbers.shape) for (name, numbers), part in zip(there.items(), parts, strict=True)}
    return replace(stats, layout=layout, **here)


def _there(number_S: Tensor, device: torch.device) -> Tensor:
    if number_S.ndim == 0 or number_S.device == device:
        return number_S
    return upload(number_S, number_S.dtype, device)

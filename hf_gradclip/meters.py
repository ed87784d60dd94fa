"""The numbers of one step that a report counts, where they are: on the host, or on a device until they are read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_gradclip.types import ClipPlan, Layout, NormStats, is_one, norm_after

Meters = dict[str, Tensor]

ROW = ("norm", "finite", "skipped", "tensors", "norm_post", "scale_max", "threshold")
"""What is kept of a step that nobody reads."""


def row_of(
    stats: NormStats, plan: ClipPlan, finite: Tensor | bool, skipped: Tensor | bool, zero: Tensor, nan: Tensor
) -> tuple[Tensor, ...]:
    """The numbers of ROW, each 0-d, in as few launches as can be."""
    flags = [flag if isinstance(flag, Tensor) else zero + float(flag) if flag else zero for flag in (finite, skipped)]
    threshold = nan if plan.threshold is None else plan.threshold
    clipped = zero if is_one(plan.scale_S) and plan.bound_S is None else tensors_in(plan, stats.layout)
    return stats.total, *flags, clipped, _post(stats, plan), plan.largest, threshold


def read_rows(values: list[float], read: dict[str, float]) -> list[float]:
    """Add rows that came to the host to what else was read; their finite norms."""
    norms = []
    for first in range(0, len(values), len(ROW)):
        norm, finite, skipped, tensors, post, largest, threshold = values[first : first + len(ROW)]
        read["skipped"] += skipped > 0
        read["nonfinite"] += finite == 0
        if finite > 0:
            norms.append(norm)
            read["clipped"] += skipped > 0 or tensors > 0
            if threshold == threshold:
                read["threshold"] = threshold
        if finite and not skipped:
            read["tensors"] += tensors
            read["norm_in"], read["norm_post"], read["scale_max"] = norm, post, largest
    return norms


def tensors_in(plan: ClipPlan, layout: Layout) -> Tensor:
    """How many parameters hold a segment that is clipped, 0-d."""
    if plan.bound_S is None and plan.scale_S.ndim and layout.unit_S is not None:
        return (layout.over_params(plan.scale_S, "min") < 1).sum()
    clipped_S = plan.clipped_S
    if clipped_S.ndim == 0:
        return clipped_S * len(layout.names)
    if layout.unit_S is not None:
        clipped_S = layout.over_params(clipped_S.to(layout.dtype), "max") > 0
    return clipped_S.sum()


def applied(stats: NormStats, plan: ClipPlan) -> Meters:
    """The norm before and after, NaN after where elements were bounded; and the largest factor."""
    post, largest = _post(stats, plan).to(stats.total), plan.largest.to(stats.total)
    return {"norm_in": stats.total, "norm_post": post, "scale_max": largest}


def _post(stats: NormStats, plan: ClipPlan) -> Tensor:
    """The norm after; NaN where elements were bounded."""
    post = norm_after(stats, plan if plan.bound_S is None else replace(plan, bound_S=None))
    return post if plan.bound_S is None else torch.where((plan.bound_S < float("inf")).any(), float("nan"), post)

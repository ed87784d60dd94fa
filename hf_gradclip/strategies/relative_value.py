"""Clamp the elements of each parameter's gradient to a multiple of their root mean square."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_gradclip.strategy import Needs, State, Stateless, Strategy, check_types, require
from hf_gradclip.types import ClipPlan, Layout, NormStats


@dataclass(frozen=True)
class RelativeValue(Strategy):
    """g <- clamp(g, -k RMS_i, +k RMS_i), RMS_i being the root mean square of the elements of parameter i in this step.

    `value` without a number in units of the gradient: it bounds single elements far out among their own. A gradient
    that is large as a whole is left alone, since its RMS is as large. The largest of a million normal numbers is at 5
    RMS. Where a step sees one row in a hundred of an embedding, the RMS of the whole is a tenth of that of these
    rows. No element can be above the root of the number of elements, so that a vector of 64 is never bounded at 8. It
    changes the direction of the gradient, and comes last in a chain.

    Args:
        factor: k; > 0. There is no usual value, so no default; 10 to 100 leaves a sound gradient nearly alone.

    Example:
        >>> preview(RelativeValue(factor=0.5), [[2.0, 100.0]])
        [[1.0, 50.0]]

    References:
        None for this form. Pan, Li, "Toward Understanding Why Adam Converges Faster Than SGD for Transformers", 2023,
        arXiv 2306.00204, clip coordinates relative to a percentile of their tensor.
    """

    factor: float

    needs = Needs(max_abs=True)
    bounds = True
    per_parameter = True

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "factor", lambda v: v > 0, "must be > 0. To switch clipping off use clip='none'.")

    def init(self, layout: Layout) -> State:
        """Nothing to remember."""
        return Stateless()

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """A bound on the segments that hold a larger element; the others are not touched."""
        assert stats.max_abs_S is not None  # needs says so
        limit_S = self.factor * (stats.sumsq_S / stats.layout.numel_S.clamp(min=1)).sqrt()
        far_S = (stats.max_abs_S > limit_S) & (limit_S > 0)  # not where the squares of all elements round to 0
        bound_S = torch.where(far_S, limit_S, float("inf"))
        return ClipPlan(stats.sumsq_S.new_ones(()), bound_S=bound_S), state

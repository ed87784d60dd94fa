"""Clamp every element to a range: clip in its first meaning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_gradclip.strategy import Needs, State, Stateless, Strategy, check_types, require
from hf_gradclip.types import ClipPlan, Layout, NormStats


@dataclass(frozen=True)
class Value(Strategy):
    """g <- clamp(g, -max_value, +max_value). Changes the direction of the gradient; comes last in a chain.

    Args:
        max_value: the limit per element, in units of the gradient; > 0. There is no usual value, so no default.

    Example:
        >>> preview(Value(max_value=1.0), [[0.5, 3.0]])
        [[0.5, 1.0]]
    """

    max_value: float

    needs = Needs(max_abs=True)
    bounds = True

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "max_value", lambda v: v > 0, "must be > 0. To switch clipping off use clip='none'.")

    def init(self, layout: Layout) -> State:
        """Nothing to remember."""
        return Stateless()

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """A bound on the segments that hold a larger element; the others are not touched."""
        assert stats.max_abs_S is not None  # needs says so
        limit = stats.sumsq_S.new_full((), self.max_value)
        bound_S = torch.where(stats.max_abs_S > limit, limit, float("inf"))
        return ClipPlan(scale_S=stats.sumsq_S.new_ones(()), bound_S=bound_S, threshold=limit), state

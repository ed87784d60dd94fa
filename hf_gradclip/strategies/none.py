"""Measure and log, never clip."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradclip.strategy import Needs, State, Stateless, Strategy
from hf_gradclip.types import ClipPlan, Layout, NormStats


@dataclass(frozen=True)
class NoClip(Strategy):
    """Leave every gradient alone; the norms are still measured and logged.

    Example:
        >>> preview(NoClip(), [0.5, 1e6])
        [0.5, 1000000.0]
    """

    needs = Needs()

    def init(self, layout: Layout) -> State:
        """Nothing to remember."""
        return Stateless()

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """The scale is always 1."""
        return ClipPlan(scale_S=stats.sumsq_S.new_ones(())), state

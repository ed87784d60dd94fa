"""Bring a gradient whose norm stands out among those before it down to their median."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradclip.outlier import judge, nothing_seen
from hf_gradclip.strategy import Needs, State, Strategy, limit_scale
from hf_gradclip.types import ClipPlan, Layout, NormStats


@dataclass(frozen=True)
class AdaptiveNorm(Strategy):
    """Scale the whole gradient by median / n where its norm n stands out, and leave it alone everywhere else.

    Median and spread are of the logarithms of the last 64 norms, see `hf_gradclip.outlier` for the rule. A norm three
    times the median is the least that can stand out, and in the first 16 steps eight times. From the third step on
    the rule protects. A norm that stays at another level is the new level after 33 steps at most. Nothing is to be set,
    and the norm's own unit does not matter: norms times a constant are clipped alike.

    Example:
        >>> preview(AdaptiveNorm(), [1.0, 1.2, 0.8, 50.0, 1.1])
        [1.0, 1.2, 0.8, 1.0, 1.1]

    References:
        The median and its absolute deviation as a test for outliers: Hampel, "The Influence Curve and Its Role in
        Robust Estimation", Journal of the American Statistical Association 69, 1974.
    """

    needs = Needs()

    def init(self, layout: Layout) -> State:
        """No norm seen yet."""
        return nothing_seen(layout)

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale for all segments, from the total norm."""
        cap, threshold, past = judge(state, stats.total)
        return ClipPlan(limit_scale(cap, stats.total), threshold=threshold), past

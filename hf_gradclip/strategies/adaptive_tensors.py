"""Bring each parameter whose gradient stands out among its own earlier ones down to their median."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradclip.outlier import judge, nothing_seen_each
from hf_gradclip.strategy import Needs, State, Strategy, limit_scale
from hf_gradclip.types import ClipPlan, Layout, NormStats


@dataclass(frozen=True)
class AdaptiveTensors(Strategy):
    """The rule of `adaptive_norm` for each parameter's gradient by itself.

    It sees a spike that sits in one tensor and is too small for the norm of the whole to show it. A norm of 0 (LoRA's A
    at its first step, an expert without a token) says nothing and is not remembered. Tensors that are judged one by
    one are many, so that it clips some tensor by mistake more often than `adaptive_norm` clips a step.

    Example:
        >>> preview(AdaptiveTensors(), [[1.0, 9.0], [1.0, 9.0], [1.0, 9.0], [50.0, 9.0]])
        [[1.0, 9.0], [1.0, 9.0], [1.0, 9.0], [1.0, 9.0]]

    References:
        See `adaptive_norm`.
    """

    needs = Needs()
    per_parameter = True

    def init(self, layout: Layout) -> State:
        """No norm seen yet."""
        return nothing_seen_each(layout)

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale per segment."""
        cap_S, _, pasts = judge(state, stats.norm_S)
        return ClipPlan(limit_scale(cap_S, stats.norm_S)), pasts

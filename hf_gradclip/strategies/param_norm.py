"""One limit on the norm of each parameter, so that one tensor's spike does not shrink the others."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradclip.strategy import Needs, State, Stateless, Strategy, check_types, limit_scale, require
from hf_gradclip.types import ClipPlan, Layout, NormStats


@dataclass(frozen=True)
class ParamNorm(Strategy):
    """Scale each parameter's gradient by min(1, max_norm / n_i), n_i being its own 2-norm.

    To spend a global budget c on P parameters use c / sqrt(P). Keras calls this `clipnorm`.

    Args:
        max_norm: the limit per parameter, in units of the gradient; > 0. There is no usual value, so no default.

    Example:
        >>> preview(ParamNorm(max_norm=1.0), [[0.5, 4.0]])
        [[0.5, 1.0]]
    """

    max_norm: float

    needs = Needs()
    per_parameter = True

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "max_norm", lambda v: v > 0, "must be > 0. To switch clipping off use clip='none'.")

    def init(self, layout: Layout) -> State:
        """Nothing to remember."""
        return Stateless()

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale per segment."""
        threshold = stats.sumsq_S.new_full((), self.max_norm)
        return ClipPlan(limit_scale(self.max_norm, stats.norm_S), threshold=threshold), state

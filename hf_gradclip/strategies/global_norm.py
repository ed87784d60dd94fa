"""One limit on the norm of the whole gradient: what `max_grad_norm` does."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradclip.strategy import Needs, State, Stateless, Strategy, check_types, require, torch_scale
from hf_gradclip.types import ClipPlan, Layout, NormStats


@dataclass(frozen=True)
class GlobalNorm(Strategy):
    """Scale all gradients by min(1, max_norm / (n + 1e-6)), n being the norm of the whole gradient.

    Args:
        max_norm: the limit, in units of the gradient; > 0, and inf never clips.
        norm_type: 2, or inf for the largest absolute element (the whole gradient is still scaled, not clamped).

    Example:
        >>> preview(GlobalNorm(max_norm=1.0), [0.5, 2.0, [3.0, 4.0]])
        [0.5, 1.0, [0.6, 0.8]]

    References:
        Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013, arXiv 1211.5063.
    """

    max_norm: float = 1.0
    norm_type: float = 2.0

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "max_norm", lambda v: v > 0, "must be > 0. To switch clipping off use clip='none'.")
        require(self, "norm_type", lambda v: v in (2.0, float("inf")), "must be 2 or inf.")

    @property
    def needs(self) -> Needs:
        """The largest element for norm_type=inf."""
        return Needs(max_abs=self.norm_type != 2.0)

    def init(self, layout: Layout) -> State:
        """Nothing to remember."""
        return Stateless()

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale for all segments."""
        norm = stats.total if self.norm_type == 2.0 else stats.max_abs
        return ClipPlan(torch_scale(self.max_norm, norm), threshold=norm.new_full((), self.max_norm)), state

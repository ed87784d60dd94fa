"""Shrink the norm of the whole gradient smoothly below a limit, instead of cutting it there."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradclip.strategy import Needs, State, Stateless, Strategy, check_types, require
from hf_gradclip.types import ClipPlan, Layout, NormStats


@dataclass(frozen=True)
class Soft(Strategy):
    """Scale all gradients by c / (c + n), n being the norm of the whole gradient and c = max_norm.

    The norm after it is c n / (c + n): half of c where n = c, and below c however large n is. Every step is scaled,
    a small norm too (by 1 - n / c), so `clip/rate` is 1 and the learning rate acts a little smaller throughout.

    Args:
        max_norm: what the norm never reaches, in units of the gradient; > 0, and inf never scales.

    Example:
        >>> preview(Soft(max_norm=1.0), [0.1, 1.0, 9.0])
        [0.09091, 0.5, 0.9]
    """

    max_norm: float = 1.0

    needs = Needs()

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "max_norm", lambda v: v > 0, "must be > 0. To switch clipping off use clip='none'.")

    def init(self, layout: Layout) -> State:
        """Nothing to remember."""
        return Stateless()

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale for all segments; written 1 / (1 + n / c), which an infinite c leaves at 1."""
        return ClipPlan(1 / (1 + stats.total / self.max_norm)), state

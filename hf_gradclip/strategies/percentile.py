"""Clip each parameter's gradient at a percentile of its own last norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.outlier import Pasts, judge, nothing_seen_each
from hf_gradclip.strategy import Needs, State, Strategy, check_types, limit_scale, require
from hf_gradclip.types import ClipPlan, Layout, NormStats


class PercentileState(NamedTuple):
    """What was seen of each parameter's norm.

    Args:
        seen_S: norms ever put in, int64.
        norms_S: the windows, shape (S, window), inf where they are not filled yet.
        past: by which a norm stands out.
    """

    seen_S: Tensor
    norms_S: Tensor
    past: Pasts


@dataclass(frozen=True)
class Percentile(Strategy):
    """Limit each parameter's norm to the one at place floor(percentile k / 100) among its k last norms in order.

    This step's norm is one of them, and places count from 0. k is at most `window`; while fewer are known the place is
    among those. The default clips the highest in twenty of a tensor whose level stays. A low percentile clips nearly
    every step: 5, which bitsandbytes recommended, leaves every tensor at about its smallest norm of the last 100 steps.

    It is the `percentile_clipping` that bitsandbytes had before 0.50, whose window began with 100 zeros, so that until
    it was filled a percentile of 5 made the gradient 0; otherwise the two agree. A zero norm (an expert without a
    token) is not remembered here, and a norm that stands out by the rule of `adaptive_norm` is limited to where that
    begins, for in a short window a high percentile is the loudest step itself. The preset `percentile_bitsandbytes` has
    its numbers.

    Args:
        percentile: where the limit lies among the norms; in [0, 100]. 100 clips only what stands out.
        window: norms remembered of each parameter, 8 bytes each; >= 1.

    Example:
        >>> preview(Percentile(percentile=50), [[1.0, 4.0], [2.0, 3.0], [3.0, 9.0], [9.0, 3.0]])
        [[1.0, 4.0], [2.0, 3.0], [2.0, 4.0], [3.0, 3.0]]

    References:
        Dettmers et al., bitsandbytes, functional.percentile_clipping, release 0.26. `autoclip` is the same idea for the
        norm of the whole.
    """

    percentile: float = 95.0
    window: int = 100

    needs = Needs()
    per_parameter = True

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "percentile", lambda v: 0 <= v <= 100, "must be in [0, 100]. The default is 95.")
        require(self, "window", lambda v: 1 <= v <= 100_000, "must be from 1 to 100000. bitsandbytes used 100.")

    def init(self, layout: Layout) -> State:
        """Empty windows."""
        size = (len(layout), self.window)
        norms_S = torch.full(size, float("inf"), dtype=layout.dtype, device=layout.device)
        seen_S = torch.zeros(len(layout), dtype=torch.int64, device=layout.device)
        return PercentileState(seen_S, norms_S, nothing_seen_each(layout))

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale per segment."""
        norm_S = stats.norm_S
        _, begin_S, past = judge(state.past, norm_S)
        present_S = norm_S > 0
        here = torch.arange(self.window, device=norm_S.device) == (state.seen_S % self.window)[:, None]
        norms_S = torch.where(here & present_S[:, None], norm_S[:, None], state.norms_S)
        seen_S = state.seen_S + present_S

        known_S = seen_S.clamp(1, self.window)
        place_S = (known_S.to(norm_S.dtype) * self.percentile / 100).floor().long()
        place_S = torch.minimum(place_S, known_S - 1)
        limit_S = norms_S.sort(-1).values.gather(-1, place_S[:, None])[:, 0]
        scale_S = limit_scale(torch.minimum(limit_S, begin_S), norm_S)
        return ClipPlan(scale_S), PercentileState(seen_S, norms_S, past)

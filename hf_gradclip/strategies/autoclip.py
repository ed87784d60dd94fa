"""Clip at a percentile of the norms seen so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.outlier import Past, judge, nothing_seen
from hf_gradclip.strategy import Needs, State, Strategy, check_types, limit_scale, require
from hf_gradclip.types import ClipPlan, Layout, NormStats


class AutoClipState(NamedTuple):
    """What was seen.

    Args:
        seen: norms ever put in, 0-d.
        norms: the window, shape (window,), inf where it is not filled yet.
        past: by which a norm stands out.
    """

    seen: Tensor
    norms: Tensor
    past: Past


@dataclass(frozen=True)
class AutoClip(Strategy):
    """Limit the norm of the whole gradient to a percentile of the last `window` norms, this one included.

    A low percentile clips often: 10 clips nine steps of ten. The paper keeps every norm for ever; a window forgets
    the large norms of the first steps. Two more holes are closed: zero norms are not remembered, else they would pull
    the limit to 0; and a norm that stands out by the rule of `adaptive_norm` is limited to the median, since with a
    high percentile one loud step among a few would be its own limit.

    Args:
        percentile: where the limit lies among the norms, interpolated linearly; in (0, 100]. 100 clips only
            what stands out.
        window: norms remembered; >= 1.

    Example:
        >>> preview(AutoClip(percentile=50), [1.0, 2.0, 3.0, 9.0])
        [1.0, 1.5, 2.0, 2.5]

    References:
        Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: Adaptive Gradient Clipping for Source Separation Networks",
        2020, arXiv 2007.14469.
    """

    percentile: float = 10.0
    window: int = 1000

    needs = Needs()

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "percentile", lambda v: 0 < v <= 100, "must be in (0, 100]. The paper uses 10.")
        require(self, "window", lambda v: 1 <= v <= 1_000_000, "must be from 1 to 1000000. The default is 1000.")

    def init(self, layout: Layout) -> State:
        """An empty window."""
        norms = torch.full((self.window,), float("inf"), dtype=layout.dtype, device=layout.device)
        seen = torch.zeros((), dtype=torch.int64, device=layout.device)
        return AutoClipState(seen, norms, nothing_seen(layout))

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale for all segments, from the total norm."""
        norm = stats.total
        cap, begin, past = judge(state.past, norm)
        here = torch.arange(self.window, device=norm.device) == state.seen % self.window
        norms = torch.where(here & (norm > 0), norm, state.norms)
        seen = state.seen + (norm > 0)

        rank = (seen.clamp(min=1, max=self.window) - 1).to(norm.dtype) * (self.percentile / 100)
        low = rank.floor().long()
        high = (low + 1).clamp(max=self.window - 1)
        ordered = norms.sort().values
        at_low, at_high = ordered[low.view(1)], ordered[high.view(1)]
        limit = torch.where(rank == low, at_low, at_low + (rank - low) * (at_high - at_low)).view(())
        scale = limit_scale(torch.minimum(limit, cap), norm)
        new = AutoClipState(seen, norms, past)
        return ClipPlan(scale, threshold=torch.minimum(limit, begin)), new

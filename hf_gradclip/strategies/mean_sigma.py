"""Limit the norm of the whole update, or gradient, to some deviations above the mean of the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.outlier import Past, judge, nothing_seen
from hf_gradclip.strategy import Needs, State, Strategy, check_types, limit_scale, require
from hf_gradclip.types import ClipPlan, Layout, NormStats


class MeanSigmaState(NamedTuple):
    """What was seen.

    Args:
        seen: norms ever put in, 0-d.
        norms: the window, shape (window,), 0 where it is not filled yet.
        past: by which a norm stands out.
    """

    seen: Tensor
    norms: Tensor
    past: Past


@dataclass(frozen=True)
class MeanSigma(Strategy):
    """Limit the norm to mean + sigmas * deviation of the `window` norms before it, as they were before a clip.

    Made for updates (`clip={"update": "mean_sigma"}`), whose norm rises before the loss does; it works for gradients
    too. The deviation is that of all norms in the window (divided by their number). Norms enter as they came, so that a
    lasting change of level is the new mean after a window at most; what was clipped would hold the limit down.

    Three holes of the published rule are closed. One loud norm lifts mean and deviation for a whole window, so the
    limit is at most where a norm stands out by the rule of `adaptive_norm`; this alone protects before `min_values`
    are known, where the published rule does nothing. The deviation is at least `min_sigma` * mean, for the norms of
    Adam's updates hardly vary, and the published floor is an absolute 1e-6. Zero norms are not remembered.

    Args:
        window: norms remembered; >= 2.
        sigmas: deviations above the mean at which a norm is clipped, and to which; > 0.
        min_values: norms that must be known before mean and deviation are used; 2 to `window`.
        min_sigma: least deviation as a share of the mean; >= 0.

    Example:
        >>> preview(MeanSigma(window=4, min_values=3, sigmas=2), [1.0, 1.1, 0.9, 1.5, 1.5, 50.0])
        [1.0, 1.1, 0.9, 1.163, 1.5, 1.77]

    References:
        levanter, ClipUpdateNormConfig (87ec0fc), by default 128 norms, 3 deviations and 64 values; used with 2
        deviations in the Marin 32B run, 2025, which the preset `mean_sigma_marin` has.
    """

    window: int = 128
    sigmas: float = 3.0
    min_values: int = 64
    min_sigma: float = 0.05

    needs = Needs()

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "window", lambda v: 2 <= v <= 1_000_000, "must be from 2 to 1000000. levanter uses 128.")
        require(self, "sigmas", lambda v: 0 < v < float("inf"), "must be > 0. levanter uses 3, Marin 2.")
        words = f"must be 2 to window ({self.window}). levanter uses half of it."
        require(self, "min_values", lambda v: 2 <= v <= self.window, words)
        require(self, "min_sigma", lambda v: 0 <= v < float("inf"), "must be >= 0. The default is 0.05.")

    def init(self, layout: Layout) -> State:
        """An empty window."""
        norms = torch.zeros(self.window, dtype=layout.dtype, device=layout.device)
        seen = torch.zeros((), dtype=torch.int64, device=layout.device)
        return MeanSigmaState(seen, norms, nothing_seen(layout))

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale for all segments, from the total norm."""
        norm, seen = stats.total, state.seen
        _, begin, past = judge(state.past, norm)
        place = torch.arange(self.window, device=norm.device)
        known, count = place < seen, seen.clamp(1, self.window)
        mean = state.norms.sum() / count
        sigma = (torch.where(known, state.norms - mean, 0.0).square().sum() / count).sqrt()
        limit = mean + self.sigmas * torch.maximum(sigma, self.min_sigma * mean)
        limit = torch.where(seen < self.min_values, begin, torch.minimum(limit, begin))
        norms = torch.where((place == seen % self.window) & (norm > 0), norm, state.norms)
        new = MeanSigmaState(seen + (norm > 0), norms, past)
        return ClipPlan(limit_scale(limit, norm), threshold=limit), new

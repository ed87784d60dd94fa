"""Leave a step out whose norm, or loss, is far above those before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.outlier import Past, judge, nothing_seen
from hf_gradclip.strategy import Needs, State, Strategy, check_types, require
from hf_gradclip.types import ClipPlan, Layout, NormStats

ALONE = 3
"""So many values in a row that stand out are a change of level."""


class SkipStepState(NamedTuple):
    """The last values in rings, shape (window,), and how many were ever written, 0-d.

    Args:
        norms: of the whole gradient, or their logarithms.
        norms_seen: how many.
        losses: of the steps.
        losses_seen: how many.
        row: steps in a row that were skipped, 0-d.
        past: by which a norm stands out before `min_values` are known.
    """

    norms: Tensor
    norms_seen: Tensor
    losses: Tensor
    losses_seen: Tensor
    row: Tensor
    past: Past


@dataclass(frozen=True)
class SkipStep(Strategy):
    """Skip a step whose value lies more than `sigmas` deviations above the mean of the last `window` values.

    The value is the norm of the whole gradient, the loss, or each of them. Mean and (unbiased) deviation are of the
    values before this one, and nothing is skipped until `min_values` of them are known. A skip is exact: no weight,
    moment, decay or counter moves. Clipping is left to others: `skip_step+zclip`.

    The published rule is kept, with its holes closed. A NaN or inf is kept out of the window, where it would skip every
    step for `window` steps, and so is a norm of 0, of which many would skip every other step. A skipped value enters
    the window as the limit that it broke, else one loud step would let the next one pass; from the third in a row on it
    enters as it is, so that a lasting change of level is accepted after a few steps. Before `min_values` are known,
    from the third step on, a norm is skipped that stands out by the rule of `adaptive_norm`, three times in a row at
    most. The deviation is at least `min_sigma` * mean, so that constant values do not make every change an outlier. The
    window is saved with the checkpoint.

    Args:
        window: values remembered; >= 2.
        sigmas: deviations above the mean at which a step is skipped; > 0.
        min_values: values known before mean and deviation are used; 2 to `window`. No loss is judged earlier.
        on: "norm", "loss" or "both" (skip if either stands out). The loss is the mean over ranks and micro-batches;
            Trainer and `attach` provide it, in a torch loop it is `clipper.step(loss=loss)`.
        log_norm: judge the logarithm of the norm, whose distribution is less skewed.
        min_sigma: least deviation as a share of the mean (of the norm itself where its logarithm is judged); >= 0.

    Example:
        >>> preview(SkipStep(window=4, min_values=3, sigmas=3), [1.0, 1.1, 0.9, 8.0, 1.0])
        [1.0, 1.1, 0.9, None, 1.0]

    References:
        OLMo-core, SkipStepOptimizer, commit fa6c501; "2 OLMo 2 Furious", 2025, arXiv 2501.00656.
    """

    window: int = 128
    sigmas: float = 6.0
    min_values: int = 64
    on: str = "norm"
    log_norm: bool = False
    min_sigma: float = 0.05

    skips = True
    remembers_by = ("log_norm",)

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "window", lambda v: 2 <= v <= 1_000_000, "must be from 2 to 1000000. OLMo uses 128.")
        require(self, "sigmas", lambda v: 0 < v < float("inf"), "must be > 0. OLMo uses 6.")
        require(
            self, "min_values", lambda v: 2 <= v <= self.window, f"must be 2 to window ({self.window}). OLMo uses 64."
        )
        require(self, "on", lambda v: v in ("norm", "loss", "both"), "must be norm, loss or both.")
        require(self, "min_sigma", lambda v: 0 <= v < float("inf"), "must be >= 0. The default is 0.05.")

    @property
    def needs(self) -> Needs:
        """The loss, if it is judged."""
        return Needs(loss=self.on != "norm")

    def init(self, layout: Layout) -> State:
        """No value seen yet."""
        ring = torch.zeros(self.window, dtype=layout.dtype, device=layout.device)
        seen = torch.zeros((), dtype=torch.int64, device=layout.device)
        return SkipStepState(ring, seen, ring.clone(), seen.clone(), seen.clone(), nothing_seen(layout))

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """Scale nothing; say whether to skip."""
        skip = torch.zeros((), dtype=torch.bool, device=stats.sumsq_S.device)
        threshold = None
        if self.on != "loss":
            _, begin, past = judge(state.past, stats.total)
            begin = torch.where(state.row < ALONE, begin, float("inf"))
            norm, begin = (stats.total.log(), begin.log()) if self.log_norm else (stats.total, begin)
            limit = self._limit(state.norms, state.norms_seen, self.log_norm)
            limit = torch.where(state.norms_seen < self.min_values, begin, limit)
            skip = skip | ~(norm <= limit)
            threshold = limit.exp() if self.log_norm else limit
            known = norm.isfinite() & (stats.total > 0)
            norms, norms_seen = self._enter(norm, limit, state.row, state.norms, state.norms_seen, known)
            state = state._replace(norms=norms, norms_seen=norms_seen, past=past)
        if self.on != "norm":
            assert stats.loss is not None  # needs says so
            limit = self._limit(state.losses, state.losses_seen, False)
            limit = torch.where(state.losses_seen < self.min_values, float("inf"), limit)
            skip = skip | ~(stats.loss <= limit)
            known = stats.loss.isfinite()
            losses, losses_seen = self._enter(stats.loss, limit, state.row, state.losses, state.losses_seen, known)
            state = state._replace(losses=losses, losses_seen=losses_seen)
        plan = ClipPlan(stats.sumsq_S.new_ones(()), threshold=threshold, skip=skip)
        return plan, state._replace(row=(state.row + 1) * skip)

    def _limit(self, ring: Tensor, seen: Tensor, log: bool) -> Tensor:
        """The largest value that is not skipped, from those before it."""
        place = torch.arange(self.window, device=ring.device)
        known, count = place < seen, seen.clamp(2, self.window)
        mean = torch.where(known, ring, 0.0).sum() / count
        sigma = (torch.where(known, ring - mean, 0.0).square().sum() / (count - 1)).sqrt()
        least = self.min_sigma * (torch.ones_like(mean) if log else mean.abs())
        return mean + self.sigmas * torch.maximum(sigma, least)

    def _enter(
        self, value: Tensor, limit: Tensor, row: Tensor, ring: Tensor, seen: Tensor, written: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The ring with a value in it if it is to be `written`, and how many ever were."""
        place = torch.arange(self.window, device=ring.device)
        entered = torch.where(row < ALONE - 1, torch.minimum(value, limit), value)
        return torch.where(written & (place == seen % self.window), entered, ring), seen + written

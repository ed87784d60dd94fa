"""Clip a step whose norm is an outlier among the norms before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.outlier import Past, judge, nothing_seen
from hf_gradclip.strategy import Needs, State, Strategy, check_types, choose, limit_scale, require, torch_scale, where
from hf_gradclip.types import ClipPlan, Layout, NormStats


class ZClipState(NamedTuple):
    """Statistics of the total norm, all 0-d, and the norms of the warm-up."""

    seen: Tensor
    mean: Tensor
    var: Tensor
    spikes: Tensor
    past: Past


@dataclass(frozen=True)
class ZClip(Strategy):
    """Limit a norm that lies more than `z_threshold` deviations above its moving mean.

    The first `warmup_steps` norms are collected; their mean and variance start the statistics. Then
    z = (G - mean) / sigma. A spike (z > z_threshold) is limited to mean + z_threshold^2 sigma / z, so the larger the
    spike, the closer to the mean; the moving statistics see the limited value.

    `mode="safe"` closes four holes of the published code. In the warm-up, from its third step on, a norm that stands
    out by the rule of `adaptive_norm` is limited to the median and collected as that, else one loud step would lift
    the threshold for hundreds of steps. sigma is at least `min_sigma` * mean, so that constant norms do not make every
    change a spike. After `release_after` spikes in a row the mean takes the new norm (the variance stays), so that a
    lasting change of level does not clip every step for ever. Zero norms are not remembered.

    `mode="reference"` is the authors' code: the warm-up collects raw norms, `max_norm` caps every step, the variance
    uses the new mean, and the holes are open. The preset `zclip_paper` has it with the authors' numbers.

    Args:
        z_threshold: deviations above the mean at which a norm is a spike; > 0.
        alpha: weight of the past in the moving mean and variance; in [0, 1).
        warmup_steps: norms collected before the statistics are used; >= 2.
        max_norm: a fixed limit in the warm-up, in reference mode in every step, in units of the gradient; > 0. The
            default, inf, is none.
        min_sigma: least deviation as a share of the mean; >= 0. Safe mode only.
        release_after: spikes in a row that count as a new level; >= 1. Safe mode only.
        mode: "safe" or "reference".

    Example:
        >>> preview(ZClip(warmup_steps=3), [1.0, 1.2, 0.8, 5.0, 1.1])
        [1.0, 1.2, 0.8, 1.042, 1.1]

    References:
        Kumar, Owen, Roy Chowdhury, Guera, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025,
        arXiv 2504.02507; its code, commit 584ce4f.
    """

    z_threshold: float = 2.5
    alpha: float = 0.97
    warmup_steps: int = 25
    max_norm: float = float("inf")
    min_sigma: float = 0.05
    release_after: int = 20
    mode: str = "safe"

    needs = Needs()

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "z_threshold", lambda v: 0 < v < float("inf"), "must be > 0. The paper uses 2.5.")
        require(self, "alpha", lambda v: 0 <= v < 1, "must be in [0, 1). The paper uses 0.97.")
        require(self, "warmup_steps", lambda v: v >= 2, "must be >= 2, to have a variance. The paper uses 25.")
        require(self, "max_norm", lambda v: v > 0, "must be > 0. The paper uses 1.0; inf is no fixed limit.")
        require(self, "min_sigma", lambda v: 0 <= v < float("inf"), "must be >= 0. The default is 0.05.")
        require(self, "release_after", lambda v: v >= 1, "must be >= 1. The default is 20.")
        require(self, "mode", lambda v: v in ("safe", "reference"), "must be safe or reference.")

    def init(self, layout: Layout) -> State:
        """No norm seen yet."""
        zero = torch.zeros((), dtype=layout.dtype, device=layout.device)
        count = torch.zeros((), dtype=torch.int64, device=layout.device)
        return ZClipState(seen=count, mean=zero, var=zero.clone(), spikes=count.clone(), past=nothing_seen(layout))

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale for all segments, from the total norm."""
        norm, warm = stats.total, state.seen < self.warmup_steps
        if self.mode == "reference":
            found = choose(warm, lambda: self._collect(norm, norm, state), lambda: self._reference(norm, state))
            (limit, threshold), new = found
            return ClipPlan(torch_scale(limit, norm), threshold=threshold), new
        (limit, threshold), new = choose(warm, lambda: self._guarded(norm, state), lambda: self._safe(norm, state))
        return ClipPlan(limit_scale(limit, norm), threshold=threshold), where(norm > 0, new, state)

    def _guarded(self, norm: Tensor, state: ZClipState) -> tuple[_Limit, ZClipState]:
        """A step of the warm-up, in which what stands out counts as the median."""
        cap, begin, past = judge(state.past, norm)
        (limit, _), new = self._collect(norm, torch.minimum(norm, cap), state)
        return _Limit(torch.minimum(limit, cap), torch.minimum(limit, begin)), new._replace(past=past)

    def _collect(self, norm: Tensor, x: Tensor, state: ZClipState) -> tuple[_Limit, ZClipState]:
        """Running mean and population variance of the norms as far as they count, x (Welford's recurrence)."""
        limit = torch.full_like(norm, self.max_norm)
        seen = state.seen + 1
        mean = state.mean + (x - state.mean) / seen
        var = state.var + ((x - state.mean) * (x - mean) - state.var) / seen
        return _Limit(limit, limit), ZClipState(seen, mean, var, state.spikes, state.past)

    def _safe(self, norm: Tensor, state: ZClipState) -> tuple[_Limit, ZClipState]:
        sigma = torch.maximum(state.var.sqrt(), self.min_sigma * state.mean)
        z = (norm - state.mean) / sigma
        spike = z > self.z_threshold
        none = float("inf")
        limit = choose(spike, lambda: state.mean + self.z_threshold**2 * sigma / z, lambda: torch.full_like(z, none))
        x = torch.minimum(norm, limit)
        mean = self.alpha * state.mean + (1 - self.alpha) * x
        var = self.alpha * state.var + (1 - self.alpha) * (x - state.mean) * (x - mean)
        spikes = (state.spikes + 1) * spike
        release = spikes >= self.release_after
        mean, var = where(release, (norm, state.var), (mean, var))
        new = ZClipState(state.seen + 1, mean, var, spikes * ~release, state.past)
        return _Limit(limit, state.mean + self.z_threshold * sigma), new

    def _reference(self, norm: Tensor, state: ZClipState) -> tuple[_Limit, ZClipState]:
        sigma = state.var.sqrt()
        z = (norm - state.mean) / (sigma + 1e-6)
        spike = z > self.z_threshold
        x = where(spike, state.mean + self.z_threshold * sigma / (z / self.z_threshold), norm)
        mean = self.alpha * state.mean + (1 - self.alpha) * x
        var = self.alpha * state.var + (1 - self.alpha) * (x - mean).square()
        limit = where(spike, x, torch.full_like(x, float("inf"))).clamp(max=self.max_norm)
        threshold = (state.mean + self.z_threshold * (sigma + 1e-6)).clamp(max=self.max_norm)
        return _Limit(limit, threshold), ZClipState(state.seen + 1, mean, var, state.spikes, state.past)


class _Limit(NamedTuple):
    limit: Tensor
    threshold: Tensor

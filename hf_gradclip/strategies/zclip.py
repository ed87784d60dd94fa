"""Clip a step whose norm is an outlier among the norms before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.strategy import Needs, State, Strategy, check_types, choose, limit_scale, require, where
from hf_gradclip.types import ClipPlan, Layout, NormStats


class ZClipState(NamedTuple):
    """Statistics of the total norm, all 0-d."""

    seen: Tensor
    mean: Tensor
    var: Tensor
    spikes: Tensor


@dataclass(frozen=True)
class ZClip(Strategy):
    """Limit a norm that lies more than `z_threshold` deviations above its moving mean.

    The first `warmup_steps` norms are clipped at `max_norm` and collected raw; their mean and variance start the
    statistics. Then z = (G - mean) / sigma. A spike (z > z_threshold) is limited to mean + z_threshold^2 sigma / z,
    so the larger the spike, the closer to the mean; the moving statistics see the limited value.

    `mode="safe"` closes three holes of the published code. sigma is at least `min_sigma` * mean, so that constant
    norms do not make every change a spike. After `release_after` spikes in a row the mean takes the new norm (the
    variance stays), so that a lasting change of level does not clip every step for ever. Zero norms are not
    remembered. There is no further cap after the warm-up: `max_norm` is the warm-up's.

    `mode="reference"` is the authors' code: `max_norm` caps every step, the variance uses the new mean, and the
    three holes are open.

    Args:
        z_threshold: deviations above the mean at which a norm is a spike; > 0.
        alpha: weight of the past in the moving mean and variance; in [0, 1).
        warmup_steps: norms collected before the statistics are used; >= 2.
        max_norm: the limit during the warm-up, in units of the gradient; > 0, inf clips nothing there.
        min_sigma: least deviation as a share of the mean; >= 0. Safe mode only.
        release_after: spikes in a row that count as a new level; >= 1. Safe mode only.
        mode: "safe" or "reference".

    Example:
        >>> preview(ZClip(warmup_steps=3, max_norm=10.0), [1.0, 1.2, 0.8, 5.0, 1.1])
        [1.0, 1.2, 0.8, 1.042, 1.1]

    References:
        Kumar, Owen, Roy Chowdhury, Guera, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025,
        arXiv 2504.02507; its code, commit 584ce4f.
    """

    z_threshold: float = 2.5
    alpha: float = 0.97
    warmup_steps: int = 25
    max_norm: float = 1.0
    min_sigma: float = 0.05
    release_after: int = 20
    mode: str = "safe"

    needs = Needs()

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "z_threshold", lambda v: 0 < v < float("inf"), "must be > 0. The paper uses 2.5.")
        require(self, "alpha", lambda v: 0 <= v < 1, "must be in [0, 1). The paper uses 0.97.")
        require(self, "warmup_steps", lambda v: v >= 2, "must be >= 2, to have a variance. The paper uses 25.")
        require(self, "max_norm", lambda v: v > 0, "must be > 0. The paper uses 1.0; inf clips no warm-up step.")
        require(self, "min_sigma", lambda v: 0 <= v < float("inf"), "must be >= 0. The default is 0.05.")
        require(self, "release_after", lambda v: v >= 1, "must be >= 1. The default is 20.")
        require(self, "mode", lambda v: v in ("safe", "reference"), "must be safe or reference.")

    def init(self, layout: Layout) -> State:
        """No norm seen yet."""
        zero = torch.zeros((), dtype=layout.dtype, device=layout.device)
        count = torch.zeros((), dtype=torch.int64, device=layout.device)
        return ZClipState(seen=count, mean=zero, var=zero.clone(), spikes=count.clone())

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale for all segments, from the total norm."""
        norm = stats.total
        judge = self._safe if self.mode == "safe" else self._reference
        warm = state.seen < self.warmup_steps
        (limit, threshold), new = choose(warm, lambda: self._collect(norm, state), lambda: judge(norm, state))
        if self.mode == "safe":
            new = where(norm > 0, new, state)
        return ClipPlan(limit_scale(limit, norm), threshold=threshold), new

    def _collect(self, norm: Tensor, state: ZClipState) -> tuple[_Limit, ZClipState]:
        """Running mean and population variance of the raw norms (Welford's recurrence)."""
        seen = state.seen + 1
        mean = state.mean + (norm - state.mean) / seen
        var = state.var + ((norm - state.mean) * (norm - mean) - state.var) / seen
        limit = torch.full_like(norm, self.max_norm)
        return _Limit(limit, limit), ZClipState(seen, mean, var, state.spikes)

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
        new = ZClipState(state.seen + 1, mean, var, spikes * ~release)
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
        return _Limit(limit, threshold), ZClipState(state.seen + 1, mean, var, state.spikes)


class _Limit(NamedTuple):
    limit: Tensor
    threshold: Tensor

"""Limit each parameter's norm by a moving average of its own past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.strategy import Needs, State, Strategy, check_types, choose, limit_scale, require
from hf_gradclip.types import ClipPlan, Layout, NormStats


class AdaGCState(NamedTuple):
    """`gamma_S`: the reference norm per segment, inf until a non-zero norm is seen. `low_S`: steps scaled below 0.5."""

    seen: Tensor
    gamma_S: Tensor
    low_S: Tensor


@dataclass(frozen=True)
class AdaGC(Strategy):
    """Limit the norm n_i of each parameter's gradient to `lambda_rel` * gamma_i, its own moving average.

    During the warm-up the whole gradient is clipped at `max_norm`, and gamma_i is the running minimum of the clipped
    norms. Then gamma_i <- beta gamma_i + (1 - beta) min(n_i, limit_i).

    `mode="safe"` closes two holes of the published code. A zero norm (LoRA's A at its first step, an expert without
    a token, a parameter unused in a step) leaves gamma_i as it is, else the minimum would be 0 and the tensor would
    never train again; a tensor not seen yet is not clipped, and starts gamma_i at its norm. A tensor scaled below
    0.5 for `release_after` steps in a row takes its new norm as gamma_i, since gamma_i itself grows by
    beta + (1 - beta) lambda_rel at most, 1.0004 a step.

    `mode="reference"` is the authors' code with both holes open. A missing gradient is a zero norm there too.

    Args:
        lambda_rel: the limit as a multiple of gamma_i; > 0.
        beta: weight of the past in gamma_i; in [0, 1).
        warmup_steps: steps clipped globally while gamma_i is found; >= 1.
        max_norm: the global limit during the warm-up, in units of the gradient; > 0.
        release_after: steps scaled below 0.5 that count as a new level; >= 1. Safe mode only.
        mode: "safe" or "reference".

    Example:
        >>> preview(AdaGC(warmup_steps=2, max_norm=10.0), [[1.0, 2.0], [1.0, 2.0], [1.0, 9.0]])
        [[1.0, 2.0], [1.0, 2.0], [1.0, 2.08]]

    References:
        Wang et al., "AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient Clipping", 2025,
        arXiv 2502.11034; the authors' Megatron patch, commit 32c249fa.
    """

    lambda_rel: float = 1.04
    beta: float = 0.99
    warmup_steps: int = 100
    max_norm: float = 1.0
    release_after: int = 50
    mode: str = "safe"

    needs = Needs()
    per_parameter = True

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "lambda_rel", lambda v: v > 0, "must be > 0. The paper uses 1.04.")
        require(self, "beta", lambda v: 0 <= v < 1, "must be in [0, 1). The paper uses 0.99.")
        require(self, "warmup_steps", lambda v: v >= 1, "must be >= 1. The paper uses 100.")
        require(self, "max_norm", lambda v: v > 0, "must be > 0. The paper uses 1.0; inf clips no warm-up step.")
        require(self, "release_after", lambda v: v >= 1, "must be >= 1. The default is 50.")
        require(self, "mode", lambda v: v in ("safe", "reference"), "must be safe or reference.")

    def init(self, layout: Layout) -> State:
        """No norm seen yet."""
        gamma_S = torch.full((len(layout),), float("inf"), dtype=layout.dtype, device=layout.device)
        low_S = torch.zeros(len(layout), dtype=torch.int64, device=layout.device)
        return AdaGCState(torch.zeros((), dtype=torch.int64, device=layout.device), gamma_S, low_S)

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale per segment; during the warm-up the same for all."""
        norm_S, gamma_S = stats.norm_S, state.gamma_S
        warm = state.seen < self.warmup_steps
        scale_S, new_S, low_S = choose(warm, lambda: self._collect(stats, state), lambda: self._judge(norm_S, state))
        if self.mode == "safe":
            present_S = norm_S > 0
            new_S = torch.where(present_S, new_S, gamma_S)
            low_S = torch.where(present_S, low_S, state.low_S)
        return ClipPlan(scale_S), AdaGCState(state.seen + 1, new_S, low_S)

    def _collect(self, stats: NormStats, state: AdaGCState) -> tuple[Tensor, Tensor, Tensor]:
        """Of a step of the warm-up: scale, gamma and the count of steps scaled below 0.5, per segment."""
        scale = limit_scale(self.max_norm, stats.total)
        lowest_S = torch.minimum(state.gamma_S, stats.norm_S * scale)
        low_S = torch.zeros_like(state.low_S) if self.mode == "safe" else state.low_S
        return scale.expand(len(lowest_S)), lowest_S, low_S

    def _judge(self, norm_S: Tensor, state: AdaGCState) -> tuple[Tensor, Tensor, Tensor]:
        """The same after it."""
        gamma_S = state.gamma_S
        limit_S = self.lambda_rel * gamma_S
        scale_S = limit_scale(limit_S, norm_S)
        kept_S = torch.minimum(norm_S, limit_S)
        new_S = torch.where(gamma_S.isinf(), norm_S, self.beta * gamma_S + (1 - self.beta) * kept_S)
        if self.mode != "safe":
            return scale_S, new_S, state.low_S
        low_S = (state.low_S + 1) * (scale_S < 0.5)
        release_S = low_S >= self.release_after
        return scale_S, torch.where(release_S, norm_S, new_S), low_S * ~release_S

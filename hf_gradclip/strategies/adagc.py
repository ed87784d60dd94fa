"""Limit each parameter's norm by a moving average of its own past."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.outlier import Past, judge, nothing_seen
from hf_gradclip.strategy import Needs, State, Strategy, check_types, choose, limit_scale, require, torch_scale
from hf_gradclip.types import ClipPlan, Layout, NormStats


class AdaGCState(NamedTuple):
    """What is known of each parameter's norm.

    Args:
        seen: steps, 0-d.
        gamma_S: the reference norm per segment, inf until a non-zero norm is seen.
        low_S: steps in a row that were scaled below 0.5.
        past: norms of the whole in the warm-up.
    """

    seen: Tensor
    gamma_S: Tensor
    low_S: Tensor
    past: Past


@dataclass(frozen=True)
class AdaGC(Strategy):
    """Limit the norm n_i of each parameter's gradient to `lambda_rel` * gamma_i, its own moving average.

    During the warm-up the whole gradient is clipped, and gamma_i is the running minimum of the clipped norms. Then
    gamma_i <- beta gamma_i + (1 - beta) min(n_i, limit_i).

    `mode="safe"` closes four holes of the published code. The warm-up has no fixed limit, which is right for one size
    of gradients only: a norm of the whole that stands out by the rule of `adaptive_norm` is brought down to the
    median. A norm below its limit is left alone, however small. A zero norm (LoRA's A at its first step, an expert
    without a token, a parameter unused in a step) leaves gamma_i as it is, else the minimum would be 0 and the tensor
    would never train again; a tensor not seen yet is not clipped, and starts gamma_i at its norm. A tensor scaled below
    0.5 for `release_after` steps in a row takes its new norm as gamma_i, since gamma_i itself grows by
    beta + (1 - beta) lambda_rel at most, 1.0004 a step.

    `mode="reference"` is the authors' code: the warm-up clips at `max_norm`, the other holes are open, and a missing
    gradient is a zero norm there too. The preset `adagc_paper` has it with the authors' numbers.

    Args:
        lambda_rel: the limit as a multiple of gamma_i; > 0.
        beta: weight of the past in gamma_i; in [0, 1).
        warmup_steps: steps clipped globally while gamma_i is found; >= 1.
        max_norm: a fixed global limit during the warm-up, in units of the gradient; > 0. The default, inf, is none.
        release_after: steps scaled below 0.5 that count as a new level; >= 1. Safe mode only.
        mode: "safe" or "reference".

    Example:
        >>> preview(AdaGC(warmup_steps=2), [[1.0, 2.0], [1.0, 2.0], [1.0, 9.0]])
        [[1.0, 2.0], [1.0, 2.0], [1.0, 2.08]]

    References:
        Wang et al., "AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient Clipping", 2025,
        arXiv 2502.11034; the authors' Megatron patch, commit 32c249fa.
    """

    lambda_rel: float = 1.04
    beta: float = 0.99
    warmup_steps: int = 100
    max_norm: float = float("inf")
    release_after: int = 50
    mode: str = "safe"

    needs = Needs()
    per_parameter = True

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "lambda_rel", lambda v: 0 < v < float("inf"), "must be > 0. The paper uses 1.04.")
        require(self, "beta", lambda v: 0 <= v < 1, "must be in [0, 1). The paper uses 0.99.")
        require(self, "warmup_steps", lambda v: v >= 1, "must be >= 1. The paper uses 100.")
        require(self, "max_norm", lambda v: v > 0, "must be > 0. The paper uses 1.0; inf is no fixed limit.")
        require(self, "release_after", lambda v: v >= 1, "must be >= 1. The default is 50.")
        require(self, "mode", lambda v: v in ("safe", "reference"), "must be safe or reference.")

    def init(self, layout: Layout) -> State:
        """No norm seen yet."""
        gamma_S = torch.full((len(layout),), float("inf"), dtype=layout.dtype, device=layout.device)
        low_S = torch.zeros(len(layout), dtype=torch.int64, device=layout.device)
        seen = torch.zeros((), dtype=torch.int64, device=layout.device)
        return AdaGCState(seen, gamma_S, low_S, nothing_seen(layout))

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale per segment; during the warm-up the same for all."""
        norm_S, gamma_S = stats.norm_S, state.gamma_S
        warm = state.seen < self.warmup_steps
        collect, compare = partial(self._collect, stats, state), partial(self._compare, norm_S, state)
        scale_S, new_S, low_S, past = choose(warm, collect, compare)
        if self.mode == "safe":
            present_S = norm_S > 0
            new_S = torch.where(present_S, new_S, gamma_S)
            low_S = torch.where(present_S, low_S, state.low_S)
        return ClipPlan(scale_S), AdaGCState(state.seen + 1, new_S, low_S, past)

    def _collect(self, stats: NormStats, state: AdaGCState) -> tuple[Tensor, Tensor, Tensor, Past]:
        """Of a step of the warm-up: scale, gamma and the count of steps scaled below 0.5 per segment, and the past."""
        norm, low_S, past = stats.total, state.low_S, state.past
        if self.mode == "safe":
            cap, _, past = judge(past, norm)
            scale = limit_scale(cap.clamp(max=self.max_norm), norm)
            low_S = torch.zeros_like(low_S)
        else:
            scale = torch_scale(self.max_norm, norm)
        lowest_S = torch.minimum(state.gamma_S, stats.norm_S * scale)
        return scale.expand(len(lowest_S)), lowest_S, low_S, past

    def _compare(self, norm_S: Tensor, state: AdaGCState) -> tuple[Tensor, Tensor, Tensor, Past]:
        """The same after it."""
        gamma_S = state.gamma_S
        limit_S = self.lambda_rel * gamma_S
        kept_S = torch.minimum(norm_S, limit_S)
        new_S = torch.where(gamma_S.isinf(), norm_S, self.beta * gamma_S + (1 - self.beta) * kept_S)
        if self.mode != "safe":
            return torch_scale(limit_S, norm_S), new_S, state.low_S, state.past
        scale_S = limit_scale(limit_S, norm_S)
        low_S = (state.low_S + 1) * (scale_S < 0.5)
        release_S = low_S >= self.release_after
        return scale_S, torch.where(release_S, norm_S, new_S), low_S * ~release_S, state.past

"""Give each parameter's gradient the size that it usually has: its direction times a running average of its norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.outlier import Pasts, judge, nothing_seen_each
from hf_gradclip.strategy import Needs, State, Strategy, check_types, require
from hf_gradclip.types import ClipPlan, Layout, NormStats


class NormalizeState(NamedTuple):
    """What is known of each parameter's norm.

    Args:
        seen_S: norms put in, int64.
        mean_S: their average, without the bias of its start.
        square_S: that of their squares; 0 for `to="mean"`.
        past: by which a norm stands out; empty for `to="ratio"`.
    """

    seen_S: Tensor
    mean_S: Tensor
    square_S: Tensor
    past: Pasts


@dataclass(frozen=True)
class Normalize(Strategy):
    """Scale each parameter's gradient by min(max_scale, m_i / n_i), n_i being its norm and m_i its average.

    m_i = sum_k gamma1^k n_i(t - k) / sum_k gamma1^k, this step included: a moving average without the bias of its
    start. Every step is scaled, and about every second one up, so `clip/rate` is about 1 / 2 for a single tensor and
    `clip/scale_max` shows the other half. A norm that stands out by the rule of `adaptive_norm` counts as the median;
    the plain average would let 1 - gamma1 of a spike pass. A zero norm is not remembered.

    `max_scale` is how much a gradient may grow. The published rule has no such limit: a tensor with next to no gradient
    in a step (an expert with one token) is filled up with the noise that it has.

    `to="ratio"` is the published rule: m_i / sqrt(v_i) in the place of m_i, v_i being the same average of n_i^2 with
    gamma2, and no norm stands out. The norm after it is about 1 for every tensor whatever its size was, and
    (1 - gamma1) / sqrt(1 - gamma2) for a spike however high, after which it is small for some 10 / (1 - gamma2) steps,
    as v_i forgets more slowly than m_i. It is made for Adam, which divides a size out again; with
    SGD it is another learning rate for each tensor. The eps of the published code, 1e-8 beside sqrt(v_i), is left out,
    as an absolute number. The preset `normalize_paper` has it with the authors' numbers.

    Args:
        gamma1: weight of the past in the average of norms; in [0, 1).
        gamma2: weight of the past in the average of their squares; in [0, 1). For `to="ratio"` only.
        max_scale: the largest factor; >= 1, and inf is none.
        to: "mean" or "ratio".

    Example:
        >>> preview(Normalize(gamma1=0.5), [[1.0], [1.0], [2.0], [50.0], [0.5], [0.01]])
        [[1.0], [1.0], [1.571], [1.267], [0.871], [0.1]]

    References:
        Huang et al., "GradientStabilizer: Fix the Norm, Not the Gradient", 2026, arXiv 2502.17055v3, which was "AdaGN"
        in v1, "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", 2025; its code, commit 6a66da1.
    """

    gamma1: float = 0.7
    gamma2: float = 0.9
    max_scale: float = 10.0
    to: str = "mean"

    needs = Needs()
    per_parameter = True

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "gamma1", lambda v: 0 <= v < 1, "must be in [0, 1). The paper uses 0.7.")
        require(self, "gamma2", lambda v: 0 <= v < 1, "must be in [0, 1). The paper uses 0.9.")
        require(self, "max_scale", lambda v: v >= 1, "must be >= 1. The default is 10; inf is no limit.")
        require(self, "to", lambda v: v in ("mean", "ratio"), "must be mean or ratio.")

    def init(self, layout: Layout) -> State:
        """No norm seen yet."""
        seen_S = torch.zeros(len(layout), dtype=torch.int64, device=layout.device)
        zero_S = torch.zeros(len(layout), dtype=layout.dtype, device=layout.device)
        return NormalizeState(seen_S, zero_S, zero_S.clone(), nothing_seen_each(layout))

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale per segment."""
        norm_S, square_S, past = stats.norm_S, state.square_S, state.past
        present_S = norm_S > 0
        seen_S = state.seen_S + present_S
        if self.to == "mean":
            cap_S, _, past = judge(past, norm_S)
            mean_S = size_S = _entered(state.mean_S, torch.minimum(norm_S, cap_S), self.gamma1, seen_S, present_S)
        else:
            mean_S = _entered(state.mean_S, norm_S, self.gamma1, seen_S, present_S)
            square_S = torch.where(square_S > 0, square_S, state.mean_S.square())  # of a state that `to="mean"` made
            square_S = _entered(square_S, stats.sumsq_S, self.gamma2, seen_S, present_S)
            size_S = mean_S / square_S.sqrt()
        scale_S = torch.where(present_S, (size_S / norm_S).clamp(max=self.max_scale), 1.0)
        return ClipPlan(scale_S), NormalizeState(seen_S, mean_S, square_S, past)


def _entered(mean_S: Tensor, x_S: Tensor, gamma: float, seen_S: Tensor, present_S: Tensor) -> Tensor:
    """The unbiased moving average with one more number where there is one; `seen_S` counts it already."""
    weight_S = (1 - gamma) / (1 - gamma ** seen_S.to(x_S.dtype))
    return torch.where(present_S, (1 - weight_S) * mean_S + weight_S * x_S, mean_S)  # x_S - mean_S would round x_S away

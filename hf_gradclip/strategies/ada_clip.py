"""Clamp the elements of each parameter's gradient to a running average of its largest one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.outlier import Pasts, judge, nothing_seen_each
from hf_gradclip.strategy import Needs, State, Strategy, check_types, require
from hf_gradclip.types import ClipPlan, Layout, NormStats


class AdaClipState(NamedTuple):
    """What is known of each parameter's largest element.

    Args:
        seen_S: numbers put in, int64.
        mean_S: their average, without the bias of its start.
        past: by which one stands out.
    """

    seen_S: Tensor
    mean_S: Tensor
    past: Pasts


@dataclass(frozen=True)
class AdaClip(Strategy):
    """g <- clamp(g, -M_i, +M_i), M_i being the moving average of the largest absolute element of parameter i.

    M_i = sum_k gamma^k a_i(t - k) / sum_k gamma^k with a_i = max |g_i|, this step included and without the bias of its
    start. About every second step of a tensor has an element above it, so it bounds a few elements often. It changes
    the direction of the gradient, and comes last in a chain.

    The published rule makes an element above M_i into g / a_i * M_i: the largest becomes M_i, as here, and one just
    above M_i becomes the smaller M_i^2 / a_i, smaller than one just below. Here all of them become M_i. An a_i that
    stands out by the rule of `adaptive_norm` counts as the median, else one broken step would lift M_i for about
    1 / (1 - gamma) steps. A largest element of 0 is not remembered. The counter is not set back with the moments of an
    optimizer, as it is in the authors' code, where the limit is hundreds of times too high after that.

    Args:
        gamma: weight of the past in the average; in [0, 1).

    Example:
        >>> preview(AdaClip(gamma=0.5), [[1.0], [1.0], [2.0], [0.5], [90.0]])
        [[1.0], [1.0], [1.571], [0.5], [1.0]]

    References:
        Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", 2025, arXiv 2502.17055v2; its
        code, commit 6a66da1.
    """

    gamma: float = 0.999

    needs = Needs(max_abs=True)
    bounds = True
    per_parameter = True

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "gamma", lambda v: 0 <= v < 1, "must be in [0, 1). The paper uses 0.999.")

    def init(self, layout: Layout) -> State:
        """No element seen yet."""
        seen_S = torch.zeros(len(layout), dtype=torch.int64, device=layout.device)
        mean_S = torch.zeros(len(layout), dtype=layout.dtype, device=layout.device)
        return AdaClipState(seen_S, mean_S, nothing_seen_each(layout))

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """A bound on the segments that hold a larger element; the others are not touched."""
        largest_S = stats.max_abs_S
        assert largest_S is not None  # needs says so
        present_S = largest_S > 0
        cap_S, _, past = judge(state.past, largest_S)
        seen_S = state.seen_S + present_S
        weight_S = (1 - self.gamma) / (1 - self.gamma ** seen_S.to(largest_S.dtype))
        moved_S = (1 - weight_S) * state.mean_S + weight_S * torch.minimum(largest_S, cap_S)
        mean_S = torch.where(present_S, moved_S, state.mean_S)
        bound_S = torch.where(largest_S > mean_S, mean_S, float("inf"))
        return ClipPlan(stats.sumsq_S.new_ones(()), bound_S=bound_S), AdaClipState(seen_S, mean_S, past)

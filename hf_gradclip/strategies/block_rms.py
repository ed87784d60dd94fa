"""Limit the root mean square of each parameter's gradient or, where it was made for, of its update."""

from __future__ import annotations

from dataclasses import dataclass

from hf_gradclip.strategy import Needs, State, Stateless, Strategy, check_types, limit_scale, require
from hf_gradclip.types import ClipPlan, Layout, NormStats


@dataclass(frozen=True)
class BlockRMS(Strategy):
    """Scale each parameter by min(1, max_rms / RMS), RMS being the 2-norm of its elements over sqrt(their number).

    On an update (`clip={"update": "block_rms"}`) this is Adafactor's rule, U <- U / max(1, RMS(U) / d), applied before
    the learning rate and to whatever the optimizer makes of the gradient, momentum included. An Adam update has an
    RMS of about 1 at most while its second moment is fresh, and up to 1 / sqrt(1 - beta2) when it is stale: 31.6 for
    0.999, 4.5 for 0.95. StableAdamW's published rule is another one: it divides the learning rate by
    max(1, RMS(g / max(sqrt(v), eps))), so it looks at the current gradient instead of the momentum, and reads the
    second moment, which no strategy here does. On a gradient it is a `param_norm` of max_rms * sqrt(elements).

    Args:
        max_rms: the limit per parameter; > 0. Adafactor's d.

    Example:
        >>> preview(BlockRMS(max_rms=1.0), [[5.0, 20.0]], numel=100)  # a norm of 10 is an RMS of 1 here
        [[5.0, 10.0]]

    References:
        Shazeer, Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018, arXiv 1804.04235;
        Wortsman et al., "Stable and low-precision training for large-scale vision-language models", 2023,
        arXiv 2304.13013.
    """

    max_rms: float = 1.0

    needs = Needs()
    per_parameter = True

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "max_rms", lambda v: v > 0, "must be > 0. Adafactor uses 1.0.")

    def init(self, layout: Layout) -> State:
        """Nothing to remember."""
        return Stateless()

    def update(self, stats: NormStats, state: State) -> tuple[ClipPlan, State]:
        """One scale per segment."""
        limit_S = self.max_rms * stats.layout.numel_S.clamp(min=1).to(stats.sumsq_S.dtype).sqrt()
        return ClipPlan(limit_scale(limit_S, stats.norm_S)), state

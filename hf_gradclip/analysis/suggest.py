"""Which threshold would have clipped a wanted share of a recorded run's steps."""

from __future__ import annotations

import numpy as np

from hf_gradclip.analysis.replay import Outcome, outcome_of, replay, strategy_for_replay
from hf_gradclip.record.files import Record

ROUNDS = 12
PERCENTILES = (0.01, 100.0)
Z_RANGE = (0.1, 10.0)


def suggest(record: Record, rate: float) -> list[Outcome]:
    """Strategies whose one number is set so that they would have clipped a share of the steps; each replayed.

    Args:
        record: of a run, with finite norms.
        rate: wanted share of clipped steps, in (0, 1).

    Returns:
        As near as each comes: one that also clips while it warms up may not come near, see `misses`.

    Raises:
        ValueError: for another rate, or without a finite norm above 0.
    """
    if not 0 < rate < 1:
        raise ValueError(f"suggest --rate {rate:g}: must be a share between 0 and 1. 0.05 clips one step in 20.")
    norms = record.norm_T[record.finite_T & (record.norm_T > 0)]
    if not len(norms):
        raise ValueError("suggest: the record has no finite norm above 0.")
    limit = float(np.quantile(norms, 1 - rate))
    return [
        _replayed(record, f"global_norm:max_norm={limit:.4g}"),
        _nearest(record, rate, "autoclip:percentile={:.4g}", PERCENTILES),
        _nearest(record, rate, "zclip:z_threshold={:.3g}", Z_RANGE),
    ]


def misses(outcomes: list[Outcome], rate: float) -> list[str]:
    """A sentence for each strategy that clips another share than was wanted, by more than a quarter of it."""
    return [
        f"{outcome.spec.partition(':')[0]} comes no nearer than {outcome.rate:.1%} with these norms: "
        + (
            "it also clips while it warms up or the level of the norm moves. "
            if outcome.rate > rate
            else "it follows norms that fall, and few stand out above it. "
        )
        + "Set its other fields, or take one of the others."
        for outcome in outcomes
        if abs(outcome.rate - rate) > rate / 4
    ]


def _replayed(record: Record, spec: str) -> Outcome:
    return outcome_of(record, replay(record, strategy_for_replay(spec)), spec)


def _nearest(record: Record, rate: float, spec: str, ends: tuple[float, float]) -> Outcome:
    """Bisection: the higher the number is, the fewer steps are clipped."""
    low, high = ends
    tried = []
    for _ in range(ROUNDS):
        middle = (low * high) ** 0.5
        tried.append(_replayed(record, spec.format(middle)))
        if tried[-1].rate > rate:
            low = middle
        else:
            high = middle
    return min(tried, key=lambda outcome: abs(outcome.rate - rate))

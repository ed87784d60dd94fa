"""Which threshold would have clipped a wanted share of a recorded run's steps."""

from __future__ import annotations

import numpy as np

from hf_gradclip.analysis.replay import Outcome, outcome_of, replay, strategy_for_replay
from hf_gradclip.record.files import Record

ROUNDS = 12
Z_RANGE = (0.1, 10.0)


def suggest(record: Record, rate: float) -> list[Outcome]:
    """Strategies whose one number is set so that they would have clipped a share of the steps; each replayed.

    Args:
        record: of a run, with finite norms.
        rate: wanted share of clipped steps, in (0, 1).

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
        _replayed(record, f"autoclip:percentile={100 * (1 - rate):.4g}"),
        _replayed(record, f"zclip:z_threshold={_z_for(record, rate):.3g}"),
    ]


def _replayed(record: Record, spec: str) -> Outcome:
    return outcome_of(record, replay(record, strategy_for_replay(spec)), spec)


def _z_for(record: Record, rate: float) -> float:
    """Bisection: the higher z_threshold is, the fewer steps are clipped."""
    low, high = Z_RANGE
    for _ in range(ROUNDS):
        middle = (low * high) ** 0.5
        if _replayed(record, f"zclip:z_threshold={middle:.3g}").rate > rate:
            low = middle
        else:
            high = middle
    return high

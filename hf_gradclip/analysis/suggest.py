"""Which threshold would have clipped a wanted share of a recorded run's steps."""

from __future__ import annotations

from dataclasses import replace
from math import log

import numpy as np

from hf_gradclip.analysis.replay import Outcome, outcome_of, replay, strategy_for_replay
from hf_gradclip.record.files import Record
from hf_gradclip.strategy import name_of

ROUNDS = 12
NEAR = 0.02
"""A share that is within this part of the wanted one is the wanted one."""
PERCENTILES = (0.01, 100.0)
Z_RANGE = (0.1, 10.0)
OTHERWISE = "Set its other fields, or take one of the others."


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
    whole = of_the_whole(record)
    return [
        _replayed(whole, f"global_norm:max_norm={limit:.4g}"),
        _nearest(whole, rate, "autoclip:percentile={:.4g}", PERCENTILES, 100 * (1 - rate)),
        _nearest(whole, rate, "zclip:z_threshold={:.3g}", Z_RANGE, 2.0),
    ]


def misses(outcomes: list[Outcome], rate: float, steps: int) -> list[str]:
    """A sentence for each strategy that clips another share than was wanted, by more than a quarter of it.

    Args:
        outcomes: what was found.
        rate: the wanted share.
        steps: how many there are with a finite norm.
    """
    return [
        f"{outcome.spec.partition(':')[0]} comes no nearer than {outcome.rate:.1%} with these norms: "
        + _why(outcome, rate, steps)
        for outcome in outcomes
        if abs(outcome.rate - rate) > rate / 4
    ]


def _why(outcome: Outcome, rate: float, steps: int) -> str:
    if abs(outcome.rate - rate) * steps < 1:
        return f"one step of {steps:,} is {1 / steps:.1%}. Record a longer run, or give a higher --rate."
    if name_of(strategy_for_replay(outcome.spec)) == "global_norm":
        return "it clips norms that are alike together, and those below 1e-6 in any case. Take one of the others."
    if outcome.rate > rate:
        return f"it also clips while it warms up or the level of the norm moves. {OTHERWISE}"
    return f"few norms lie above those that it follows. {OTHERWISE}"


def of_the_whole(record: Record) -> Record:
    """The record with all parameters as one: these strategies go by the norm of the whole alone."""
    return replace(
        record,
        names=("whole",),
        numel_P=record.numel_P.sum(keepdims=True),
        norm_TP=record.norm_T[:, None].astype(np.float32),
        scale_TP=np.ones((len(record), 1), dtype=np.float32),
    )


def _replayed(record: Record, spec: str) -> Outcome:
    return outcome_of(record, replay(record, strategy_for_replay(spec)), spec)


def _nearest(record: Record, rate: float, spec: str, ends: tuple[float, float], guess: float) -> Outcome:
    """The number that comes nearest: the higher it is, the fewer steps are clipped.

    A replay is long, so after the guess each is where a line through the ends of the bracket, in logarithms of the
    share, meets the wanted one; and in the bracket's middle where the last one moved the same end as the one before.
    """
    tried: list[Outcome] = []
    fewest = min(1 / len(record), rate) / 2  # stands for no step at all
    (low, high), side = ends, 0
    above, below = -log(rate), log(fewest / rate)
    at = guess
    for _ in range(ROUNDS):
        if any(spec.format(at) == outcome.spec for outcome in tried):
            break
        tried.append(_replayed(record, spec.format(at)))
        found = log(max(tried[-1].rate, fewest) / rate)
        if abs(found) <= NEAR:
            break
        moved = 1 if found > 0 else -1
        if moved > 0:
            low, above = at, found
        else:
            high, below = at, found
        at = (low + high) / 2 if moved == side else low + (high - low) * above / (above - below)
        side = moved
    return min(tried, key=lambda outcome: abs(outcome.rate - rate))

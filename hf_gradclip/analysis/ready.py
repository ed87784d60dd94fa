"""What other strategies, and other fixed thresholds, would have done in a run: replayed where the report is made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_gradclip.analysis.replay import Outcome, Replay, outcome_of, replay, spikes_of, strategy_for_replay
from hf_gradclip.analysis.suggest import of_the_whole
from hf_gradclip.record.files import Record

READY = ("adaptive_norm", "zclip", "adagc")
MOST_STEPS = 20_000
"""Of a longer run nothing but fixed thresholds is replayed, since that would take minutes."""
RATES = (1, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.075, 0.05, 0.04, 0.03, 0.02, 0.01)
EVEN = 20
"""So many thresholds lie evenly between the smallest norm and the largest, in logarithms, beside those of RATES."""


@dataclass(frozen=True)
class Ready:
    """Replays of one run.

    Args:
        specs: of the strategies, as they are typed.
        replays: what each did.
        outcomes: the same in numbers; before them what was recorded, where no elements were bounded.
        fixed: of `global_norm` at a rising threshold.
        start: the place in `fixed` of the one that clips about a step in 20.
    """

    specs: tuple[str, ...]
    replays: tuple[Replay, ...]
    outcomes: tuple[Outcome, ...]
    fixed: tuple[Outcome, ...]
    start: int


def ready_of(record: Record) -> Ready | None:
    """Replay a record; None where no step of it has a finite norm above 0."""
    if not (record.finite_T & (record.norm_T > 0)).any():
        return None
    spikes_T = spikes_of(record)
    specs = READY if len(record) <= MOST_STEPS else ()
    replays = tuple(replay(record, strategy_for_replay(spec)) for spec in specs)
    outcomes = [outcome_of(record, found, spec, spikes_T) for found, spec in zip(replays, specs, strict=True)]
    if not record.bounded_T.any():
        outcomes.insert(0, _recorded(record, spikes_T))
    whole = of_the_whole(record)
    fixed = [
        outcome_of(whole, replay(whole, strategy_for_replay(spec)), spec, spikes_T)
        for spec in (f"global_norm:max_norm={limit:g}" for limit in thresholds(record))
    ]
    start = min(range(len(fixed)), key=lambda i: abs(fixed[i].rate - 0.05))
    return Ready(specs, replays, tuple(outcomes), tuple(fixed), start)


def thresholds(record: Record) -> list[float]:
    """Numbers of three digits, rising: from one that clips every step to one that clips none."""
    norms = record.norm_T[record.finite_T & (record.norm_T > 0)]
    low, high = norms.min(), norms.max()
    wanted = [low * 0.5, *np.quantile(norms, [1 - rate for rate in RATES]), *np.geomspace(low, high, EVEN), high * 1.1]
    return sorted({float(f"{number:.3g}") for number in wanted})


def _recorded(record: Record, spikes_T: np.ndarray) -> Outcome:
    """What was done in the run itself."""
    scale_TP = np.nan_to_num(record.scale_TP.astype(np.float64), nan=1.0)
    found = Replay(record.meta["spec"], scale_TP, record.threshold_T, record.skipped_T)
    return outcome_of(record, found, "as recorded", spikes_T)

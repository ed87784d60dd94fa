"""What a strategy would have done with the norms of a recorded run.

The norms are of the run as it was: under another strategy the weights, and so the later norms, would have been others.
What a replay shows is how often and how hard a strategy acts on such norms, not where the run would have ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hf_gradclip.config import ClipConfig
from hf_gradclip.record.files import Record
from hf_gradclip.record.spikes import find_spikes, judged
from hf_gradclip.spec import is_own
from hf_gradclip.strategy import SpecError, State, Stateless, Strategy, describe, name_of, parts_of
from hf_gradclip.types import ClipPlan, Layout, NormStats

LIMIT_OF_REPLAY = (
    "The norms are of the run as it was recorded. Under another strategy it would have gone another way, so read this "
    "as how often and how hard a strategy acts on such norms."
)


AT_ONCE = 1000


@dataclass(frozen=True)
class Replay:
    """What one strategy did with the norms of a record; T steps, P parameters.

    Args:
        spec: of the strategy, with every field.
        scale_TP: norm after / before per parameter; 1 in steps whose norm was not finite.
        threshold_T: NaN where it is not one number.
        skipped_T: which steps the strategy would have left out.
    """

    spec: str
    scale_TP: np.ndarray
    threshold_T: np.ndarray
    skipped_T: np.ndarray

    @property
    def clipped_T(self) -> np.ndarray:
        """Which steps were changed: anything scaled, or left out."""
        return (self.scale_TP < 1).any(axis=1) | self.skipped_T


@dataclass(frozen=True)
class Outcome:
    """A replay in numbers.

    Args:
        spec: of the strategy, as it was typed.
        rate: share of the finite steps that were changed.
        mean_scale: mean over the finite steps of norm after / norm before, of the whole gradient.
        spikes: how many steps stood out.
        caught: how many of them were changed.
        false_alarms: steps that were changed and did not stand out.
        thresholds: smallest, median and largest; None where the threshold is not one number, or there is none.
        by_parameter: whether parameters were scaled apart.
    """

    spec: str
    rate: float
    mean_scale: float
    spikes: int
    caught: int
    false_alarms: int
    thresholds: tuple[float, float, float] | None
    by_parameter: bool


def spec_recorded(record: Record) -> str:
    """What a record says that it was clipped by, where that is of this package.

    A record is somebody's file, so a class that it names is not imported, and a file not opened.

    Raises:
        SpecError: for anything else, with what to type.
    """
    spec = record.meta["spec"]
    if not is_own(spec):
        raise SpecError(
            f"the record was made with {spec!r}, which is no strategy of hf_gradclip, and code that a record names is "
            f"not run. If you trust it, name it: --clip {spec}."
        )
    return str(spec)


def strategy_for_replay(spec: str) -> Strategy:
    """The strategy of a spec, if norms are all it needs.

    Raises:
        SpecError: for a wrong spec, and for a strategy that needs more than recorded norms, by name.
    """
    config = ClipConfig.parse(spec)
    if config.update is not None:
        raise SpecError(f"{spec}: has an update too. Replay its parts by themselves, the update with --place update.")
    for part in parts_of(config.gradient):
        word, needs = name_of(part), part.needs
        reasons = {
            "it bounds single elements": part.bounds,
            "it needs the largest elements": needs.max_abs,
            "it needs the norms of units and their weights": needs.units is not None or needs.weights,
        }
        for reason, found in reasons.items():
            if found:
                raise SpecError(
                    f"{word} cannot be replayed: {reason}, and a record holds norms by parameter. Replay "
                    "adaptive_norm, adaptive_tensors, mean_sigma, percentile, normalize, global_norm, param_norm, "
                    "block_rms, zclip, adagc, autoclip, soft or skip_step."
                )
    return config.gradient


def replay(record: Record, strategy: Strategy) -> Replay:
    """Feed the recorded norms to a strategy, as the clipper does: a step that was not finite is not remembered.

    Raises:
        SpecError: if the strategy judges the loss and the record has none.
    """
    if strategy.needs.loss and not np.isfinite(record.loss_T).any():
        raise SpecError(f"{describe(strategy)} judges the loss, and this record has none.")
    layout = Layout.of_parameters(record.names, record.numel_P.tolist(), torch.device("cpu"))
    state = strategy.init(layout)
    scale_TP = np.ones(record.norm_TP.shape)
    threshold_T = np.full(len(record), np.nan)
    skipped_T = np.zeros(len(record), dtype=bool)
    at_once = isinstance(state, Stateless) and is_own(describe(strategy)) and not strategy.needs.loss
    with torch.inference_mode():
        for rows, sumsq_TP, loss_T in _statistics(record):
            if at_once:
                scale_TP[rows], threshold_T[rows] = _all_at_once(strategy, state, layout, sumsq_TP)
                continue
            for t, sumsq_P, loss in zip(rows.tolist(), sumsq_TP, loss_T, strict=True):
                plan, state = strategy.update(NormStats(sumsq_P, layout, loss=loss), state)
                scale_TP[t] = plan.scale_S.numpy()
                if plan.threshold is not None:
                    threshold_T[t] = float(plan.threshold)
                skipped_T[t] = _skips(plan)
    return Replay(describe(strategy), scale_TP, threshold_T, skipped_T)


def _all_at_once(
    strategy: Strategy, state: State, layout: Layout, sumsq_TP: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and thresholds of many steps, by a strategy that remembers nothing and skips nothing."""

    def one(sumsq_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plan, _ = strategy.update(NormStats(sumsq_P, layout), state)
        unknown = sumsq_P.new_full((), torch.nan)
        return plan.scale_S.expand(len(layout)), unknown if plan.threshold is None else plan.threshold

    scale_TP, threshold_T = torch.func.vmap(one)(sumsq_TP)
    return scale_TP.numpy(), threshold_T.numpy()


def _statistics(record: Record) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
    """Rows of finite steps, their sums of squares by parameter, their losses.

    Norms by parameter are kept in float32, the total in float64, which they are brought to.
    """
    known = np.flatnonzero(record.finite_T)
    for rows in np.array_split(known, len(known) // AT_ONCE + 1):
        sumsq_TP = np.nan_to_num(record.norm_TP[rows].astype(np.float64)) ** 2  # NaN: a parameter was not there yet
        total_T1 = sumsq_TP.sum(axis=1, keepdims=True)
        sumsq_TP *= np.where(total_T1 > 0, record.norm_T[rows, None] ** 2 / np.where(total_T1 > 0, total_T1, 1), 1)
        yield rows, torch.from_numpy(sumsq_TP), torch.from_numpy(record.loss_T[rows])


def _skips(plan: ClipPlan) -> bool:
    return plan.skip is not None and bool(plan.skip)


def spikes_of(record: Record) -> np.ndarray:
    """Which finite steps stand out by their norm, bool, shape (T,)."""
    spikes_T = np.zeros(len(record), dtype=bool)
    spikes_T[[spike.row for spike in find_spikes(judged(record.norm_T, record.finite_T), [])]] = True
    return spikes_T & record.finite_T


def outcome_of(record: Record, found: Replay, spec: str, spikes_T: np.ndarray | None = None) -> Outcome:
    """A replay in numbers, against the spikes of the record; `spec` is what it is called."""
    finite = record.finite_T
    spikes = spikes_of(record) if spikes_T is None else spikes_T
    clipped = found.clipped_T & finite
    squares = np.nan_to_num(record.norm_TP[finite].astype(np.float64)) ** 2
    with np.errstate(invalid="ignore"):
        ratio = np.sqrt((squares * found.scale_TP[finite] ** 2).sum(axis=1) / squares.sum(axis=1))
    ratio = np.where(found.skipped_T[finite], 0.0, np.nan_to_num(ratio, nan=1.0))
    known = found.threshold_T[np.isfinite(found.threshold_T)]
    return Outcome(
        spec=spec,
        rate=float(clipped.sum() / max(finite.sum(), 1)),
        mean_scale=float(ratio.mean()) if len(ratio) else 1.0,
        spikes=int(spikes.sum()),
        caught=int((clipped & spikes).sum()),
        false_alarms=int((clipped & ~spikes).sum()),
        thresholds=(float(known.min()), float(np.median(known)), float(known.max())) if len(known) else None,
        by_parameter=bool((np.ptp(found.scale_TP, axis=1) > 1e-6).any()) if len(record.names) else False,
    )


def difference(record: Record, found: Replay) -> float:
    """The largest difference between the scales of a replay and those that were recorded.

    Over the finite steps, and the parameters with a norm above 0: a scale of nothing is nothing.
    """
    known = record.finite_T[:, None] & (record.norm_TP > 0)
    return float(np.abs(found.scale_TP - record.scale_TP)[known].max(initial=0.0))

"""Groups of parameters over a run, where a strategy judges them apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hf_gradclip.analysis.replay import Replay, spec_recorded
from hf_gradclip.analysis.run import by_config
from hf_gradclip.budgets import Budgets
from hf_gradclip.config import ClipConfig
from hf_gradclip.record.files import Record
from hf_gradclip.strategy import SpecError, Strategy, name_of

COLUMNS = ("group", "strategy", "tensors", "median norm", "largest", "share", "clipped", "mean scale")


@dataclass(frozen=True)
class Part:
    """One group over the finite steps of a run.

    Args:
        label: of the group.
        strategy: by name.
        tensors: how many trained parameters are in it.
        median_norm: of the whole group, before clipping.
        largest_norm: the same.
        share: median share of the squared norm of the whole gradient.
        clipped: share of the steps in which one of its tensors was scaled.
        mean_scale: mean of the group's norm after / before.
    """

    label: str
    strategy: str
    tensors: int
    median_norm: float
    largest_norm: float
    share: float
    clipped: float
    mean_scale: float


def recorded_groups(record: Record) -> list[Part]:
    """The groups of the configuration that a run ended with; none where it had none, or not this package's."""
    last = by_config(record)[-1] if record.earlier else record
    try:
        strategy = ClipConfig.parse(spec_recorded(last)).gradient
    except SpecError:
        return []
    return _parts(last, strategy, last.scale_TP)


def replayed_groups(record: Record, strategy: Strategy, found: Replay) -> list[Part]:
    """The groups of a strategy that was replayed; none where it has none."""
    return _parts(record, strategy, found.scale_TP)


def _parts(record: Record, strategy: Strategy, scale_TP: np.ndarray) -> list[Part]:
    if not isinstance(strategy, Budgets) or not record.finite_T.any():
        return []
    numbers = np.array([-1 if number is None else number for number in strategy.numbers_of(record.names)])
    scales_TP = scale_TP[record.finite_T].astype(np.float64)
    squares_TP = np.nan_to_num(record.norm_TP[record.finite_T].astype(np.float64)) ** 2
    totals_T = np.maximum(squares_TP.sum(axis=1), np.finfo(np.float64).tiny)
    found = []
    for i, group in enumerate(strategy.groups):
        mine = numbers == i
        if not mine.any():
            continue
        before_T = squares_TP[:, mine].sum(axis=1)
        after_T = (squares_TP[:, mine] * scales_TP[:, mine] ** 2).sum(axis=1)
        ratio_T = np.sqrt(np.divide(after_T, before_T, out=np.ones_like(after_T), where=before_T > 0))
        found.append(
            Part(
                label=group.label,
                strategy=name_of(group.strategy),
                tensors=int(mine.sum()),
                median_norm=float(np.median(np.sqrt(before_T))),
                largest_norm=float(np.sqrt(before_T.max())),
                share=float(np.median(before_T / totals_T)),
                clipped=float((scales_TP[:, mine] < 1).any(axis=1).mean()),
                mean_scale=float(ratio_T.mean()),
            )
        )
    return found


def group_rows(parts: Iterable[Part]) -> list[tuple[str, ...]]:
    """Groups as cells, in the order of COLUMNS."""
    return [
        (
            part.label,
            part.strategy,
            f"{part.tensors:,}",
            f"{part.median_norm:.3g}",
            f"{part.largest_norm:.3g}",
            f"{part.share:.1%}",
            f"{part.clipped:.1%}",
            f"{part.mean_scale:.3f}",
        )
        for part in parts
    ]

"""A picture of a replay: the recorded norms, and where each strategy would have begun to clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_gradclip.analysis.figures import label
from hf_gradclip.analysis.replay import Replay
from hf_gradclip.record.files import Record

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
POINTS = 4000


def draw_replay(record: Record, found: Sequence[Replay], path: Path) -> None:
    """Write a PNG: a panel with norms and thresholds, and one with the scale of the whole gradient per strategy.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install 'hf_gradclip[report]'.") from None
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    every = max(1, len(record) // POINTS)
    steps, norms = record.step_T, np.where(record.finite_T & (record.norm_T > 0), record.norm_T, np.nan)
    top.plot(*_highest(steps, norms, every), color="#888888", linewidth=0.8, label="recorded norm")
    squares = record.norm_TP.astype(np.float64) ** 2
    for run, color in zip(found, COLORS * (1 + len(found) // len(COLORS)), strict=False):
        if np.isfinite(run.threshold_T).any():
            top.plot(steps[::every], run.threshold_T[::every], color=color, linewidth=1.2, label=_short(run.spec))
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = np.sqrt((squares * run.scale_TP**2).sum(axis=1) / squares.sum(axis=1))
        x, y = _highest(steps, -scale, every)
        bottom.plot(x, -y, color=color, linewidth=1.0, label=_short(run.spec))
    top.set_yscale("log")
    top.set_ylabel("norm, and where clipping begins")
    top.legend(frameon=False, fontsize=8)
    bottom.set_ylabel("norm after / before")
    bottom.set_xlabel("step")
    bottom.set_ylim(0, 1.05)
    bottom.legend(frameon=False, fontsize=8)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _highest(steps: np.ndarray, values: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray]:
    """One point for every so many steps, the highest of them, so that a spike is not lost."""
    if every == 1:
        return steps, values
    whole = len(steps) // every * every
    blocks = np.where(np.isnan(values[:whole]), -np.inf, values[:whole]).reshape(-1, every)
    highest = blocks.max(axis=1)
    return steps[:whole:every], np.where(np.isinf(highest), np.nan, highest)


def _short(spec: str) -> str:
    return label(spec if len(spec) < 60 else spec[:57] + "...")

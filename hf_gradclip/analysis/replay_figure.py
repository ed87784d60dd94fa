"""A picture of replays: the recorded norms, where each strategy would have begun to clip, and what it leaves."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_gradclip.analysis.curves import COLORS, DARK, DASHES, GREY, label, legend_above, logarithmic, plainly, thin
from hf_gradclip.analysis.replay import Replay
from hf_gradclip.analysis.run import limits_norm
from hf_gradclip.analysis.svg import settings
from hf_gradclip.record.files import Record


def draw_replay(record: Record, found: Sequence[Replay], specs: Sequence[str], path: Path) -> None:
    """Write a PNG of replays, each under the spec that was typed for it.

    Raises:
        ImportError: without matplotlib.
    """
    with settings(10) as figure_of:
        figure = figure_of(9, 6)
        draw_panels(figure, record, found, specs, narrow=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def draw_panels(figure: Any, record: Record, found: Sequence[Replay], specs: Sequence[str], narrow: bool) -> None:
    """A panel with norms and thresholds, and one with the scale of the whole gradient per strategy."""
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps, norms = record.step_T, np.where(record.finite_T & (record.norm_T > 0), record.norm_T, np.nan)
    top.plot(*thin(steps, norms), color=GREY, linewidth=0.8, label="recorded norm")
    squares = np.nan_to_num(record.norm_TP.astype(np.float64), posinf=0.0) ** 2
    for i, (run, spec) in enumerate(zip(found, specs, strict=True)):
        style: dict[str, Any] = {
            "color": COLORS[i % len(COLORS)],
            "linestyle": DASHES[i // len(COLORS) % len(DASHES)],
            "linewidth": 1.2,
            "label": label("\n".join(textwrap.wrap(spec.replace("+", " + "), 60))),
        }
        known = limits_norm(run.spec) and np.isfinite(run.threshold_T).any()
        top.plot(*(thin(steps, run.threshold_T, np.nanmin) if known else ([], [])), **style)
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = np.sqrt((squares * run.scale_TP**2).sum(axis=1) / squares.sum(axis=1))
        scale = np.where(run.skipped_T, 0.0, scale)
        bottom.plot(*thin(steps, scale, np.nanmin), **style)
    logarithmic(top)
    top.set_ylabel("norm and threshold", color=DARK)
    bottom.set_ylabel("norm after / before", color=DARK)
    bottom.set_xlabel("step", color=DARK)
    bottom.set_ylim(0, 1.05)
    for axes in (top, bottom):
        plainly(axes)
    legend_above(top, narrow=narrow or max(map(len, specs)) > 30)

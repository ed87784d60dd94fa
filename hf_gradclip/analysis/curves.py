"""The curves of a report over steps: loss, learning rate, norms, and the share of steps that were clipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hf_gradclip.analysis.run import Run, by_parameter, clipped_steps, threshold_of_norm
from hf_gradclip.record.files import Record
from hf_gradclip.say import printable

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", ":")
GREY, DARK, GRID, INK = "#9a9a9a", "#333333", "#e6e6e6", "#1c1c1c"
POINTS = 1500


def thin(
    steps: np.ndarray, values: np.ndarray, how: Callable[..., np.ndarray] = np.nanmax
) -> tuple[np.ndarray, np.ndarray]:
    """At most about POINTS points: of each run of steps the largest value (or `how`), so that no spike is lost."""
    every = -(-len(steps) // POINTS)
    if every <= 1:
        return steps, values
    count = -(-len(steps) // every)
    padded = np.full(count * every, np.nan)
    padded[: len(values)] = values
    blocks = padded.reshape(count, every)
    empty = np.isnan(blocks).all(axis=1)
    blocks[empty] = 0.0
    found = how(blocks, axis=1)
    return steps[::every], np.where(empty, np.nan, found)


def rolling_rate(clipped: np.ndarray) -> np.ndarray:
    """Mean over the last window of a thirtieth of the run, at least 10 steps: of flags, the share of clipped steps."""
    window = max(10, len(clipped) // 30)
    sums = np.concatenate([[0], np.cumsum(clipped)])
    ends = np.arange(1, len(clipped) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def smooth(values: np.ndarray) -> np.ndarray:
    """Medians over windows of a fortieth of the curve, at least 5 points, each around its point; NaN where all are."""
    reach = max(5, len(values) // 40) // 2
    padded = np.pad(values.astype(np.float64), reach, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    empty = np.asarray(np.isnan(windows).all(axis=1))
    return np.where(empty, np.nan, np.nanmedian(np.where(empty[:, None], 0.0, windows), axis=1))


def label(name: str) -> str:
    """A name for a picture: matplotlib would read formulas between two dollar signs."""
    return printable(name).replace("$", r"\$")


def draw_loss(figure: Any, runs: Sequence[Run], narrow: bool) -> None:
    """The loss, and the steps whose norm stands out."""
    axes, marked = _axes(figure), []
    for run, style in _styled(runs):
        record, name = run.gradient, label(run.name) if len(runs) > 1 else "loss"
        _overlay(axes, *thin(record.step_T, record.loss_T), style, name, many=len(runs) > 1)
        rows = {int(step): row for row, step in enumerate(record.step_T)}
        marked += [(record, rows[spike["step"]]) for spike in run.spikes if spike["step"] in rows]
    if marked:
        places = [(record.step_T[row], record.loss_T[row]) for record, row in marked]
        axes.plot(*zip(*places, strict=True), "v", color=INK, markersize=6, label="spike of the norm")
    finite = np.concatenate([run.gradient.loss_T[np.isfinite(run.gradient.loss_T)] for run in runs])
    if len(finite) and finite.min() > 0 and finite.max() > 8 * np.median(finite):
        logarithmic(axes)
    axes.set_ylabel("loss", color=DARK)
    if len(runs) > 1 or marked:
        legend_above(axes, narrow)


def draw_learning_rate(figure: Any, runs: Sequence[Run], narrow: bool) -> None:
    """The learning rate of the first parameter group."""
    from matplotlib.ticker import StrMethodFormatter

    axes = _axes(figure)
    for run, style in _styled(runs):
        record = run.gradient
        axes.plot(*thin(record.step_T, record.learning_rate_T), linewidth=1.4, label=label(run.name), **style)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if len(runs) > 1:
        legend_above(axes, narrow)


def draw_norm(figure: Any, runs: Sequence[Run], narrow: bool) -> None:
    """The norm before clipping; of one run with its threshold."""
    axes, many = _axes(figure), len(runs) > 1
    for i, (run, style) in enumerate(_styled(runs)):
        _norm_lines(axes, run.gradient, style, label(run.name) if many else "norm", many, first=i == 0)
    logarithmic(axes)
    axes.set_ylabel("norm (log)", color=DARK)
    legend_above(axes, narrow)


def draw_update(figure: Any, runs: Sequence[Run], narrow: bool) -> None:
    """The norm of the update of one run, with its threshold."""
    axes, record = _axes(figure), runs[0].update
    assert record is not None
    _norm_lines(axes, record, {"color": COLORS[0]}, "norm of the update", many=False, first=True)
    logarithmic(axes)
    axes.set_ylabel("norm (log)", color=DARK)
    legend_above(axes, narrow)


def draw_rate(figure: Any, runs: Sequence[Run], narrow: bool) -> None:
    """The share of steps that were clipped, over a window; of one run that scaled tensors apart, of tensors too."""
    from matplotlib.ticker import PercentFormatter

    axes = _axes(figure)
    apart = len(runs) == 1 and by_parameter(runs[0].gradient)
    for run, style in _styled(runs):
        record = run.gradient
        rate = rolling_rate(clipped_steps(record))
        name = label(run.name) if len(runs) > 1 else "steps in which anything was clipped"
        axes.plot(*thin(record.step_T, rate), linewidth=1.4, label=name, **style)
        if apart:
            tensors = rolling_rate((record.scale_TP < 1).mean(axis=1) * clipped_steps(record))
            axes.plot(*thin(record.step_T, tensors), color=COLORS[1], linewidth=1.3, label="tensors clipped")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(runs) > 1 or apart:
        legend_above(axes, narrow)


def _norm_lines(axes: Any, record: Record, style: dict[str, str], name: str, many: bool, first: bool) -> None:
    norms = np.where(record.finite_T & (record.norm_T > 0), record.norm_T, np.nan)
    _overlay(axes, *thin(record.step_T, norms), style, name, many)
    if not many and np.isfinite(threshold_T := threshold_of_norm(record)).any():
        found = thin(record.step_T, threshold_T, np.nanmin)
        axes.plot(*found, color=COLORS[1], linewidth=1.3, label="threshold")
    broken = ~record.finite_T
    if broken.any():
        high = 1.0 if np.isnan(norms).all() else np.nanmax(norms)
        mark = "NaN or inf" if first else None
        color = style["color"] if many else INK
        axes.plot(record.step_T[broken], np.full(broken.sum(), high), "x", color=color, label=mark)
    if not many and (clipped := clipped_steps(record)).any():
        low = np.full(clipped.sum(), np.nanmin(norms) * 0.85)
        axes.plot(record.step_T[clipped], low, "|", color=COLORS[1], markersize=7, label="clipped")


def _overlay(axes: Any, steps: np.ndarray, values: np.ndarray, style: dict[str, str], name: str, many: bool) -> None:
    """A curve; one among several is pale, with its medians above it, so that none hides another."""
    if not many:
        axes.plot(steps, values, linewidth=1.0, label=name, **style)
        return
    axes.plot(steps, values, linewidth=0.6, alpha=0.3, color=style["color"], zorder=1.5)
    axes.plot(steps, smooth(values), linewidth=1.8, label=name, zorder=2.5, **style)


def _axes(figure: Any) -> Any:
    axes = figure.subplots()
    place(figure)
    plainly(axes)
    axes.set_xlabel("step", color=DARK)
    return axes


def place(figure: Any, left: float = 0.75, right: float = 0.12, top: float = 0.12, bottom: float = 0.46) -> None:
    """Leave margins, in inches; a layout that matplotlib finds by itself takes longer than all else."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)


def legend_above(axes: Any, narrow: bool) -> None:
    """A legend above axes, in as many lines as it needs; their place is lowered for it."""
    handles, names = axes.get_legend_handles_labels()
    columns = 1 if narrow else 4
    lines = sum(1 + name.count("\n") for name in names) if narrow else -(-len(names) // columns)
    place(axes.figure, top=0.1 + 0.2 * lines)
    axes.legend(
        handles, names, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2
    )


def plainly(axes: Any) -> None:
    """Axes with two lines and a grid behind the curves."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=DARK)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _styled(runs: Sequence[Run]) -> list[tuple[Run, dict[str, str]]]:
    """Each run with a colour, and dashes where the colours do not suffice."""
    count = len(COLORS)
    return [
        (run, {"color": COLORS[i % count], "linestyle": DASHES[i // count % len(DASHES)]}) for i, run in enumerate(runs)
    ]


def logarithmic(axes: Any) -> None:
    """A logarithmic axis of norms, with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=10))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())

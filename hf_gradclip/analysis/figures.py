"""The pictures of a report, each drawn for a wide page and for a narrow one."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_gradclip.analysis.run import Run, by_parameter, clipped_steps
from hf_gradclip.record.files import Record
from hf_gradclip.say import printable

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY, DARK = "#9a9a9a", "#333333"
POINTS = 1500
BINS = 300
MOST_ROWS, MOST_ROWS_NARROW = 48, 20
WIDE, NARROW = (9.0, 10), (4.6, 9)
"""Width in inches and size of the type."""

_LAYER = re.compile(r"^(.*?(?:layers?|h|blocks?|block|stages?)\.\d+)\.([^.]+)")


@dataclass(frozen=True)
class Picture:
    """PNG images of one thing.

    Args:
        name: of the file.
        title: above it.
        text: what it shows, for those who do not see it.
        wide: PNG.
        narrow: PNG, for a phone.
    """

    name: str
    title: str
    text: str
    wide: bytes
    narrow: bytes


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


def rows_of(names: Sequence[str], most: int = MOST_ROWS) -> list[tuple[str, list[int]]]:
    """The rows of the heat map: every tensor if they are few, else parts of layers, else layers."""
    if len(names) <= most:
        return [(name, [i]) for i, name in enumerate(names)]
    for depth in (2, 1):
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            match = _LAYER.match(name)
            key = name.removesuffix(".weight") if match is None else ".".join(match.groups()[:depth])
            groups.setdefault(key, []).append(i)
        if len(groups) <= most:
            return list(groups.items())
    size = -(-len(groups) // most)
    keys = list(groups)
    chunks = [keys[i : i + size] for i in range(0, len(keys), size)]
    return [(f"{c[0]} to {c[-1]}" if len(c) > 1 else c[0], [i for key in c for i in groups[key]]) for c in chunks]


def heat_of(record: Record, most: int = MOST_ROWS) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Row names, norms of shape (rows, bins), the largest of each bin, NaN where it is 0 or not finite; bin starts."""
    rows = rows_of(record.names, most)
    squares = np.where(record.finite_T[:, None], record.norm_TP, np.nan).astype(np.float64) ** 2
    every = -(-len(record) // BINS)
    starts = np.arange(0, len(record), every)
    norms = np.stack([np.sqrt(squares[:, members].sum(axis=1)) for _, members in rows])
    filled = np.fmax.reduceat(norms, starts, axis=1)
    return [name for name, _ in rows], np.where(filled > 0, filled, np.nan), record.step_T[starts]


def pictures_of(runs: Sequence[Run]) -> list[Picture]:
    """Those of the runs together, then the heat map of each."""
    names = " and ".join(run.name for run in runs)
    many = len(runs) > 1
    pictures = [
        _picture("loss", "Loss", f"Loss over steps of {names}; steps whose norm stands out are marked.", runs, _loss),
        _picture(
            "norm",
            "Norm before clipping",
            f"Norm over steps of {names} on a logarithmic scale, with the threshold.",
            runs,
            _norm,
        ),
        _picture(
            "rate", "Share of steps clipped", f"Share of clipped steps of {names}, over a window of steps.", runs, _rate
        ),
    ]
    for run in runs:
        suffix = f"_{run.name}" if many else ""
        title = "Norm by tensor" + (f", {run.name}" if many else "")
        pictures.append(
            _picture(f"heat{suffix}", title, f"Norm by tensor and step of {run.name}, by colour.", [run], _heat)
        )
        if run.update is not None:
            title = "Norm of the update" + (f", {run.name}" if many else "")
            text = f"Norm of the update over steps of {run.name}, with the threshold."
            pictures.append(_picture(f"update{suffix}", title, text, [run], _update))
    return pictures


def label(name: str) -> str:
    """A name for a picture: matplotlib would read formulas between two dollar signs."""
    return printable(name).replace("$", r"\$")


def _picture(name: str, title: str, text: str, runs: Sequence[Run], draw: Callable[..., None]) -> Picture:
    images = []
    for width, size in (WIDE, NARROW):
        figure = _figure(width, size, _height(draw, runs, width))
        draw(figure, runs, width == NARROW[0])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        images.append(buffer.getvalue())
    return Picture(name, title, text, *images)


def _height(draw: Callable[..., None], runs: Sequence[Run], width: float) -> float:
    if draw is _heat:
        rows = len(rows_of(runs[0].gradient.names, MOST_ROWS if width == WIDE[0] else MOST_ROWS_NARROW))
        return 1.2 + 0.19 * rows
    return {_rate: 2.2}.get(draw, 3.2) * (1.0 if width == WIDE[0] else 0.85)


def _figure(width: float, size: int, height: float) -> Any:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a report needs matplotlib: pip install 'hf_gradclip[report]'.") from None
    with rc_context({"font.size": size}):
        return Figure(figsize=(width, height), layout="constrained")


def _axes(figure: Any) -> Any:
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=DARK)
    axes.set_xlabel("step", color=DARK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _colored(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    return [(run, COLORS[i % len(COLORS)]) for i, run in enumerate(runs)]


def _legend(axes: Any, narrow: bool) -> None:
    columns = 1 if narrow else 4
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2)


def _loss(figure: Any, runs: Sequence[Run], narrow: bool) -> None:
    axes, marked = _axes(figure), False
    for run, color in _colored(runs):
        record = run.gradient
        axes.plot(*thin(record.step_T, record.loss_T), color=color, linewidth=1.1, label=label(run.name))
        rows = {int(step): row for row, step in enumerate(record.step_T)}
        at = [rows[spike["step"]] for spike in run.spikes if spike["step"] in rows]
        if at:
            axes.plot(
                record.step_T[at],
                record.loss_T[at],
                "v",
                color="black",
                markersize=6,
                label=None if marked else "spike of the norm",
            )
            marked = True
    finite = np.concatenate([run.gradient.loss_T[np.isfinite(run.gradient.loss_T)] for run in runs])
    if len(finite) and finite.min() > 0 and finite.max() > 8 * np.median(finite):
        _log(axes)
    axes.set_ylabel("loss", color=DARK)
    if len(runs) > 1 or marked:
        _legend(axes, narrow)


def _norm(figure: Any, runs: Sequence[Run], narrow: bool) -> None:
    axes = _axes(figure)
    for run, color in _colored(runs):
        _norm_lines(axes, run.gradient, color, label(run.name) if len(runs) > 1 else "norm", threshold=len(runs) == 1)
    _log(axes)
    axes.set_ylabel("norm (log)", color=DARK)
    _legend(axes, narrow)


def _update(figure: Any, runs: Sequence[Run], narrow: bool) -> None:
    axes, record = _axes(figure), runs[0].update
    assert record is not None
    _norm_lines(axes, record, COLORS[0], "norm of the update", threshold=True)
    _log(axes)
    axes.set_ylabel("norm (log)", color=DARK)
    _legend(axes, narrow)


def _norm_lines(axes: Any, record: Record, color: str, name: str, threshold: bool) -> None:
    norms = np.where(record.finite_T & (record.norm_T > 0), record.norm_T, np.nan)
    axes.plot(*thin(record.step_T, norms), color=color, linewidth=1.0, label=name)
    if threshold and np.isfinite(record.threshold_T).any():
        found = thin(record.step_T, record.threshold_T, np.nanmin)
        axes.plot(*found, color=COLORS[1], linewidth=1.3, label="threshold")
    broken = ~record.finite_T
    if broken.any():
        high = 1.0 if np.isnan(norms).all() else np.nanmax(norms)
        axes.plot(record.step_T[broken], np.full(broken.sum(), high), "x", color="black", label="NaN or inf")
    if threshold and (clipped := clipped_steps(record)).any():
        low = np.nanmin(norms) * 0.85
        axes.plot(
            record.step_T[clipped], np.full(clipped.sum(), low), "|", color=COLORS[1], markersize=7, label="clipped"
        )


def _log(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=10))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _rate(figure: Any, runs: Sequence[Run], narrow: bool) -> None:
    from matplotlib.ticker import PercentFormatter

    axes = _axes(figure)
    apart = len(runs) == 1 and by_parameter(runs[0].gradient)
    for run, color in _colored(runs):
        record = run.gradient
        rate = rolling_rate(clipped_steps(record))
        name = label(run.name) if len(runs) > 1 else "steps in which anything was clipped"
        axes.plot(*thin(record.step_T, rate), color=color, linewidth=1.3, label=name)
        if apart:
            tensors = rolling_rate((record.scale_TP < 1).mean(axis=1) * clipped_steps(record))
            axes.plot(*thin(record.step_T, tensors), color=COLORS[1], linewidth=1.3, label="tensors clipped")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("clipped", color=DARK)
    if len(runs) > 1 or apart:
        _legend(axes, narrow)


def _heat(figure: Any, runs: Sequence[Run], narrow: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    names, norms, starts = heat_of(runs[0].gradient, MOST_ROWS_NARROW if narrow else MOST_ROWS)
    axes = figure.subplots()
    known = norms[np.isfinite(norms)]
    low, high = (np.quantile(known, 0.01), known.max()) if len(known) else (1.0, 10.0)
    scale = LogNorm(low, high if high > low else low * 10)
    last = runs[0].gradient.step_T[-1]
    extent = (starts[0] - 0.5, last + 0.5, len(names) - 0.5, -0.5)
    colors = colormaps["viridis"].with_extremes(bad="white")
    image = axes.imshow(norms, aspect="auto", norm=scale, cmap=colors, interpolation="nearest", extent=extent)
    axes.set_yticks(range(len(names)), [_short(name, 22 if narrow else 44) for name in names], fontsize=7)
    axes.set_xlabel("step", color=DARK)
    axes.tick_params(length=0, axis="y")
    bar = figure.colorbar(image, ax=axes, location="top" if narrow else "right", pad=0.02, shrink=0.6)
    bar.set_label("norm; white is 0")
    bar.outline.set_visible(False)


def _short(name: str, most: int) -> str:
    name = name.removeprefix("model.").removesuffix(".weight")
    return label(name if len(name) <= most else "…" + name[1 - most :])

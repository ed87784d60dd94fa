"""The heat map of a report: the norm of every tensor in every step, and where a NaN or inf was."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_gradclip.analysis.curves import DARK, label, place
from hf_gradclip.analysis.names import plain
from hf_gradclip.record.files import Record

BINS, BINS_NARROW = 300, 100
"""No more than there are dots on a screen: a bin between two of them would not be seen."""
MOST_ROWS, MOST_ROWS_NARROW = 48, 20
BROKEN = "#e8112d"

_LAYER = re.compile(r"^(.*?(?:layers?|h|blocks?|block|stages?)\.\d+)\.([^.]+)")


class Heat(NamedTuple):
    """Norms by row and bin of steps.

    Args:
        names: of the R rows.
        norm_RB: the largest of each bin; NaN where it is 0 or was not measured.
        broken_RB: where a NaN or inf was, bool.
        first_B: the first step of each bin.
        last_B: the last.
    """

    names: list[str]
    norm_RB: np.ndarray
    broken_RB: np.ndarray
    first_B: np.ndarray
    last_B: np.ndarray


def rows_of(names: Sequence[str], most: int = MOST_ROWS) -> list[tuple[str, list[int]]]:
    """The rows of the heat map: every tensor if they are few, else parts of layers, else layers."""
    names = [plain(name) for name in names]
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
    return [(_span(chunk[0], chunk[-1]), [i for key in chunk for i in groups[key]]) for chunk in chunks]


def _span(first: str, last: str) -> str:
    """Names from one to another: model.layers.1 and model.layers.4 are model.layers.1 to 4."""
    if first == last:
        return first
    stem = f"{first.rpartition('.')[0]}."
    return f"{first} to {last.removeprefix(stem)}"


def broken_tensors(record: Record) -> np.ndarray:
    """Which tensors had a NaN or inf in which step, bool, shape (T, P).

    A step that a loss scaler dropped has none: nothing was measured of its tensors. Nor has one that was not trained
    yet, which has no scale either.
    """
    unmeasured_T = np.isinf(record.norm_T) & np.isnan(record.norm_TP).all(axis=1)
    broken_TP = ~record.finite_T[:, None] & ~np.isfinite(record.norm_TP) & ~np.isnan(record.scale_TP)
    return np.asarray(broken_TP & ~unmeasured_T[:, None])


def heat_of(record: Record, narrow: bool = False) -> Heat:
    """The norms of a record, in fewer rows and bins on a narrow page."""
    rows = rows_of(record.names, MOST_ROWS_NARROW if narrow else MOST_ROWS)
    measured_TP = np.isfinite(record.norm_TP)
    squares_TP = np.where(measured_TP, record.norm_TP, 0.0).astype(np.float64) ** 2
    broken_TP = broken_tensors(record)
    every = -(-len(record) // (BINS_NARROW if narrow else BINS))
    starts = np.arange(0, len(record), every)
    norms_RT = np.stack([np.sqrt(squares_TP[:, members].sum(axis=1)) for _, members in rows])
    broken_RT = np.stack([broken_TP[:, members].any(axis=1) for _, members in rows])
    norm_RB = np.maximum.reduceat(norms_RT, starts, axis=1)
    return Heat(
        names=[name for name, _ in rows],
        norm_RB=np.where(norm_RB > 0, norm_RB, np.nan),
        broken_RB=np.logical_or.reduceat(broken_RT, starts, axis=1),
        first_B=record.step_T[starts],
        last_B=record.step_T[np.minimum(starts + every, len(record)) - 1],
    )


def draw_heat(figure: Any, record: Record, narrow: bool) -> None:
    """The heat map: colour is the norm, blank is 0, red is NaN or inf."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, to_rgba
    from matplotlib.ticker import StrMethodFormatter

    heat = heat_of(record, narrow)
    axes = figure.subplots()
    known = heat.norm_RB[np.isfinite(heat.norm_RB)]
    low, high = (np.quantile(known, 0.01), known.max()) if len(known) else (1.0, 10.0)
    colors = ScalarMappable(LogNorm(low, high if high > low else low * 10), colormaps["viridis"])
    cells = colors.to_rgba(np.nan_to_num(heat.norm_RB, nan=low))
    cells[np.isnan(heat.norm_RB)] = 0.0  # transparent
    cells[heat.broken_RB] = to_rgba(BROKEN)
    extent = (heat.first_B[0] - 0.5, heat.last_B[-1] + 0.5, len(heat.names) - 0.5, -0.5)
    names = [_short(name, 26 if narrow else 44) for name in heat.names]
    axes.imshow(cells, aspect="auto", interpolation="none", extent=extent)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("step", color=DARK)
    axes.tick_params(length=0, axis="y", labelcolor=DARK)
    axes.tick_params(axis="x", labelcolor=DARK)
    left = 0.15 + 0.066 * max(map(len, names))
    place(figure, left, **({"top": 0.75} if narrow else {"right": 1.0}))
    width, height = figure.get_size_inches()
    wide_bar = (left / width, 1 - 0.32 / height, 0.7 * (1 - left / width), 0.12 / height)
    long_bar = (1 - 0.85 / width, 0.3, 0.14 / width, 0.6)
    place_of_bar = figure.add_axes(wide_bar if narrow else long_bar)
    numbers = StrMethodFormatter("{x:g}")  # the default sets formulas, slowly
    direction = "horizontal" if narrow else "vertical"
    bar = figure.colorbar(colors, cax=place_of_bar, orientation=direction, format=numbers)
    bar.set_label("norm; blank is 0" + (", red is NaN or inf" if heat.broken_RB.any() else ""), color=DARK, fontsize=8)
    bar.ax.tick_params(labelcolor=DARK, labelsize=7)
    bar.ax.minorticks_off()
    bar.solids.set_rasterized(True)
    bar.outline.set_visible(False)


def _short(name: str, most: int) -> str:
    """A name of so many letters: its begin, which has the layer, and its end."""
    name = name.removeprefix("model.").removesuffix(".weight").replace(".lora_A.default", ".lora_A")
    name = name.replace(".lora_B.default", ".lora_B")
    return label(name if len(name) <= most else f"{name[:9]}…{name[10 - most :]}")

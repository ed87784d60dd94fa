"""Two pictures of a task: how its losses went, and the intervals of what clipping did to where they ended."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from compare_parts.rows import Comparison
from compare_parts.tables import interval, lost
from compare_parts.training import MEANS, NOTHING, Run, broken_steps, stretch

WIDE = 3.6
"""Inches of a panel."""
ACROSS = 4
"""Panels beside each other; more are below."""
LINE = 45
"""Characters of a title for each of them."""


def curves(found: Comparison, arms: Mapping[str, Run], data: Sequence[str], seed: int) -> Any:
    """A figure: the losses of the batches in the runs of one seed, a panel for each kind of data.

    Args:
        found: all outcomes.
        arms: the lines: by clip its run on sound data, with its learning rate.
        data: the panels. Steps whose batch is broken are marked below.
        seed: whose runs.
    """
    plain = next(iter(arms.values()))
    figure, panels = _panels(len(data), 2.8, f"{plain.task}, {plain.optimizer}: losses of the batches, seed {seed}")
    begin = found.outcomes[replace(plain, seed=seed)].start
    drawn: list[float] = []
    for panel, kind in zip(panels, data, strict=True):
        for i, (clip, arm) in enumerate(arms.items()):
            outcome = found.outcomes[replace(arm, data=kind, seed=seed)]
            losses = outcome.losses
            drawn += filter(math.isfinite, losses)
            size = stretch(plain.steps, MEANS if outcome.end is None else len(losses))
            wide = 3 - 2 * (i + 1) / len(arms)  # one that is under another is seen beside it
            panel.plot([(place + 0.5) * size for place in range(len(losses))], losses, label=clip, lw=wide)
        broken = sorted(broken_steps(replace(plain, data=kind, seed=seed)))
        if kind == "level":
            panel.axvspan(broken[0], plain.steps, color="0.9", zorder=0, label="all broken")
        elif broken:
            panel.plot(broken, [0.02] * len(broken), "k|", ms=7, transform=panel.get_xaxis_transform(), label="broken")
        panel.set_xlim(0, plain.steps)
        panel.set_title(kind, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
    if begin is not None and drawn and max(drawn) > 1.15 * begin:  # a run that is lost would flatten the others
        panels[0].set_ylim(min(drawn) - 0.05 * begin, 1.15 * begin)
    named = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=min(len(data), ACROSS), fontsize=8)
    return figure


def intervals(found: Comparison, arms: Mapping[str, Run], data: Sequence[str], seeds: Sequence[int]) -> Any:
    """A figure: mean and 95 % interval of the differences at the end, a panel for each kind of data.

    On sound data the difference is to the run without clipping, elsewhere to the same clip on sound data.

    Args:
        found: all outcomes.
        arms: the rows: by clip its run on sound data, with its learning rate.
        data: the panels; "sound" first.
        seeds: which pairs.
    """
    what = f"of {len(seeds)} seeds with 95 % interval" if len(seeds) > 1 else "of one seed"
    plain = next(iter(arms.values()))
    title = f"{plain.task}, {plain.optimizer}: difference of the losses at the end, {what}; left of 0 is better"
    figure, panels = _panels(len(data), 0.7 + 0.32 * len(arms), title)
    for panel, kind in zip(panels, data, strict=True):
        panel.axvline(0, color="0.7", lw=0.8, zorder=0)
        for row, (clip, arm) in enumerate(arms.items()):
            run = replace(arm, data=kind)
            if kind == data[0] and clip == NOTHING:
                continue  # it would be less itself
            mine = found.ends(run, seeds)
            theirs = found.ends(arms[NOTHING] if kind == data[0] else arm, seeds)
            if words := lost(mine, theirs):
                panel.text(
                    0.5,
                    row,
                    words.replace("no better than at the start", "learnt nothing"),
                    transform=panel.get_yaxis_transform(),
                    fontsize=8,
                    ha="center",
                    va="center",
                )
            else:
                mean, reach = interval(mine, theirs)
                panel.errorbar(
                    mean, row, xerr=None if math.isnan(reach) else reach, fmt="o", ms=3, color="C0", capsize=2
                )
        panel.set_yticks(range(len(arms)), list(arms))
        panel.set_ylim(len(arms) - 0.5, -0.5)
        panel.locator_params(axis="x", nbins=5)
        panel.set_title(f"{kind}, less " + (NOTHING if kind == data[0] else "its own sound"), fontsize=9)
    return figure


def _panels(count: int, high: float, title: str) -> tuple[Any, list[Any]]:
    """A figure with its title, and its panels, which have one scale from top to bottom."""
    from matplotlib.figure import Figure

    across = min(count, ACROSS)
    down = math.ceil(count / across)
    figure = Figure(figsize=(WIDE * across, high * down + 0.4), layout="constrained")
    figure.suptitle(textwrap.fill(title, LINE * across), fontsize=10)
    panels: list[Any] = []
    for i in range(count):
        panels.append(panel := figure.add_subplot(down, across, i + 1, sharey=panels[0] if panels else None))
        panel.tick_params(labelsize=8, labelleft=i % across == 0)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels

"""Two pictures of a task: how its losses went, and the intervals of what clipping did to where they ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from compare_parts.rows import Comparison
from compare_parts.tables import interval, lost
from compare_parts.training import NOTHING, Run, broken_steps

WIDE = 3.6
"""Inches of a panel."""
LONGEST = 6
"""A level with more broken steps than this share, 1 / LONGEST, is shaded from its first one on."""


def curves(found: Comparison, plain: Run, clips: Sequence[str], data: Sequence[str], seed: int) -> Any:
    """A figure: the losses of the batches in the runs of one seed, a panel for each kind of data.

    Args:
        found: all outcomes.
        plain: of the task, the optimizer and the learning rate, without clipping, on sound data.
        clips: the lines.
        data: the panels. Steps whose batch is broken are marked below.
        seed: whose runs.
    """
    figure, panels = _panels(len(data), 3.2)
    begin = found.outcomes[replace(plain, seed=seed)].start or math.nan
    for panel, kind in zip(panels, data, strict=True):
        for clip in clips:
            losses = found.outcomes[run := replace(plain, clip=clip, data=kind, seed=seed)].losses
            stretch = math.ceil(run.steps / max(len(losses), 1))
            panel.plot([(i + 0.5) * stretch for i in range(len(losses))], losses, label=clip, lw=1.2)
        broken = sorted(broken_steps(replace(plain, data=kind, seed=seed)))
        if len(broken) * LONGEST > plain.steps:
            panel.axvspan(broken[0], plain.steps, color="0.9", zorder=0)
        elif broken:
            panel.plot(broken, [0.02] * len(broken), "k|", ms=7, transform=panel.get_xaxis_transform(), label="broken")
        panel.set_ylim(top=1.15 * begin)
        panel.set_title(kind, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
    panels[0].set_ylabel("loss of the batch", fontsize=8)
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def intervals(found: Comparison, plain: Run, clips: Sequence[str], data: Sequence[str], seeds: Sequence[int]) -> Any:
    """A figure: mean and 95 % interval of the differences at the end, a panel for each kind of data.

    On sound data the difference is to the run without clipping, elsewhere to the same clip on sound data.

    Args:
        found: all outcomes.
        plain: of the task, the optimizer and the learning rate, without clipping, on sound data.
        clips: the rows.
        data: the panels; "sound" first.
        seeds: which pairs.
    """
    figure, panels = _panels(len(data), 0.7 + 0.32 * len(clips))
    for panel, kind in zip(panels, data, strict=True):
        panel.axvline(0, color="0.7", lw=0.8, zorder=0)
        for row, clip in enumerate(clips):
            run = replace(plain, clip=clip, data=kind)
            mine = found.ends(run, seeds)
            theirs = found.ends(replace(run, clip=NOTHING) if kind == data[0] else replace(run, data=data[0]), seeds)
            if words := lost(mine, theirs):
                panel.text(0, row, words.replace("no better than at the start", "lost"), fontsize=7, va="center")
            else:
                mean, reach = interval(mine, theirs)
                panel.errorbar(
                    mean, row, xerr=None if math.isnan(reach) else reach, fmt="o", ms=3, color="C0", capsize=2
                )
        panel.set_yticks(range(len(clips)), clips if panel is panels[0] else [""] * len(clips))
        panel.set_ylim(len(clips) - 0.5, -0.5)
        panel.set_title(f"{kind}, less " + (f"`{NOTHING}`" if kind == data[0] else "its own sound"), fontsize=9)
    return figure


def _panels(count: int, high: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDE * count, high), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for panel in panels:
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels

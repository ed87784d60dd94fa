"""The tables of a comparison: means over seeds, and intervals of paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from compare_parts.rows import RATE_SEEDS, Comparison
from compare_parts.training import BETA1, BROKEN, FAULTS, NOTHING, UNBROKEN, Run

STOCK = "global_norm:max_norm=1"
T95 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)
"""Student's t for a two-sided interval of 95 %, by degrees of freedom from 1."""


def paired(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Mean of the differences and its 95 % interval; or which of the two learnt nothing."""
    if words := lost(mine, theirs):
        return words
    mean, reach = interval(mine, theirs)
    return f"{mean:+.3f} [{mean - reach:+.3f}, {mean + reach:+.3f}]" if len(mine) > 1 else f"{mean:+.3f}"


def lost(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Which of the two learnt nothing in how many runs; "" for none."""
    for whose, ends in (("", mine), ("the other: ", theirs)):
        if count := sum(map(math.isinf, ends)):
            return f"{whose}no better than at the start in {count} of {len(ends)}"
    return ""


def interval(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences, and how far its 95 % interval reaches to either side; nan for one pair."""
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return mean, math.nan
    return mean, T95[len(differences) - 2] * statistics.stdev(differences) / math.sqrt(len(differences))


def number(values: Sequence[float]) -> str:
    """The mean, or a dash where one of them learnt nothing."""
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if math.isfinite(mean) else "-"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]  # a pattern may have one
    first, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, "|---" * len(head) + "|", *rest])


def detail(
    found: Comparison,
    arms: Mapping[str, Run],
    data: Sequence[str],
    seeds: Sequence[int],
    others: Sequence[str] = (STOCK,),
) -> str:
    """The table of one task and one optimizer.

    Args:
        found: all outcomes.
        arms: the rows: by clip its run on sound data, with its learning rate. Where they differ, they have a column.
        data: the columns; "sound" first.
        seeds: what is averaged over.
        others: of the rows, those that all are compared with; on sound data with `none` in any case.
    """
    against = [clip for clip in dict.fromkeys((NOTHING, *others)) if clip in arms]
    broken_against = [clip for clip in against if clip in others]
    rated = len({arm.lr for arm in arms.values()}) > 1
    rows = []
    for clip, mine in arms.items():
        sound = found.ends(mine, seeds)
        row = [f"`{clip}`", *[f"{mine.lr:g}"] * rated, number(sound), found.clipped(mine, seeds)]
        row += found.norms(mine, seeds)
        row += ["" if clip == c else paired(sound, found.ends(arms[c], seeds)) for c in against]
        for kind in data[1:]:
            broken = replace(mine, data=kind)
            ends = found.ends(broken, seeds)
            row += [number(ends), paired(ends, sound), found.clipped(broken, seeds)]
            theirs = [found.ends(replace(arms[c], data=kind), seeds) for c in broken_against]
            row += ["" if clip == c else paired(ends, end) for c, end in zip(broken_against, theirs, strict=True)]
        rows.append(row)
    head = ["clip", *["lr"] * rated, "sound", "clipped", "norm", "rise", *(f"less `{c}`" for c in against)]
    for kind in data[1:]:
        head += [kind, "less its own sound", "clipped", *(f"less `{c}`, {kind}" for c in broken_against)]
    return markdown(head, rows)


LEGEND = f"""\
- Losses are of evaluation, on examples held out, at the end of the run: a mean over the seeds, or a dash where a run \
ends no better than it began.
- less ...: the difference of the losses, seed by seed: mean and 95 % interval (Student's t). Below 0 is better.
- The learning rate is the one that is best for `{NOTHING}` on sound data, on the seeds {RATE_SEEDS}, which are not \
judged; or the task's own, or what --lr says. With --own_rates it is the best for each clip, found in the same way.
- Of broken data so many batches as are {BROKEN:.0%} of the run are broken, after its first {UNBROKEN:.0%}. loud: \
their loss is {FAULTS["loud"]:g} times too large. tensor: the gradient of one tensor is {FAULTS["tensor"]:g} times too \
large. noise: random inputs with random labels. one: the gradient of the first parameter is {FAULTS["one"]:g} times \
too large. labels: each example has the label of another. level: from the middle of the run on all losses are \
{FAULTS["level"]:g} times too large.
- clipped: share of the steps; gradient / update. AdamW has beta1 {BETA1:g}.
- norm: the median of the norms of the gradient before clipping. rise: that over the last tenth of the steps by that \
over the tenth after the middle."""

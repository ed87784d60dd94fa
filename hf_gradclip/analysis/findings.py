"""What a record means, in sentences with its numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_gradclip.analysis.heat import broken_tensors
from hf_gradclip.analysis.names import is_factor, plain
from hf_gradclip.analysis.replay import spec_recorded
from hf_gradclip.analysis.run import Run, by_config, by_parameter, clipped_steps, threshold_of_norm, total_scale
from hf_gradclip.config import ClipConfig
from hf_gradclip.record.files import Record
from hf_gradclip.record.spikes import KEPT
from hf_gradclip.strategy import SpecError, parts_of, warmup_of

OFTEN, SELDOM = 0.5, 0.1
MOST_NAMES = 5


@dataclass(frozen=True)
class Tensor:
    """A parameter over the run, from when it was trained.

    Args:
        name: of the parameter.
        median_norm: over the finite steps, before clipping.
        largest_norm: the same.
        largest_step: the step of it.
        share: median share of the squared norm of the whole.
        clipped: share of the finite steps in which it was scaled.
        smallest_scale: norm after / before.
        zeros: finite steps in which its norm was exactly 0.
    """

    name: str
    median_norm: float
    largest_norm: float
    largest_step: int
    share: float
    clipped: float
    smallest_scale: float
    zeros: int


def tensors_of(record: Record) -> list[Tensor]:
    """Every parameter, the one with the largest norm first."""
    finite = record.finite_T
    if not finite.any():
        return []
    norm_TP, scale_TP = record.norm_TP[finite].astype(np.float64), record.scale_TP[finite]
    step_T = record.step_T[finite]
    totals_T = np.maximum(np.nansum(norm_TP**2, axis=1), np.finfo(np.float64).tiny)
    found = []
    for p, name in enumerate(record.names):
        there = ~np.isnan(norm_TP[:, p])  # not before a parameter was trained
        if not there.any():
            continue
        norms, scales = norm_TP[there, p], scale_TP[there, p]
        tensor = Tensor(
            name=name,
            median_norm=float(np.median(norms)),
            largest_norm=float(norms.max()),
            largest_step=int(step_T[there][norms.argmax()]),
            share=float(np.median(norms**2 / totals_T[there])),
            clipped=float((scales < 1).mean()),
            smallest_scale=float(scales.min()),
            zeros=int((norms == 0).sum()),
        )
        found.append(tensor)
    return sorted(found, key=lambda tensor: -tensor.largest_norm)


def findings(run: Run) -> list[str]:
    """What a person should know of a run, the most important first."""
    record = run.gradient
    said = [
        *_rates(record, "gradient"),
        _raised(record, "gradient"),
        _level(record),
        *_spikes(run),
        *_unread(run),
        *_lost(record),
        *_zeros(record),
        *_dominant(record),
    ]
    if run.update is not None:
        said += [*_rates(run.update, "update"), _raised(run.update, "update")]
    return [sentence for sentence in said if sentence]


def _rates(record: Record, what: str) -> list[str]:
    """One sentence, or one for each configuration that the run went on under."""
    if not record.earlier:
        return [_rate(record, what)]
    return [
        f"Steps {part.step_T[0]:,} to {part.step_T[-1]:,}, under {part.meta['config']}: {_rate(part, what)}"
        for part in by_config(record)
    ]


def _rate(record: Record, what: str) -> str:
    finite = record.finite_T & ~record.skipped_T
    if not finite.any():
        return f"No {what} of the {len(record)} recorded steps was finite and applied."
    clipped, scale = clipped_steps(record)[finite], total_scale(record)[finite]
    count = f"The {what} was clipped in {clipped.sum():,} of {finite.sum():,} steps ({clipped.mean():.0%})"
    if not clipped.any():
        threshold_T = threshold_of_norm(record)
        known = threshold_T[np.isfinite(threshold_T)]
        margin = f" The largest norm was {record.norm_T[finite].max():.3g}"
        return f"{count}.{margin}{f', the threshold at least {known.min():.3g}.' if len(known) else '.'}"
    if record.bounded_T[finite].any():
        return f"{count}, single elements of it too, so the norm after clipping is not known."
    mean = f"the clipped ones to {scale[clipped].mean():.2f} of their norm on average"
    warmup = _warmup(record)
    late = record.step_T[finite] > warmup
    if clipped[~late].any() and late.any():
        early = f"{clipped[~late].sum():,} of them in the warm-up of {warmup} steps"
        mean += f"; {early}, later {clipped[late].mean():.0%}"
    rate = clipped[late].mean() if late.any() else clipped.mean()
    if by_parameter(record):
        share = (record.scale_TP[finite] < 1).mean()
        threshold_T = threshold_of_norm(record)
        above = (record.norm_T > threshold_T)[finite].sum()
        known = np.isfinite(threshold_T[finite]).any()
        whole = f" The norm of the whole was above its threshold in {above:,} steps." if known else ""
        usual = (
            " Many clipped steps are usual with agc: it limits single rows, some in most steps."
            if _limits_rows(record, rate)
            else ""
        )
        return f"{count}, {mean}; of all tensors in all steps {share:.0%} were scaled.{whole}{usual}"
    if rate >= OFTEN:
        return f"{count}, {mean}: the threshold acts as a learning-rate cut, to {scale.mean():.2f} of it over the run."
    if rate >= SELDOM:
        return f"{count}, {mean}: more than a safety net, less than a learning-rate cut."
    return f"{count}, {mean}: a safety net."


def _limits_rows(record: Record, rate: float) -> bool:
    """Whether it was clipped often by rows, as `agc` does on a sound run."""
    try:
        parts = parts_of(ClipConfig.parse(spec_recorded(record)).gradient)
    except SpecError:
        return False
    return rate >= OFTEN and any(part.needs.units is not None for part in parts)


def _raised(record: Record, what: str) -> str:
    """The steps in which something was made larger, which a clip never does and a normalization does."""
    applied = record.finite_T & ~record.skipped_T
    raised = record.scale_max_T[applied & (record.scale_max_T > 1)]
    if not len(raised):
        return ""
    steps = f"{len(raised):,} steps ({len(raised) / applied.sum():.0%})"
    return f"Parts of the {what} were made larger in {steps}, {raised.max():.3g}-fold at most."


def _warmup(record: Record) -> int:
    """Of the recorded strategy, in steps; 0 where it has none, or an older record is of another package's."""
    warmup = record.meta.get("warmup")
    if type(warmup) is int and warmup >= 0:
        return warmup
    try:
        return warmup_of(ClipConfig.parse(spec_recorded(record)).gradient)
    except SpecError:
        return 0


def _level(record: Record) -> str:
    norms = record.norm_T[record.finite_T]
    if len(norms) < 20:
        return ""
    tenth = max(1, len(norms) // 10)
    first, last = np.median(norms[:tenth]), np.median(norms[-tenth:])
    if first <= 0 or last <= 0:
        return ""
    moved = last / first
    word = f"rose {moved:.1f}-fold" if moved > 1.5 else f"fell to {moved:.0%}" if moved < 0.67 else "stayed level"
    fixed = " A fixed threshold means something else at the end than at the start." if not 0.5 < moved < 2 else ""
    return f"The norm {word}: {first:.3g} in the first tenth of the run, {last:.3g} in the last (medians).{fixed}"


def _spikes(run: Run) -> list[str]:
    if not run.spikes:
        return ["No step stands out by its norm."]
    record, scale = run.gradient, total_scale(run.gradient)
    rows = {int(step): row for row, step in enumerate(record.step_T)}
    known = [rows[spike["step"]] for spike in run.spikes if spike["step"] in rows]
    finite = [row for row in known if record.finite_T[row] and not record.skipped_T[row]]
    caught = [row for row in finite if scale[row] < 1 or record.bounded_T[row]]
    steps = ", ".join(str(spike["step"]) for spike in run.spikes[:MOST_NAMES])
    more = f" and {len(run.spikes) - MOST_NAMES} more" if len(run.spikes) > MOST_NAMES else ""
    one = len(run.spikes) == 1
    said = f"{len(run.spikes)} step{'' if one else 's'} stand{'s' if one else ''} out by the norm ({steps}{more})"
    if len(run.spikes) == KEPT:  # of earlier ones the files may be gone
        said = f"The latest {KEPT} steps that stand out by the norm are known ({steps}{more})"
    if not finite:
        return [f"{said}."]
    if not caught:
        return [f"{said}; {'it was not' if one else 'none was'} clipped."]
    count = "it was" if one else "all were" if len(caught) == len(run.spikes) else f"{len(caught)} were"
    if any(record.bounded_T[row] for row in caught):
        return [f"{said}; {count} clipped, single elements too, so the norm after it is not known."]
    hardest = min(float(scale[row]) for row in caught)
    how = f"to {hardest:.2g} of its norm" if len(caught) == 1 else f"the hardest to {hardest:.2g} of its norm"
    return [f"{said}; {count} clipped, {how}."]


def _unread(run: Run) -> list[str]:
    """What of the spikes' files could not be read."""
    more = f" and {len(run.unread) - MOST_NAMES} more" if len(run.unread) > MOST_NAMES else ""
    return [f"Left out, since it cannot be read: {', '.join(run.unread[:MOST_NAMES])}{more}."] if run.unread else []


def _lost(record: Record) -> list[str]:
    large_T, skipped = ~record.finite_T & np.isfinite(record.norm_T), int(record.skipped_T.sum())
    said = []
    for rows_T, what in (
        (large_T, "a number whose square float32 cannot hold"),
        (~record.finite_T & ~large_T, "NaN or inf"),
    ):
        if count := int(rows_T.sum()):
            first = int(record.step_T[rows_T][0])
            said.append(f"The norm was {what} in {count:,} step{'s'[: count != 1]}, first in step {first}.")
    said += _where(record)  # of a NaN or inf
    if skipped == 1:
        said.append("1 step was left out: no weight moved in it.")
    elif skipped:
        said.append(f"{skipped:,} steps were left out: no weight moved in them.")
    return said


def _where(record: Record) -> list[str]:
    """The first step that was broken in some tensors only, and which; in a step where all are nothing is learnt."""
    broken_TP = broken_tensors(record)
    rows = np.flatnonzero(broken_TP.any(axis=1) & ~broken_TP.all(axis=1))
    if not len(rows):
        return []
    names = [plain(record.names[p]) for p in np.flatnonzero(broken_TP[rows[0]])]
    shown = ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")
    count = f"{len(names)} of {len(record.names)} tensors"
    return [f"In step {record.step_T[rows[0]]} it was in {count}: {shown}."]


def _zeros(record: Record) -> list[str]:
    """Tensors whose norm was exactly 0, but for those of an adapter while the other factor is still 0."""
    steps = int(record.finite_T.sum())
    born = _first_update(record)
    late_P = ((record.norm_TP == 0) & record.finite_T[:, None])[born:].any(axis=0)
    learning = {name for name, late in zip(record.names, late_P, strict=True) if is_factor(name) and not late}
    found = sorted((t for t in tensors_of(record) if t.zeros and t.name not in learning), key=lambda t: -t.zeros)
    said = [f"Norm exactly 0 for {plain(t.name)} in {t.zeros:,} of {steps:,} steps." for t in found[:MOST_NAMES]]
    if len(found) > MOST_NAMES:
        said.append(f"The same for {len(found) - MOST_NAMES} more tensors in some steps.")
    return said


def _first_update(record: Record) -> int:
    """How many rows there are up to the first one that moved a weight; the learning rate may begin at 0."""
    moved = record.finite_T & ~record.skipped_T & (record.learning_rate_T != 0)
    return int(moved.argmax()) + 1 if moved.any() else len(record)


def _dominant(record: Record) -> list[str]:
    found = max(tensors_of(record), key=lambda t: t.share, default=None)
    if found is None or len(record.names) < 2 or found.share < 0.5:
        return []
    return [
        f"{plain(found.name)} makes {found.share:.0%} of the squared norm in the median step, so a limit on the "
        "whole is mostly a limit on it."
    ]

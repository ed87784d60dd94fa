"""The tables of reports and replays, as cells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from hf_gradclip.analysis.findings import tensors_of
from hf_gradclip.analysis.names import plain
from hf_gradclip.analysis.replay import Outcome
from hf_gradclip.analysis.run import Run, clipped_steps, total_scale
from hf_gradclip.record.files import Record
from hf_gradclip.record.spikes import KEPT

COLUMNS = ("strategy", "clipped", "mean scale", "spikes", "false alarms", "threshold")
SUMMARY_COLUMNS = (
    "run",
    "steps",
    "clipped",
    "mean scale",
    "median norm",
    "largest norm",
    "spikes",
    "NaN or inf",
    "last loss",
)
TENSOR_COLUMNS = ("tensor", "median norm", "largest", "in step", "share", "clipped", "least scale", "zero")
SPIKE_COLUMNS = ("step", "norm", "z", "loss", "largest tensors", "examples")
MOST_TENSORS = 15
MOST_EXAMPLES = 12
MOST_TEXTS, MOST_LETTERS = 30, 1000
LAST = 20


def outcome_rows(outcomes: Iterable[Outcome]) -> list[tuple[str, ...]]:
    """Outcomes as cells, in the order of COLUMNS."""
    return [
        (
            outcome.spec,
            f"{outcome.rate:.1%}",
            f"{outcome.mean_scale:.3f}",
            f"{outcome.caught} of {outcome.spikes}",
            f"{outcome.false_alarms}",
            _thresholds(outcome),
        )
        for outcome in outcomes
    ]


def _thresholds(outcome: Outcome) -> str:
    """One number, or the smallest to the largest with the median."""
    if outcome.thresholds is None:
        return "by parameter" if outcome.by_parameter else "-"
    low, middle, high = (f"{value:.3g}" for value in outcome.thresholds)
    return low if low == high else f"{low} to {high}, median {middle}"


def summary_rows(runs: Iterable[Run]) -> list[tuple[str, ...]]:
    """Runs as cells, in the order of SUMMARY_COLUMNS."""
    rows: list[tuple[str, ...]] = []
    for run in runs:
        record = run.gradient
        norms, losses = record.norm_T[record.finite_T], record.loss_T[np.isfinite(record.loss_T)]
        known = len(norms) and not record.bounded_T.any()  # the norm after a bound on elements is not
        rows.append(
            (
                run.name,
                f"{len(record):,}",
                f"{clipped_steps(record).sum() / max(record.finite_T.sum(), 1):.1%}",
                f"{total_scale(record)[record.finite_T].mean():.3f}" if known else "-",
                f"{np.median(norms):.4g}" if len(norms) else "-",
                f"{norms.max():.4g}" if len(norms) else "-",
                f"{len(run.spikes)}" + " or more" * (len(run.spikes) == KEPT),
                f"{(~record.finite_T).sum()}",
                f"{losses[-LAST:].mean():.4g}" if len(losses) else "-",
            )
        )
    return rows


def tensor_rows(record: Record) -> list[tuple[str, ...]]:
    """The tensors with the largest norms as cells, in the order of TENSOR_COLUMNS."""
    return [
        (
            plain(tensor.name),
            f"{tensor.median_norm:.3g}",
            f"{tensor.largest_norm:.3g}",
            f"{tensor.largest_step:,}",
            f"{tensor.share:.1%}",
            f"{tensor.clipped:.1%}",
            f"{tensor.smallest_scale:.3g}",
            f"{tensor.zeros:,}",
        )
        for tensor in tensors_of(record)[:MOST_TENSORS]
    ]


def spike_rows(run: Run) -> list[tuple[str, ...]]:
    """The spikes as cells, in the order of SPIKE_COLUMNS."""
    return [
        (
            f"{spike['step']:,}",
            _number(spike["norm"]),
            _number(spike["z"]),
            _number(spike["loss"]),
            ", ".join(
                f"{plain(tensor['name'])} {tensor['share']:.0%}" for tensor in spike["tensors"][:3] if tensor["share"]
            ),
            _examples(spike),
        )
        for spike in run.spikes
    ]


def spike_texts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of the spikes whose examples were recorded with their text: a title, and each example with its words."""
    found = []
    for spike in run.spikes:
        ranks = {"0": spike, **spike.get("texts", {})}
        examples = [
            (f"rank {rank}, {example}" if len(ranks) > 1 else str(example), _cut(words))
            for rank, held in ranks.items()
            if isinstance(held["examples"], list)
            for example, words in zip(held["examples"], held.get("text", []), strict=False)
        ]
        if examples:
            one = len(examples) == 1
            found.append((f"Step {spike['step']:,}: {len(examples)} example{'s'[: not one]}", examples))
    return found[:MOST_TEXTS]


def _cut(words: str) -> str:
    return words if len(words) <= MOST_LETTERS else f"{words[:MOST_LETTERS]} ... ({len(words):,} letters)"


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(value):.3g}"


def _examples(spike: dict[str, Any]) -> str:
    held = {"0": spike["examples"], **spike["other_ranks"]} if spike["other_ranks"] else {"": spike["examples"]}
    said = []
    for rank, examples in held.items():
        if isinstance(examples, list):
            more = f" and {len(examples) - MOST_EXAMPLES} more" if len(examples) > MOST_EXAMPLES else ""
            words = ", ".join(map(str, examples[:MOST_EXAMPLES])) + more
        else:
            words = str(examples)
        said.append(f"rank {rank}: {words}" if rank else words)
    return "; ".join(said)

"""A report as one HTML page that needs nothing else: no network, and no script but the one that is in it."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from importlib import resources

from hf_gradclip.analysis.curves import COLORS
from hf_gradclip.analysis.figures import Picture
from hf_gradclip.analysis.findings import findings
from hf_gradclip.analysis.groups import COLUMNS as GROUP_COLUMNS
from hf_gradclip.analysis.groups import group_rows, recorded_groups
from hf_gradclip.analysis.ready import READY, Ready
from hf_gradclip.analysis.replay import LIMIT_OF_REPLAY
from hf_gradclip.analysis.run import Run, configs_of
from hf_gradclip.analysis.tables import (
    COLUMNS as OUTCOME_COLUMNS,
)
from hf_gradclip.analysis.tables import (
    SPIKE_COLUMNS,
    SUMMARY_COLUMNS,
    TENSOR_COLUMNS,
    outcome_rows,
    spike_rows,
    spike_texts,
    summary_rows,
    tensor_rows,
)
from hf_gradclip.analysis.values import data_of
from hf_gradclip.outlier import WINDOW


def page_of(runs: Sequence[Run], pictures: Sequence[Picture], ready: Sequence[Ready | None]) -> str:
    """The whole page."""
    title = "Clipping in " + " and ".join(run.name for run in runs)
    many = len(runs) > 1
    parts = [f"<h1>{_text(title)}</h1>"]
    for run in runs:
        parts += [f"<h2>{_text(run.name)}</h2>" if many else "", *_facts(run)]
        parts.append('<ul class="findings">' + "".join(f"<li>{_text(said)}</li>" for said in findings(run)) + "</ul>")
    if many:
        parts += ["<h2>Side by side</h2>", _table(SUMMARY_COLUMNS, summary_rows(runs))]
    shared = [picture for picture in pictures if picture.kind in ("loss", "norm", "rate", "learning_rate")]
    for picture in shared:
        parts.append(_figure(picture))
        if picture.kind == "norm":
            parts += [_other_thresholds(i, runs, ready[i]) for i in range(len(runs))]
    parts += [_figure(picture) for picture in pictures if picture not in shared]
    for run in runs:
        parts += _tables(run, f", {run.name}" if many else "")
    foot = (
        f"A spike is a norm that stands out among the {WINDOW} before it by the rule of adaptive_norm: far above their "
        "spread, and above three times their median. Under the pointer are the numbers of the nearest step."
    )
    body = "\n".join(part for part in parts if part)
    return _document(
        title, f"{body}\n<footer>{_text(foot)} Written by hf-gradclip report.</footer>", data_of(runs, ready)
    )


def _document(title: str, body: str, data: str) -> str:
    style, script = _resource("page.css"), _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<style>{style}</style></head>\n<body>\n{body}\n'
        f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n</body></html>\n'
    )


def _resource(name: str) -> str:
    return (resources.files("hf_gradclip.analysis") / name).read_text("utf-8")


def _facts(run: Run) -> list[str]:
    meta, steps = run.gradient.meta, run.gradient.step_T
    facts = [
        configs_of(run.gradient),
        f"{meta['backend']}, {meta['world']} process{'es' if meta['world'] != 1 else ''}",
        f"steps {steps[0]:,} to {steps[-1]:,}, {len(run.gradient.names)} tensors",
    ]
    return [f'<p class="facts">{_text(fact)}</p>' for fact in facts]


def _other_thresholds(place: int, runs: Sequence[Run], ready: Ready | None) -> str:
    """The replays of a run as a table, whose last row is what the slider chooses."""
    if ready is None:
        return ""
    run = runs[place]
    color, of_run = (f"var(--curve{place % len(COLORS)})", f", {run.name}") if len(runs) > 1 else ("var(--curve2)", "")
    rows, chosen = outcome_rows(ready.outcomes), outcome_rows(ready.fixed[ready.start : ready.start + 1])
    late = (
        f" In a run this long these take minutes: hf-gradclip replay {run.folder} --clip NAME, of {', '.join(READY)}."
    )
    late = "" if ready.replays else late
    return (
        f'<section style="--limit: {color}"><h2>What another strategy would have done{_text(of_run)}</h2>\n'
        f'<p class="note">{_text(LIMIT_OF_REPLAY)}{_text(late)}</p>\n'
        f'<label class="slider">A fixed threshold, drawn into the norm above as a dashed line'
        f'<input type="range" min="0" max="{len(ready.fixed) - 1}" value="{ready.start}" data-run="{place}" '
        f'data-color="{color}"></label>\n'
        f"{_table(OUTCOME_COLUMNS, [*rows, *chosen], chosen=len(rows))}</section>"
    )


def _tables(run: Run, of_run: str) -> list[str]:
    parts = []
    if groups := recorded_groups(run.gradient):
        parts += [f"<h2>Groups of parameters{_text(of_run)}</h2>"]
        parts += [_table(GROUP_COLUMNS, group_rows(groups), text=(1,))]
    parts += [f"<h2>Tensors with the largest norms{_text(of_run)}</h2>"]
    parts += [_table(TENSOR_COLUMNS, tensor_rows(run.gradient))]
    if run.spikes:
        parts += [f"<h2>Spikes{_text(of_run)}</h2>", _table(SPIKE_COLUMNS, spike_rows(run), text=(4, 5))]
        parts += [_spike_text(title, examples) for title, examples in spike_texts(run)]
    return parts


def _spike_text(title: str, examples: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<li><b>{_text(example)}</b> {_text(words)}</li>" for example, words in examples)
    return f"<details><summary>{_text(title)}</summary><ol>{items}</ol></details>"


def _figure(picture: Picture) -> str:
    return (
        f'<h2>{_text(picture.title)}</h2>\n<figure id="{_text(picture.name)}" data-kind="{picture.kind}" '
        f'data-runs="{" ".join(map(str, picture.runs))}"><div class="wide">{picture.wide.svg}</div>'
        f'<div class="narrow">{picture.narrow.svg}</div><div class="values"></div></figure>'
    )


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], text: tuple[int, ...] = (), chosen: int | None = None
) -> str:
    """A table; columns at the places of `text` are words, and the row at the place `chosen` is a slider's."""
    kinds = [' class="text"' if i in text else "" for i in range(len(columns))]
    head = "".join(f"<th{kind}>{_text(name)}</th>" for kind, name in zip(kinds, columns, strict=True))
    lines, marks = [], ("", ' class="chosen"')
    for i, row in enumerate(rows):
        cells = [f"<td{kind}>{_broken(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)]
        lines.append(f"<tr{marks[i == chosen]}>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _broken(words: str) -> str:
    """Words that may be long names, which may go on in another line after a dot."""
    shown = _text(words)
    return re.sub(r"([.:=,])(?=\w)", r"\1<wbr>", shown) if max(map(len, words.split(" "))) > 20 else shown


def _text(words: object) -> str:
    return html.escape(str(words))

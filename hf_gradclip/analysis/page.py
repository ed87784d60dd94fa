"""A report as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

from hf_gradclip.analysis.figures import Picture
from hf_gradclip.analysis.findings import findings
from hf_gradclip.analysis.groups import COLUMNS, group_rows, recorded_groups
from hf_gradclip.analysis.run import Run, configs_of
from hf_gradclip.analysis.tables import (
    SPIKE_COLUMNS,
    SUMMARY_COLUMNS,
    TENSOR_COLUMNS,
    spike_rows,
    summary_rows,
    tensor_rows,
)
from hf_gradclip.outlier import WINDOW

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light; --ink: #1c1c1c; --soft: #5c5c5c; --line: #dedede; --paper: #ffffff; --mark: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 960px; padding: 24px 20px 64px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 8px; }
p.facts { color: var(--soft); margin: 0 0 4px; font-size: 14px; overflow-wrap: anywhere; }
ul.findings { margin: 12px 0 0; padding: 0; list-style: none; }
ul.findings li { padding: 6px 0 6px 14px; border-left: 3px solid var(--mark); margin: 0 0 6px; }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { text-align: right; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; min-width: 220px; }
footer { margin-top: 48px; color: var(--soft); font-size: 13px; }
@media (max-width: 640px) { body { padding: 16px 14px 48px; } h1 { font-size: 21px; } }
"""


def page_of(runs: Sequence[Run], pictures: Sequence[Picture]) -> str:
    """The whole page."""
    title = "Clipping in " + " and ".join(run.name for run in runs)
    parts = [f"<h1>{_text(title)}</h1>"]
    for run in runs:
        meta, steps = run.gradient.meta, run.gradient.step_T
        many = f"<h2>{_text(run.name)}</h2>" if len(runs) > 1 else ""
        facts = [
            configs_of(run.gradient),
            f"{meta['backend']}, {meta['world']} process{'es' if meta['world'] != 1 else ''}",
        ]
        facts.append(f"steps {steps[0]:,} to {steps[-1]:,}, {len(run.gradient.names)} tensors")
        parts += [many, *(f'<p class="facts">{_text(fact)}</p>' for fact in facts)]
        parts.append('<ul class="findings">' + "".join(f"<li>{_text(said)}</li>" for said in findings(run)) + "</ul>")
    if len(runs) > 1:
        parts += ["<h2>Side by side</h2>", _table(SUMMARY_COLUMNS, summary_rows(runs))]
    parts += [_figure(picture) for picture in pictures]
    for run in runs:
        of_run = f", {_text(run.name)}" if len(runs) > 1 else ""
        if groups := recorded_groups(run.gradient):
            parts += [f"<h2>Groups of parameters{of_run}</h2>", _table(COLUMNS, group_rows(groups), text=(1,))]
        parts += [f"<h2>Tensors with the largest norms{of_run}</h2>", _table(TENSOR_COLUMNS, tensor_rows(run.gradient))]
        if run.spikes:
            parts += [f"<h2>Spikes{of_run}</h2>", _table(SPIKE_COLUMNS, spike_rows(run), text=(4, 5))]
    foot = (
        f"A spike is a norm that stands out among the {WINDOW} before it by the rule of adaptive_norm: far above their "
        "spread, and above three times their median."
    )
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style></head>\n<body>\n{body}\n'
        f"<footer>{_text(foot)} Written by hf-gradclip report.</footer>\n</body></html>\n"
    )


def _figure(picture: Picture) -> str:
    return (
        f'<h2>{_text(picture.title)}</h2>\n<picture id="{_text(picture.name)}">'
        f'<source media="(max-width: 640px)" srcset="{_data(picture.narrow)}">'
        f'<img src="{_data(picture.wide)}" alt="{_text(picture.text)}"></picture>'
    )


def _data(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], text: tuple[int, ...] = ()) -> str:
    kinds = [' class="text"' if i in text else "" for i in range(len(columns))]
    head = "".join(f"<th{kind}>{_text(name)}</th>" for kind, name in zip(kinds, columns, strict=True))
    lines = [
        "<tr>" + "".join(f"<td{kind}>{_text(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _text(words: object) -> str:
    return html.escape(str(words))

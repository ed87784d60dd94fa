"""`hf-gradclip report`: a page and pictures, or tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_gradclip.analysis.figures import pictures_of
from hf_gradclip.analysis.findings import findings
from hf_gradclip.analysis.groups import COLUMNS, group_rows, recorded_groups
from hf_gradclip.analysis.page import page_of
from hf_gradclip.analysis.ready import ready_of
from hf_gradclip.analysis.run import Run, configs_of, load_run
from hf_gradclip.analysis.tables import (
    SPIKE_COLUMNS,
    SUMMARY_COLUMNS,
    TENSOR_COLUMNS,
    spike_rows,
    spike_texts,
    summary_rows,
    tensor_rows,
)
from hf_gradclip.analysis.terminal import say, show_table

MOST_SAID, MOST_LETTERS = 3, 200


def write_report(paths: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write `report.html`, which holds its pictures, and each picture as a PNG.

    Args:
        paths: of recorded runs.
        out: a folder, or a file that ends in .html, which is then all that is written. None means `gradclip` of the
            first run, and in it a folder `with_...` where there are several, so that the run's own page stays.

    Returns:
        The files, the page first.

    Raises:
        FileNotFoundError: if a run was not recorded.
        ImportError: without matplotlib.
    """
    runs = _load(paths)
    ready = [ready_of(run.gradient) for run in runs]
    pictures = pictures_of(runs, ready)
    page = _page_path(runs, out)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(page_of(runs, pictures, ready), "utf-8")
    if out is not None and page == out:
        return [page]
    files = [page]
    for picture in pictures:
        files.append(page.parent / f"{picture.name}.png")
        files[-1].write_bytes(picture.png)
    return files


def _page_path(runs: Sequence[Run], out: Path | None) -> Path:
    if out is not None and out.suffix.lower() in (".html", ".htm") and not out.is_dir():
        return out
    if out is None:
        others = "_".join(run.name for run in runs[1:])
        out = runs[0].folder / f"with_{others}"[:100] if others else runs[0].folder
    return out / "report.html"


def print_report(paths: Sequence[Path]) -> None:
    """The sentences and tables of a report, for the terminal.

    Raises:
        FileNotFoundError: if a run was not recorded.
    """
    runs = _load(paths)
    show_table(SUMMARY_COLUMNS, summary_rows(runs))
    for run in runs:
        say("", f"{run.name}: {configs_of(run.gradient)}", *(f"- {sentence}" for sentence in findings(run)))
        if groups := recorded_groups(run.gradient):
            show_table(COLUMNS, group_rows(groups), "Groups of parameters")
        show_table(TENSOR_COLUMNS, tensor_rows(run.gradient), "Tensors with the largest norms")
        if run.spikes:
            show_table(SPIKE_COLUMNS, spike_rows(run), "Spikes", text=(4, 5))
        for title, examples in spike_texts(run):
            say("", title, *(f"- {example}: {_cut(words)}" for example, words in examples[:MOST_SAID]))


def _cut(words: str) -> str:
    words = " ".join(words.split())
    return words if len(words) <= MOST_LETTERS else f"{words[:MOST_LETTERS]} ..."


def _load(paths: Sequence[Path]) -> list[Run]:
    """The runs, with names that tell them apart."""
    runs = [load_run(path) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [replace(run, name=f"{run.name} ({i + 1})") for i, run in enumerate(runs)]

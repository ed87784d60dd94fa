"""`hf-gradclip report`: a page and pictures, or tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_gradclip.analysis.figures import pictures_of
from hf_gradclip.analysis.findings import findings
from hf_gradclip.analysis.groups import COLUMNS, group_rows, recorded_groups
from hf_gradclip.analysis.page import page_of
from hf_gradclip.analysis.run import Run, configs_of, load_run
from hf_gradclip.analysis.tables import (
    SPIKE_COLUMNS,
    SUMMARY_COLUMNS,
    TENSOR_COLUMNS,
    say,
    show_table,
    spike_rows,
    summary_rows,
    tensor_rows,
)


def write_report(paths: Sequence[Path], out: Path | None = None) -> list[Path]:
    """Write `report.html`, which holds its pictures, and each picture as a PNG.

    Args:
        paths: of recorded runs.
        out: a folder; None means `gradclip` of the first run.

    Returns:
        The files, the page first.

    Raises:
        FileNotFoundError: if a run was not recorded.
        ImportError: without matplotlib.
    """
    runs = _load(paths)
    folder = runs[0].folder if out is None else out
    pictures = pictures_of(runs)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    page.write_text(page_of(runs, pictures), "utf-8")
    files = [page]
    for picture in pictures:
        files.append(folder / f"{picture.name}.png")
        files[-1].write_bytes(picture.wide)
    return files


def print_report(paths: Sequence[Path]) -> None:
    """The sentences and tables of a report, for the terminal.

    Raises:
        FileNotFoundError: if a run was not recorded.
        ImportError: without rich.
    """
    runs = _load(paths)
    show_table(SUMMARY_COLUMNS, summary_rows(runs))
    for run in runs:
        say(f"{run.name}: {configs_of(run.gradient)}", *(f"- {sentence}" for sentence in findings(run)))
        if groups := recorded_groups(run.gradient):
            show_table(COLUMNS, group_rows(groups), "Groups of parameters")
        show_table(TENSOR_COLUMNS, tensor_rows(run.gradient), "Tensors with the largest norms")
        if run.spikes:
            show_table(SPIKE_COLUMNS, spike_rows(run), "Spikes")


def _load(paths: Sequence[Path]) -> list[Run]:
    """The runs, with names that tell them apart."""
    runs = [load_run(path) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [replace(run, name=f"{run.name} ({i + 1})") for i, run in enumerate(runs)]

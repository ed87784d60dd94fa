"""The pictures of a report: each as a PNG, and as SVG for a wide page and for a narrow one."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_gradclip.analysis.curves import draw_learning_rate, draw_loss, draw_norm, draw_rate, draw_update
from hf_gradclip.analysis.heat import MOST_ROWS, MOST_ROWS_NARROW, draw_heat, rows_of
from hf_gradclip.analysis.ready import Ready
from hf_gradclip.analysis.replay_figure import draw_panels
from hf_gradclip.analysis.run import Run
from hf_gradclip.analysis.svg import Drawing, drawing_of, settings

WIDE, NARROW = (9.0, 10), (4.6, 10)
"""Width in inches and size of the type."""

Draw = Callable[[Any, Sequence[Run], bool], None]


@dataclass(frozen=True)
class Picture:
    """A picture of one thing.

    Args:
        name: of the file.
        title: above it.
        text: what it shows, for those who do not see it.
        kind: what its curves are: "loss", "learning_rate", "norm", "rate", "heat", "update" or "strategies".
        runs: the places of its runs in the report.
        png: the file.
        wide: for the page.
        narrow: for a phone.
    """

    name: str
    title: str
    text: str
    kind: str
    runs: tuple[int, ...]
    png: bytes
    wide: Drawing
    narrow: Drawing


def pictures_of(runs: Sequence[Run], ready: Sequence[Ready | None]) -> list[Picture]:
    """Those of the runs together, then those of each.

    Args:
        runs: of the report.
        ready: what other strategies would have done in each; None where nothing was replayed.

    Raises:
        ImportError: without matplotlib.
    """
    names = " and ".join(run.name for run in runs)
    every = tuple(range(len(runs)))

    def of_all(kind: str, title: str, text: str, height: float, draw: Draw) -> Picture:
        return _picture(kind, title, text, kind, every, height, height, lambda *how: draw(how[0], runs, how[1]))

    spikes = "; steps whose norm stands out are marked" if any(run.spikes for run in runs) else ""
    pictures = [of_all("loss", "Loss", f"Loss over steps of {names}{spikes}.", 3.2, draw_loss)]
    text = f"Norm over steps of {names} on a logarithmic scale{', with the threshold' * (len(runs) == 1)}."
    pictures.append(of_all("norm", "Norm before clipping", text, 3.2, draw_norm))
    text = f"Share of clipped steps of {names}, over a window of steps."
    pictures.append(of_all("rate", "Share of steps clipped", text, 2.2, draw_rate))
    if any(np.isfinite(run.gradient.learning_rate_T).any() for run in runs):
        text = f"Learning rate of the first parameter group over steps of {names}."
        pictures.append(of_all("learning_rate", "Learning rate", text, 2.2, draw_learning_rate))
    for i, (run, more) in enumerate(zip(runs, ready, strict=True)):
        pictures += _of_one(i, run, more, many=len(runs) > 1)
    return pictures


def _of_one(place: int, run: Run, ready: Ready | None, many: bool) -> list[Picture]:
    suffix, of_run = (f"_{run.name}", f", {run.name}") if many else ("", "")
    record = run.gradient
    text = f"Norm by tensor and step of {run.name}, by colour."
    high, low = (1.2 + 0.19 * len(rows_of(record.names, most)) for most in (MOST_ROWS, MOST_ROWS_NARROW))
    draws: list[tuple[str, str, str, float, float, Callable[[Any, bool], None]]] = [
        ("heat", "Norm by tensor", text, high, low, lambda figure, narrow: draw_heat(figure, record, narrow))
    ]
    if run.update is not None:
        text = f"Norm of the update over steps of {run.name}, with the threshold."
        draws.append(
            ("update", "Norm of the update", text, 3.2, 3.2, lambda figure, narrow: draw_update(figure, [run], narrow))
        )
    if ready is not None and ready.replays:
        text = f"Where other strategies would have clipped {run.name}, and what they would have left of the norm."
        draws.append(
            (
                "strategies",
                "Other strategies",
                text,
                5.0,
                5.0,
                lambda figure, narrow: draw_panels(figure, record, ready.replays, ready.specs, narrow),
            )
        )
    return [
        _picture(f"{kind}{suffix}", f"{title}{of_run}", text, kind, (place,), high, low, draw)
        for kind, title, text, high, low, draw in draws
    ]


def _picture(
    name: str,
    title: str,
    text: str,
    kind: str,
    runs: tuple[int, ...],
    height: float,
    height_narrow: float,
    draw: Callable[[Any, bool], None],
) -> Picture:
    with settings(WIDE[1]) as figure_of:
        figure = figure_of(WIDE[0], height)
        draw(figure, False)
        wide = drawing_of(figure, text, f"{name}-w")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        figure = figure_of(NARROW[0], height_narrow)
        draw(figure, True)
        narrow = drawing_of(figure, text, f"{name}-n")
    return Picture(name, title, text, kind, runs, buffer.getvalue(), wide, narrow)

"""What clipping did in a run of this process: in sentences, and where a notebook shows it with a picture."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_gradclip.analysis.curves import COLORS, DARK, draw_loss, draw_norm, logarithmic, place, plainly, thin
from hf_gradclip.analysis.findings import findings
from hf_gradclip.analysis.run import Run, load_run
from hf_gradclip.analysis.svg import settings
from hf_gradclip.clipper import Clipper


@dataclass(frozen=True)
class RunReport:
    """A run so far.

    Args:
        config: what it was clipped by.
        sentences: what is known of it.
        summary: its numbers, see `ClipReport.summary`; those of the updates begin with `update_`.
        norms: before clipping, those that were finite; of a long run every second, fourth, ... of them.
        run: its record; None where it was not recorded.
    """

    config: str
    sentences: tuple[str, ...]
    summary: dict[str, float]
    norms: tuple[float, ...]
    run: Run | None

    def __repr__(self) -> str:
        return "\n".join([f"Clipping by {self.config}", *(f"- {sentence}" for sentence in self.sentences)])

    def _repr_html_(self) -> str:
        said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.sentences)
        pictures = "".join(
            f'<img alt="{alt}" style="display:block;max-width:100%" src="data:image/png;base64,{data}">'
            for alt, data in self._pictures()
        )
        return f"<div><b>Clipping by {html.escape(self.config)}</b><ul>{said}</ul>{pictures}</div>"

    def _pictures(self) -> list[tuple[str, str]]:
        """Words and PNG of each; none without matplotlib."""
        run = self.run
        draws: dict[str, Callable[[Any], None]] = {"norm before clipping": self._draw_norms}
        if run is not None:
            draws = {
                "loss over steps": lambda figure: draw_loss(figure, [run], False),
                "norm before clipping": lambda figure: draw_norm(figure, [run], False),
            }
        try:
            return [(alt, _png(draw)) for alt, draw in draws.items()]
        except ImportError:
            return []

    def _draw_norms(self, figure: Any) -> None:
        axes = figure.subplots()
        place(figure)
        plainly(axes)
        norms = np.array(self.norms)
        steps = np.linspace(1, self.summary["steps"] - self.summary["nonfinite"], len(norms))
        axes.plot(*thin(steps, np.where(norms > 0, norms, np.nan)), color=COLORS[0], linewidth=1.0)
        logarithmic(axes)
        axes.set_xlabel("finite step", color=DARK)
        axes.set_ylabel("norm (log)", color=DARK)


def report_of(clippers: Sequence[Clipper], folder: Path | None) -> RunReport:
    """The report of a run.

    Args:
        clippers: of its gradients and, if there is one, of its updates.
        folder: of its record; None where it is not recorded.
    """
    try:
        run = None if folder is None else load_run(folder)
    except FileNotFoundError:
        run = None
    said = [clipper.report.in_words() for clipper in clippers]
    summary = dict(clippers[0].report.summary())
    for clipper in clippers[1:]:
        summary |= {f"update_{key}": value for key, value in clipper.report.summary().items()}
    sentences = said if run is None else [*said, *findings(run)]
    return RunReport(str(clippers[0].config), tuple(sentences), summary, tuple(clippers[0].report.norms()), run)


def _png(draw: Callable[[Any], None]) -> str:
    with settings(10) as figure_of:
        figure = figure_of(9, 2.8)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
    return base64.b64encode(buffer.getvalue()).decode("ascii")

"""A matplotlib figure as SVG that stands in a page: its colours are the page's, and it says where its axes are."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hf_gradclip.analysis.curves import COLORS, DARK, GREY, GRID, INK

_VARIABLES = {color: f"var(--curve{i})" for i, color in enumerate(COLORS)}
_VARIABLES |= {GREY: "var(--soft)", DARK: "var(--ink)", INK: "var(--ink)", GRID: "var(--line)"}
_COLOR = re.compile("|".join(_VARIABLES))
_HEAD = re.compile(r"^.*?<svg [^>]*?viewBox=\"([^\"]+)\"[^>]*>", re.DOTALL)
_LEFT_OUT = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)
_ID = re.compile(r'( id="|xlink:href="#|url\(#)(?!data)')


@dataclass(frozen=True)
class Drawing:
    """One SVG element.

    Args:
        svg: the element. It says in `data-box` where its first axes are (left, top, right, bottom, in units of its
            viewBox), in `data-x` what their ends are, and so in `data-y`, from the bottom, where it is logarithmic.
    """

    svg: str


@contextmanager
def settings(size: int) -> Iterator[Callable[[float, float], Any]]:
    """While these hold, type has this size and SVG keeps it as text; gives what makes a figure of width and height.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a report needs matplotlib: pip install 'hf_gradclip[report]'.") from None
    with rc_context({"font.size": size, "svg.fonttype": "none", "svg.hashsalt": "hf_gradclip"}):
        yield lambda width, height: Figure(figsize=(width, height))


def drawing_of(figure: Any, text: str, prefix: str) -> Drawing:
    """A figure as an element.

    Args:
        figure: of matplotlib.
        text: what it shows, for those who do not see it.
        prefix: of the names in it, which are to be unique in a page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    whole = _LEFT_OUT.sub("", buffer.getvalue())
    head = _HEAD.match(whole)
    assert head is not None, "matplotlib writes an svg element with a viewBox"
    _, _, width, height = map(float, head[1].split())
    axes = figure.axes[0]
    place = axes.get_position()
    box = (place.x0 * width, (1 - place.y1) * height, place.x1 * width, (1 - place.y0) * height)
    shown = {"box": box, "x": axes.get_xlim()}
    if axes.get_yscale() == "log":
        shown["y"] = axes.get_ylim()
    data = "".join(f' data-{key}="{" ".join(f"{number:.6g}" for number in values)}"' for key, values in shown.items())
    body = _COLOR.sub(lambda found: _VARIABLES[found[0]], whole[head.end() :])
    body = _ID.sub(lambda found: f"{found[1]}{prefix}-", body)
    label = html.escape(text)
    return Drawing(f'<svg viewBox="{head[1]}" role="img" aria-label="{label}"{data}>{body.strip()}')

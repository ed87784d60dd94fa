"""`hf-gradclip watch`: a run in the terminal while it goes on, from what its record holds so far."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_gradclip.analysis.names import plain
from hf_gradclip.analysis.run import Run, clipped_steps, configs_of, load_run, total_scale
from hf_gradclip.analysis.terminal import columns_of_terminal, show
from hf_gradclip.record.files import folder_of
from hf_gradclip.record.parts import DamagedPartError
from hf_gradclip.record.spikes import find_spikes, judged
from hf_gradclip.say import printable

BARS = "▁▂▃▄▅▆▇█"
LAST, MOST_SPIKES = 100, 5
DAY = 86_400
"""Of seconds, the longest wait between looks."""
MOST_BLOCKS, INDENT = 60, 15


@dataclass(frozen=True)
class Seen:
    """What was found in a look at a record.

    Args:
        run: as far as it was written.
        written: when, in seconds since the epoch.
    """

    run: Run
    written: float


class Watch:
    """Looks at the record of a run again and again, and reads it where it has grown.

    Args:
        path: the output_dir of a run, which may not have begun to record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, float] = {}
        self._seen: Seen | None = None

    def look(self) -> Seen | None:
        """What the record holds now; None where there is none yet.

        While the run joins parts of its record one may be gone before it is read; what was found before counts then.
        """
        try:
            folder = folder_of(self._path)
            files = {path.name: path.stat().st_mtime for path in folder.glob("*-*.parquet")}
            if files and files != self._files:
                self._seen = Seen(load_run(folder), max(files.values()))
                self._files = files
        except (FileNotFoundError, DamagedPartError):
            pass
        return self._seen


def lines_of(seen: Seen | None, path: Path, now: float, width: int, once: bool = False) -> list[str]:
    """A look in words, no line wider than `width`.

    Args:
        seen: what was found; None for nothing.
        path: where.
        now: in seconds since the epoch.
        width: in characters, at least 40.
        once: whether this is the only look, after which nothing is waited for.
    """
    if seen is None:
        waiting = [] if once else ["Waiting; Ctrl-C ends this."]
        return [line[:width] for line in (f"{printable(str(path))}: holds no record yet.", *waiting)]
    record = seen.run.gradient
    clipped, scales = clipped_steps(record), total_scale(record)
    last = len(record) - 1
    late = max(0.0, now - seen.written)
    said = [
        f"{seen.run.name}: {configs_of(record).replace(',', ', ')}",
        f"step {record.step_T[last]:,}, written {_time(late)} ago; the record is written at a log, at a checkpoint and "
        "at the end, so later steps may be made",
        "",
        *_curve("loss", record.loss_T, width),
        *_curve("norm", np.where(record.finite_T, record.norm_T, np.nan), width, log=True),
        *_curve("learning rate", record.learning_rate_T, width),
        "",
        f"threshold {_number(record.threshold_T[last])}   scale {_number(scales[last])}   "
        f"clipped {clipped.mean():.1%} of all, {clipped[-LAST:].mean():.1%} of the last {min(LAST, len(record))}   "
        f"left out {int(record.skipped_T.sum())}   NaN or inf {int((~record.finite_T).sum())}",
        "",
        *_spikes(seen.run),
    ]
    return [line for words in said for line in _cut(printable(words), width)]


def watch(path: Path, every: float, once: bool, rounds: Iterator[Any] | None = None) -> None:
    """Show a run until Ctrl-C.

    Args:
        path: the output_dir of a run.
        every: seconds between looks.
        once: look once, and print it without drawing over it.
        rounds: of looks; None for ever.

    Raises:
        ImportError: without rich, unless `once`.
        ValueError: for no time between looks.
    """
    if not 0 < every <= DAY:
        raise ValueError(f"--every {every:g}: must be seconds, above 0 and at most a day. 2 is what is left out.")
    looks = Watch(path)

    def lines() -> list[str]:
        return lines_of(looks.look(), path, time.time(), columns_of_terminal(), once)

    if once:
        show(*lines())
        return
    live, text = _rich()

    def frame() -> Any:
        return text("\n".join(lines()), no_wrap=True)

    try:
        with live(frame(), auto_refresh=False) as shown:
            for _ in rounds if rounds is not None else iter(int, 1):
                time.sleep(every)
                shown.update(frame(), refresh=True)
    except KeyboardInterrupt:
        pass


def _curve(name: str, values: np.ndarray, width: int, log: bool = False) -> list[str]:
    """A line of blocks, one for a part of the run, the highest of it; and one with its last value and its range."""
    values = np.where(np.isfinite(values), values, np.nan)
    known = values[~np.isnan(values)]
    if not len(known):
        return []
    parts = np.array_split(values, min(width - INDENT, MOST_BLOCKS, len(values)))
    heights = np.array([np.nan if np.isnan(part).all() else np.nanmax(part) for part in parts])
    log = log and known.min() > 0
    heights = np.log(heights) if log else heights
    low, reach = np.nanmin(heights), np.ptp(heights[~np.isnan(heights)]) or 1.0
    shares = (heights - low) / reach * len(BARS)
    blocks = "".join(" " if math.isnan(share) else BARS[min(len(BARS) - 1, int(share))] for share in shares)
    numbers = f"{_number(values[-1])}, from {_number(known.min())} to {_number(known.max())}"
    return [f"{name:<{INDENT}}{blocks}", f"{'':<{INDENT}}{numbers}{', logarithmic' if log else ''}"]


def _spikes(run: Run) -> list[str]:
    """The last steps that stand out, the latest first, each with the tensor that has most of it."""
    record = run.gradient
    found = find_spikes(judged(record.norm_T, record.finite_T), [])
    if not found:
        return ["no step stands out by its norm"]
    said = [f"{len(found)} steps stand out by their norm; the last:"]
    for spike in reversed(found[-MOST_SPIKES:]):
        norms = record.norm_TP[spike.row]
        broken = ~np.isfinite(norms)
        place = int(broken.argmax() if broken.any() else norms.argmax())
        step, name = record.step_T[spike.row], plain(record.names[place])
        said.append(f"  step {step:,}  norm {_number(record.norm_T[spike.row])}  {name}")
    return said


def _cut(words: str, width: int) -> list[str]:
    """Words in lines that are not wider."""
    return [words] if len(words) <= width else textwrap.wrap(words, width, subsequent_indent="  ")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def _rich() -> tuple[Callable[..., Any], Callable[..., Any]]:
    try:
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        raise ImportError("needs rich: pip install 'hf_gradclip[report]'. Or look once: watch RUN --once.") from None
    return Live, Text

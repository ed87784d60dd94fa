"""Finds the spikes of a run while it goes on, and writes what this rank knows of each: its examples, and their text."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_gradclip.outlier import WINDOW
from hf_gradclip.record.spikes import describe_spike, find_spikes, judged, known, write_spike

UNKNOWN = "unknown"


def indices_of(batches: Sequence[Any]) -> list[int] | str:
    """The examples of a step by its micro-batches, "unknown" where one of them is; reads them to the host."""
    if not batches or any(batch is None for batch in batches):
        return UNKNOWN
    return [int(i) for batch in batches for i in batch]


class SpikeWatch:
    """Judges the norms of a run in their order.

    Args:
        folder: of the record.
        rank: of this process.
        text_of: words for an example's index; None writes indices only.
    """

    def __init__(self, folder: Path, rank: int, text_of: Callable[[int], str] | None) -> None:
        self._folder = folder
        self._rank = rank
        self._text_of = text_of
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._held: deque[tuple[int, list[Any]]] = deque()

    @property
    def norms(self) -> list[float]:
        """Those that the next one is judged by."""
        return list(self._norms)

    def start(self, norms: Iterable[float] = ()) -> None:
        """Go on after these norms, and hold no examples."""
        self._norms = deque(known(norms), maxlen=WINDOW)
        self._held.clear()

    def hold(self, step: int, batches: list[Any]) -> None:
        """The examples of a step, by micro-batch, until its norm is judged; None where they are not known."""
        self._held.append((step, batches))

    def look(self, rows: dict[str, np.ndarray], names: Sequence[str]) -> None:
        """Judge the norms of a record's rows, write the spikes, and hold the examples of these steps no longer."""
        norms, last = judged(rows["norm"], rows["finite"]), rows["step"][-1]
        try:
            for spike in find_spikes(norms, self.norms):
                cause = self._cause(int(rows["step"][spike.row]))
                found = {**describe_spike(spike, rows, names), "rank": self._rank, **cause}
                write_spike(self._folder, found, self._rank)
        finally:
            self._norms.extend(known(norms))
            self.let_go(last)

    def let_go(self, last: int) -> None:
        """Hold the examples of the steps up to one no longer."""
        while self._held and self._held[0][0] <= last:
            self._held.popleft()

    def _cause(self, step: int) -> dict[str, Any]:
        """The examples that this rank held in a step; reads their indices to the host."""
        batches = next((batches for held, batches in self._held if held == step), [])
        examples = indices_of(batches)
        if self._text_of is None or isinstance(examples, str):
            return {"examples": examples}
        return {"examples": examples, "text": [self._words(i) for i in examples]}

    def _words(self, example: int) -> str:
        try:
            return self._text_of(example) if self._text_of is not None else UNKNOWN
        except Exception:  # the dataset's and the tokenizer's own code; the record is worth more than the words
            return UNKNOWN

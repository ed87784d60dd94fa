"""What was read of a run's steps: of all of them, and of those since the last log."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

from hf_gradclip.say import logger

ZERO_STEPS = 10
"""Steps with a norm of exactly 0 in a row, after which something is said."""
MOST_KEPT = 4096
"""Norms of a run that are kept for its median, or at least half as many."""

SUMS = ("steps", "tensor_steps", "clipped", "tensors", "skipped", "nonfinite", "norms", "norm_sum")
"""What is added up from one read to the next."""
LAST = ("threshold", "norm_in", "norm_post", "scale_max")
"""What is known of the last step alone."""


class Tally:
    """Numbers on the host, of one size whatever the length of a run.

    Attributes:
        run: how many steps there were in the whole run, clipped, skipped and not finite.
        norms: of the whole run.
        warned_zero: whether nothing more is said of norms that are 0.
    """

    def __init__(self) -> None:
        self.run = dict.fromkeys(("steps", "clipped", "skipped", "nonfinite"), 0)
        self.norms = Norms()
        self.warned_zero = False
        self._last: dict[str, float] = {}
        self._held = _nothing()

    def add(self, read: Mapping[str, float], finite: Sequence[float]) -> None:
        """Steps that were read.

        Args:
            read: their SUMS but for the norms, and what of LAST is known.
            finite: their norms, without those that are not finite.
        """
        self._check_zero(finite)
        self.norms.add(finite)
        sums = {**read, "norms": len(finite), "norm_sum": sum(finite)}
        for key in self.run:
            self.run[key] += int(sums[key])
        last = {key: read[key] for key in LAST if read.get(key, math.nan) == read.get(key)}
        self._last |= last
        held = {key: self._held[key] + sums[key] for key in SUMS} | last
        if "norm_in" in last:  # a step was made: what is not known of it is not that of an earlier one
            held |= {key: read.get(key, math.nan) for key in LAST if key != "threshold"}
        if finite:
            held["norm_max"] = max(*finite, self._held.get("norm_max", -math.inf))
        self._held |= held

    def since(self) -> dict[str, float]:
        """SUMS, LAST and the largest norm of the steps since the last call, which are forgotten."""
        held, self._held = self._held, _nothing()
        return held

    def summary(self) -> dict[str, float]:
        """See `ClipReport.summary`."""
        shown: dict[str, float] = dict(self.run)
        shown["rate"] = self.run["clipped"] / max(self.run["steps"], 1)
        if self.norms:
            shown["norm_median"], shown["norm_max"] = self.norms.median(), self.norms.largest
        if "threshold" in self._last:
            shown["threshold"] = self._last["threshold"]
        return shown

    def _check_zero(self, new: Sequence[float]) -> None:
        if self.warned_zero:
            return
        run = 0
        for norm in [*self.norms.last, *new]:
            run = run + 1 if norm == 0.0 else 0
            if run >= ZERO_STEPS:
                self.warned_zero = True
                logger.warning(
                    "The gradient norm was exactly 0 for %d steps in a row: nothing is being learnt. Check that the "
                    "loss depends on the trainable parameters and that the labels are not all masked.",
                    ZERO_STEPS,
                )
                return


def _nothing() -> dict[str, float]:
    return dict.fromkeys(SUMS, 0.0)


class Norms:
    """The norms of a run in memory of one size: every one, then every second, every fourth ... of them.

    Attributes:
        largest: of all; -inf of none.
        last: the last ZERO_STEPS.
    """

    def __init__(self) -> None:
        self.largest = float("-inf")
        self.last: deque[float] = deque(maxlen=ZERO_STEPS)
        self._kept: list[float] = []
        self._every, self._seen = 1, 0

    def __bool__(self) -> bool:
        return self._seen > 0

    def add(self, new: Sequence[float]) -> None:
        """More of them, in their order."""
        self.largest = max([self.largest, *new])
        self.last.extend(new)
        for norm in new:
            if self._seen % self._every == 0:
                self._kept.append(norm)
                if len(self._kept) > MOST_KEPT:
                    self._kept, self._every = self._kept[::2], 2 * self._every
            self._seen += 1

    @property
    def kept(self) -> list[float]:
        """A copy of those that are kept, in their order."""
        return [*self._kept]

    def median(self) -> float:
        """Of those that are kept."""
        return statistics.median(self._kept)

"""`autoclip` limits the total norm to a percentile, linearly interpolated, of the last norms with this one among them.

A norm that stands out among the last 64 is brought to their median. Zero norms are not remembered.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from tests.strategies.past import Past
from tests.strategies.sequence import ZERO, drive, gradients, limit_scale, norm_of, scaled


class Percentile:
    """The rule: numpy's percentile over the window, and the median where the norm stands out."""

    def __init__(self, percentile: float, window: int) -> None:
        self.percentile = percentile
        self.norms: deque[float] = deque(maxlen=window)
        self.past = Past()

    def __call__(self, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        norm = norm_of(grads)
        if norm == 0:
            return grads
        self.norms.append(norm)
        cap, _ = self.past(norm)
        limit = min(cap, float(np.percentile(list(self.norms), self.percentile)))
        return scaled(grads, limit_scale(limit, norm))


@pytest.mark.parametrize(
    ("percentile", "window", "low", "high"),
    [(10, 1000, 0.8, 0.99), (10, 30, 0.8, 0.99), (50, 7, 0.3, 0.7), (90, 40, 0.05, 0.3), (33.3, 1, 0.01, 0.05)],
)
def test_percentile_of_the_window(percentile, window, low, high):
    spec = f"autoclip:percentile={percentile},window={window}"
    run = drive(spec, gradients(), Percentile(percentile, window))
    assert low <= run.share() <= high


def test_100_clips_only_what_stands_out():
    run = drive("autoclip:percentile=100", gradients(), Percentile(100, 1000))
    assert [step for step in range(160) if run.clipped[step]] == [45, 50, 55, 66, 71], "later ones are no outliers"


def test_zero_norms_do_not_pull_the_limit_down():
    run = gradients()
    zeros = [{name: None if g is None else 0 * g for name, g in run[ZERO[0]].items()}] * 30
    drive("autoclip:percentile=10,window=40", run[:40] + zeros + run[40:80], Percentile(10, 40))

"""`percentile` limits each tensor's norm to one of its own last norms, by its place among them in order."""

from __future__ import annotations

import math
from collections import defaultdict, deque

import numpy as np
import pytest

from tests.strategies.past import Past
from tests.strategies.sequence import SHIFT, TENSOR_SPIKES, drive, gradients, limit_scale, louder


class Window:
    """The last norms of each tensor that were not 0; no zeros at the start, and what stands out is limited too."""

    def __init__(self, percentile: int, window: int) -> None:
        self.percentile = percentile
        self.norms: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=window))
        self.pasts: dict[str, Past] = defaultdict(Past)

    def __call__(self, grads):
        after = {}
        for name, g in grads.items():
            n, norms = float(np.linalg.norm(g)), self.norms[name]
            _, begin = self.pasts[name](n)
            if n > 0:
                norms.append(n)
            place = min(self.percentile * len(norms) // 100, len(norms) - 1)
            after[name] = g * limit_scale(min(sorted(norms)[place], begin), n)
        return after


@pytest.mark.parametrize(("percentile", "window"), [(95, 100), (50, 15), (29, 100), (5, 7), (100, 10), (0, 30)])
def test_the_norm_at_a_place(percentile, window):
    run = drive(f"percentile:percentile={percentile},window={window}", gradients(), Window(percentile, window))
    assert 0.02 < run.share() <= 1
    if percentile == 95:
        assert run.share(30, SHIFT) < 0.6
        for step, name in TENSOR_SPIKES.items():
            assert name in run.clipped[step]


def test_the_preset_is_what_bitsandbytes_did_once_its_window_was_full():
    """scale = sqrt(the sixth smallest of the last 100 squares) / norm where that is below 1."""
    run = gradients(260, quiet=True)
    found = drive("percentile_bitsandbytes", run, Window(5, 100))
    squares: dict[str, list[float]] = defaultdict(list)
    clipped = 0
    for grads, scales in zip(run, found.scales, strict=True):
        for name, scale in (scales or {}).items():
            squares[name].append(float((np.float64(grads[name]) ** 2).sum()))
            if len(squares[name]) >= 100:
                wanted = min(1.0, math.sqrt(np.sort(squares[name][-100:])[5] / squares[name][-1]))
                assert scale == pytest.approx(wanted, rel=1e-9)
                clipped += wanted < 1
    assert clipped > 500


def test_one_loud_step_among_the_first_is_limited():
    """It is the highest of those that are known, and so its own limit by the percentile alone."""
    run = louder(gradients(quiet=True), 100, 5)
    scales = drive("percentile", run, Window(95, 100)).scales[5]
    assert all(scale < 0.12 for scale in scales.values())


def test_a_lasting_change_of_level_ends():
    run = louder(gradients(240, quiet=True), 10, *range(SHIFT, 240))
    found = drive("percentile", run, Window(95, 100))
    assert all(scale < 0.3 for scale in found.scales[SHIFT + 1].values())
    assert all(scale > 0.7 for scale in found.scales[SHIFT + 60].values())


def test_gradients_times_a_constant_are_scaled_alike():
    run = gradients()
    small = louder(run, 2.0**-20, *range(len(run)))
    scales, same = (drive("percentile", some, Window(95, 100)).scales for some in (run, small))
    for a, b in zip(scales, same, strict=True):
        assert (a is None) == (b is None)
        assert a is None or list(a.values()) == pytest.approx(list(b.values()), rel=1e-9)

"""`adaptive_norm` brings a total norm that stands out among the last 64 to their median, and leaves others alone."""

from __future__ import annotations

import numpy as np
import pytest

from tests.strategies.past import Past
from tests.strategies.sequence import SHIFT, drive, gradients, limit_scale, louder, norm_of, scaled


class Whole:
    """The rule."""

    def __init__(self) -> None:
        self.past = Past()

    def __call__(self, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        norm = norm_of(grads)
        cap, _ = self.past(norm)
        return scaled(grads, limit_scale(cap, norm))


def test_what_stands_out():
    """Zero and NaN norms are not remembered; smaller spikes after four in 64 steps stand out no more."""
    run = drive("adaptive_norm", louder(gradients(200), 20, 2, 14, 190), Whole())
    clipped = [step for step in range(200) if run.clipped[step]]
    assert clipped == [2, 14, 45, 50, 55, 71, 190]
    assert max(max(run.scales[step].values()) for step in clipped) < 0.3


@pytest.mark.parametrize("factor", [2, 4, 50])
def test_a_lasting_change_of_level(factor):
    """It is the usual level after half a window."""
    grads = louder(gradients(220, quiet=True), factor / 2, *range(SHIFT, 220))
    run = drive("adaptive_norm", grads, Whole())
    clipped = [step for step in range(220) if run.clipped[step]]
    assert all(SHIFT <= step < SHIFT + 36 for step in clipped)
    assert (len(clipped) > 20) == (factor == 50)

"""`value` clamps every element to +-max_value."""

from __future__ import annotations

import numpy as np

from tests.strategies.sequence import drive, gradients


def test_every_element():
    def rule(grads):
        return {name: np.minimum(np.maximum(g, -0.6), 0.6) for name, g in grads.items()}

    run = drive("value:max_value=0.6", gradients(), rule)
    assert 0.1 < run.share() < 0.9
    partly = [names for names in run.clipped if names and len(names) < 3]
    assert partly, "some steps must bound some tensors only"

"""`adaptive_tensors` brings each gradient whose norm stands out among its own last 64 to their median."""

from __future__ import annotations

import numpy as np

from tests.strategies.past import Past
from tests.strategies.sequence import LATE, SHAPES, TENSOR_SPIKES, drive, gradients, limit_scale, louder


class Each:
    """The rule."""

    def __init__(self) -> None:
        self.pasts = {name: Past() for name in SHAPES}

    def __call__(self, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        caps = {name: self.pasts[name](float(np.linalg.norm(g)))[0] for name, g in grads.items()}
        return {name: g * limit_scale(caps[name], float(np.linalg.norm(g))) for name, g in grads.items()}


def test_what_stands_out():
    """`late` begins at LATE, and is not judged before its third norm; a spike in one tensor leaves the others alone."""
    run = drive("adaptive_tensors", louder(gradients(200), 20, 5, LATE + 1, LATE + 8), Each())
    assert run.clipped[5] == set(SHAPES) - {"late"}
    assert run.clipped[LATE + 1] == set(SHAPES) - {"late"}
    assert run.clipped[LATE + 8] == set(SHAPES)
    alone = [step for step, name in TENSOR_SPIKES.items() if run.clipped[step] == {name}]
    assert len(alone) >= 3
    assert not any(run.clipped[step] for step in range(82, 200) if run.clipped[step] is not None)

"""`param_norm` scales each gradient by min(1, max_norm / (n_i + 1e-6)), n_i being its own 2-norm."""

from __future__ import annotations

import numpy as np

from tests.strategies.sequence import TENSOR_SPIKES, drive, gradients, limit_scale


def test_every_tensor_by_its_own_norm():
    def rule(grads):
        return {name: g * limit_scale(0.8, float(np.linalg.norm(g))) for name, g in grads.items()}

    run = drive("param_norm:max_norm=0.8", gradients(), rule)
    assert 0.1 < run.share() < 0.9
    for step, name in TENSOR_SPIKES.items():
        assert run.clipped[step] == {name}

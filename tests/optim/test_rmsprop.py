"""The start of RMSprop, and its bias correction, which torch does not have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_gradclip import optim
from tests.optim import reference
from tests.optim.sequence import LR, RUN, START, STEPS, close, expected, parameters, trained


@pytest.mark.parametrize("correction", [False, True])
def test_the_first_update_of_rmsprop_is_ten_times_too_large(correction: bool) -> None:
    """Its RMS is 1 / sqrt(1 - 0.99) = 10 without bias correction, so an update clip binds at step 1; 1 with it."""
    raw = 1.0 if correction else 10.0
    for limit in (0.5, 5.0, 11.0):
        params = parameters()
        clip = f"block_rms:max_rms={limit}"
        optimizer = optim.RMSprop(params.items(), lr=1.0, bias_correction=correction, update_clip=clip)
        for name, p in params.items():
            p.grad = torch.from_numpy(RUN[0][name].copy())
        optimizer.step()
        for name, p in params.items():
            update = START[name] - p.detach().numpy()
            assert math.sqrt(np.mean(np.float64(update) ** 2)) == pytest.approx(min(raw, limit), rel=1e-5)
        assert optimizer.update_clipper.report.summary()["clipped"] == int(limit < raw)


@pytest.mark.parametrize(("momentum", "limit"), [(0.0, math.inf), (0.0, 1.05), (0.9, math.inf), (0.9, 3.0)])
def test_bias_correction_of_rmsprop(momentum: float, limit: float) -> None:
    def make(params):
        clip = None if limit == math.inf else f"block_rms:max_rms={limit}"
        return optim.RMSprop(params, lr=LR, momentum=momentum, bias_correction=True, update_clip=clip)

    ours, _ = trained(make)
    theirs, clips = expected(reference.RMSprop(momentum=momentum, corrected=True), reference.block_rms(limit))
    close(ours, theirs)
    assert 0 < clips < STEPS if limit < math.inf else clips == 0

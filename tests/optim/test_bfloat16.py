"""bfloat16 parameters: torch's arithmetic without clipping, and the clipped update with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_gradclip import optim
from tests.optim.sequence import LIMITS, LR, NAMES, RUN, SHAPES, START, STEPS, parameters, trained


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_without_clipping_is_torchs(name: str) -> None:
    ours, optimizer = trained(lambda params: getattr(optim, name)(params, lr=LR), torch.bfloat16)
    theirs, like = trained(lambda params: getattr(torch.optim, name)(params, lr=LR, foreach=True), torch.bfloat16)
    for key in SHAPES:
        assert (ours[key] != START[key]).any()
        np.testing.assert_allclose(ours[key], theirs[key], rtol=2**-7, atol=0)
    for mine, torchs in zip(optimizer.state.values(), like.state.values(), strict=True):
        assert {key: value.dtype for key, value in mine.items()} == {key: v.dtype for key, v in torchs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_moves_by_the_clipped_update(name: str) -> None:
    """`.grad` holds it: its RMS is within the limit, and w <- w - lr u but for rounding to 8 bits."""
    params = parameters(torch.bfloat16)
    spec = f"block_rms:max_rms={LIMITS[name]}"
    optimizer = getattr(optim, name)(params.items(), lr=LR, weight_decay=0.0, update_clip=spec)
    at_limit = 0
    for grads in RUN:
        before = {key: p.detach().double().numpy() for key, p in params.items()}
        for key, p in params.items():
            p.grad = torch.from_numpy(grads[key]).bfloat16()
        optimizer.step()
        for key, p in params.items():
            u = p.grad.double().numpy()
            rms = math.sqrt((u * u).mean())
            assert rms <= LIMITS[name] * 1.004
            at_limit += rms > LIMITS[name] * 0.996
            wanted = before[key] - LR * u
            error = np.abs(p.detach().double().numpy() - wanted)
            assert (error <= 1.1 * 2**-7 * np.maximum(np.abs(before[key]), np.abs(wanted))).all()
    assert 2 <= at_limit <= 2 * STEPS - 10
    assert 2 <= optimizer.update_clipper.report.summary()["clipped"] <= STEPS - 5

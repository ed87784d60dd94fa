"""bfloat16 parameters: torch's arithmetic without clipping, and the clipped update with it.

The foreach form rounds as torch's does, after every operation; kernels round once, as torch's fused AdamW does.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_gradclip import kernels, optim
from tests.kernels import tensors
from tests.optim.sequence import LIMITS, LR, NAMES, RUN, SHAPES, START, STEPS, parameters, trained

FUSED = ["AdamW", "Adam"]
"""Those that torch has in a fused form for the CPU; its SGD moves no whole vector of bfloat16 there (2.13)."""


@pytest.mark.parametrize(
    ("form", "name", "form_of_torch"),
    [*(("eager", name, {"foreach": True}) for name in NAMES), *(("auto", name, {"fused": True}) for name in FUSED)],
)
def test_bfloat16_without_clipping_is_torchs(form: str, name: str, form_of_torch: dict[str, bool], monkeypatch) -> None:
    if form == "auto":
        tensors.library()
    monkeypatch.setenv(kernels.VARIABLE, form)
    ours, optimizer = trained(lambda params: getattr(optim, name)(params, lr=LR), torch.bfloat16)
    theirs, like = trained(lambda params: getattr(torch.optim, name)(params, lr=LR, **form_of_torch), torch.bfloat16)
    for key in SHAPES:
        assert (ours[key] != START[key]).any()
        np.testing.assert_allclose(ours[key], theirs[key], rtol=2**-7, atol=0)
    for mine, torchs in zip(optimizer.state.values(), like.state.values(), strict=True):
        assert {key: value.dtype for key, value in mine.items()} == {key: v.dtype for key, v in torchs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_moves_by_the_clipped_update(name: str, monkeypatch) -> None:
    """`.grad` holds it: its RMS is within the limit, and w <- w - lr u but for rounding to 8 bits."""
    monkeypatch.setenv(kernels.VARIABLE, "eager")
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

"""`soft` scales the whole gradient by c / (c + n), n being its 2-norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_gradclip import Clipper
from tests.strategies.sequence import (
    SPIKES,
    ZERO,
    Tiny,
    drive,
    gradients,
    limit_scale,
    norm_of,
    scaled,
    set_gradients,
)


@pytest.mark.parametrize("limit", [0.3, 1.0, 5.0])
def test_every_step_but_a_zero_one(limit):
    run = drive(f"soft:max_norm={limit}", gradients(), lambda grads: scaled(grads, limit / (limit + norm_of(grads))))
    finite = {step for step, names in enumerate(run.clipped) if names is not None}
    assert {step for step in finite if not run.clipped[step]} == set(ZERO)
    assert max(run.scales[step]["embed"] for step in SPIKES) < min(run.scales[step]["embed"] for step in range(5))


def test_below_the_limit_however_large_the_gradient_and_half_of_it_at_the_limit():
    model = Tiny({"weight": (4,)})
    clipper = Clipper.for_model(model, "soft:max_norm=2")
    for norm, after in ((2e-6, 2e-6), (0.02, 0.02 / 1.01), (2.0, 1.0), (2e3, 2 / 1.001), (2e15, 2.0)):
        set_gradients(model, {"weight": np.full(4, norm / 2, dtype=np.float32)})
        clipper.step()
        assert model.weight.grad.norm().item() == pytest.approx(after, rel=2e-6)


def test_the_default_is_1():
    model = Tiny({"weight": (4,)})
    set_gradients(model, {"weight": np.full(4, 0.5, dtype=np.float32)})
    Clipper.for_model(model, "soft").step()
    torch.testing.assert_close(model.weight.grad, torch.full((4,), 0.25))


def test_inf_never_scales():
    assert drive("soft:max_norm=inf", gradients(), lambda grads: grads).share() == 0


def test_before_another():
    """In a chain the next part sees the norms after it: one tensor's limit binds in some steps only."""

    def rule(grads):
        grads = scaled(grads, 3.0 / (3.0 + norm_of(grads)))
        return {name: g * limit_scale(0.5, float(np.linalg.norm(g))) for name, g in grads.items()}

    run = drive("soft:max_norm=3+param_norm:max_norm=0.5", gradients(), rule)
    scales = [step.values() for step in run.scales if step]
    uneven = sum(max(step) > 1.001 * min(step) for step in scales)
    assert 10 < uneven < len(scales) - 10

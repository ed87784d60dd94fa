"""`param_norm` scales each gradient by min(1, max_norm / n_i), n_i being its own 2-norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_gradclip import Clipper
from tests.strategies.sequence import SHAPES, TENSOR_SPIKES, Tiny, drive, gradients, limit_scale, set_gradients


def test_every_tensor_by_its_own_norm():
    def rule(grads):
        return {name: g * limit_scale(0.8, float(np.linalg.norm(g))) for name, g in grads.items()}

    run = drive("param_norm:max_norm=0.8", gradients(), rule)
    assert 0.1 < run.share() < 0.9
    for step, name in TENSOR_SPIKES.items():
        assert run.clipped[step] == {name}


def test_small_norms_are_judged_as_large_ones_are():
    """The limit 1e-8 is not met at 0.99e-8, and halves 2e-8: nothing is added to the norm."""
    model = Tiny()
    directions = {name: np.ones(shape, dtype=np.float32) / np.sqrt(np.prod(shape)) for name, shape in SHAPES.items()}
    sizes = dict(zip(SHAPES, (0.99e-8, 2e-8, 1e-12, 4e-8), strict=True))
    grads = {name: (sizes[name] * g).astype(np.float32) for name, g in directions.items()}
    set_gradients(model, grads)
    Clipper.for_model(model, "param_norm:max_norm=1e-8").step()
    for name, parameter in model.named_parameters():
        if sizes[name] < 1e-8:
            assert torch.equal(parameter.grad, torch.from_numpy(grads[name])), name
        else:
            assert parameter.grad.double().norm().item() == pytest.approx(1e-8, rel=1e-6), name

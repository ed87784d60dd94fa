"""`block_rms` scales each gradient by min(1, L / n_i), L = max_rms * sqrt(elements), n_i its own 2-norm."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_gradclip import Clipper
from tests.strategies.sequence import (
    SHIFT,
    TENSOR_SPIKES,
    Tiny,
    drive,
    gradients,
    limit_scale,
    norm_of,
    scaled,
    set_gradients,
    torch_scale,
)


def test_every_tensor_by_its_own_rms():
    def rule(grads):
        return {name: g * limit_scale(0.3 * math.sqrt(g.size), float(np.linalg.norm(g))) for name, g in grads.items()}

    run = drive("block_rms:max_rms=0.3", gradients(), rule)
    assert 0.1 < run.share(0, SHIFT) < 0.5
    for step, name in TENSOR_SPIKES.items():
        assert name in run.clipped[step]
        assert not run.clipped[step] & {"embed", "weight"} - {name}, "another tensor's spike does not matter"
    partly = [names for names in run.clipped if names and len(names) < 4]
    assert len(partly) > 10


def test_the_default_is_adafactors_d_of_1():
    """U / max(1, RMS(U) / d)."""
    run = [{name: None if g is None else 5 * g for name, g in grads.items()} for grads in gradients()]
    model = Tiny()
    clipper = Clipper.for_model(model, "block_rms")
    for grads in run:
        set_gradients(model, grads)
        clipper.step()
        if clipper.step_was_skipped:
            continue
        for name, parameter in model.named_parameters():
            if grads[name] is None:
                continue
            u = np.float64(grads[name])
            wanted = u / max(1.0, math.sqrt((u * u).mean()))
            np.testing.assert_allclose(parameter.grad.numpy(), wanted, rtol=3e-6, atol=0)
    summary = clipper.report.summary()
    assert 0.1 < summary["rate"] < 0.9


@pytest.mark.parametrize("shape", [(), (1,), (1000,), (10, 10, 10)])
def test_the_rms_after_it_does_not_depend_on_the_size(shape):
    model = Tiny({"weight": shape})
    set_gradients(model, {"weight": np.full(shape, 7.0, dtype=np.float32)})
    Clipper.for_model(model, "block_rms:max_rms=0.25").step()
    torch.testing.assert_close(model.weight.grad, torch.full(shape, 0.25), rtol=1e-5, atol=0)


def test_after_a_global_limit():
    """In a chain it sees the norms that the part before it leaves."""

    def rule(grads):
        grads = scaled(grads, torch_scale(1.0, norm_of(grads)))
        return {name: g * limit_scale(0.2 * math.sqrt(g.size), float(np.linalg.norm(g))) for name, g in grads.items()}

    assert 0.1 < drive("global_norm:max_norm=1+block_rms:max_rms=0.2", gradients(), rule).share() < 0.99

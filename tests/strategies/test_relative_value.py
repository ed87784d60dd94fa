"""`relative_value` clamps every element to a multiple of the root mean square of its tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_gradclip import Clipper
from hf_gradclip.strategy import SpecError
from tests.kernels.languages import NAMES, serving
from tests.strategies.sequence import SPIKES, drive, gradients, louder


def rule(factor):
    def clamped(grads):
        limits = {name: factor * np.sqrt((g * g).mean()) for name, g in grads.items()}
        return {name: np.clip(g, -limits[name], limits[name]) for name, g in grads.items()}

    return clamped


def test_every_element_by_the_rms_of_its_tensor():
    run = drive("relative_value:factor=1.6", gradients(), rule(1.6))
    assert 0.2 < run.share() <= 1
    partly = [names for names in run.clipped if names is not None and len(names) < 3]
    assert partly, "some steps must bound some tensors only"


def test_gradients_times_a_constant_are_bounded_alike():
    """So a spike of the whole is not seen."""
    run = gradients()
    small = louder(run, 2.0**-20, *range(len(run)))
    clipped, same = (drive("relative_value:factor=2", some, rule(2)).clipped for some in (run, small))
    assert clipped == same
    quiet = drive("relative_value:factor=2", gradients(quiet=True), rule(2)).clipped
    assert all(clipped[step] is None or clipped[step] == quiet[step] for step in SPIKES)


@pytest.mark.parametrize("language", NAMES)
def test_elements_whose_squares_round_to_0_are_left_alone(language):
    """As plain torch squares them, a root mean square of 0 would bound all of them to 0."""
    weight = torch.nn.Parameter(torch.zeros(4))
    with serving(language):
        clipper = Clipper.for_model([("w", weight)], "relative_value:factor=1.5")
        for size in (1.0, 1e-24, 1e-30):
            weight.grad = torch.tensor([size, -size, size, size])
            clipper.step()
            assert torch.equal(weight.grad, torch.tensor([size, -size, size, size]))
        weight.grad = torch.tensor([1.0, -10.0, 1.0, 1.0])
        clipper.step()
        np.testing.assert_allclose(weight.grad, [1, -1.5 * np.sqrt(103 / 4), 1, 1], rtol=1e-6)


def test_a_factor_that_would_stop_the_run_is_refused():
    with pytest.raises(SpecError, match="must be > 0"):
        drive("relative_value:factor=0", gradients(), rule(0))

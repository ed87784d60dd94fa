"""`normalize` scales each tensor's norm to a moving average of its own; each average here is a sum with weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_gradclip import ClipConfig, Clipper
from tests.strategies.past import Past
from tests.strategies.sequence import LATE, SHIFT, SPIKES, Tiny, drive, gradients, louder, set_gradients


def average(numbers: list[float], gamma: float) -> float:
    """The moving average of numbers without the bias of its start."""
    return float(np.average(numbers, weights=gamma ** np.arange(len(numbers))[::-1]))


class Mean:
    """m / n for each tensor, at most `most`; what stands out counts as the median."""

    def __init__(self, gamma: float, most: float) -> None:
        self.gamma, self.most = gamma, most
        self.norms: dict[str, list[float]] = {}
        self.pasts: dict[str, Past] = {}

    def size(self, name: str, n: float) -> float:
        norms = self.norms.setdefault(name, [])
        norms.append(min(n, self.pasts.setdefault(name, Past())(n)[0]))
        return average(norms, self.gamma)

    def __call__(self, grads):
        after = {}
        for name, g in grads.items():
            n = float(np.linalg.norm(g))
            after[name] = g * min(self.size(name, n) / n, self.most) if n > 0 else g
        return after


class Ratio(Mean):
    """m / sqrt(v) in the place of m, as published."""

    def __init__(self, gamma: float, gamma2: float, most: float) -> None:
        super().__init__(gamma, most)
        self.gamma2 = gamma2

    def size(self, name: str, n: float) -> float:
        norms = self.norms.setdefault(name, [])
        norms.append(n)
        return average(norms, self.gamma) / math.sqrt(average([m * m for m in norms], self.gamma2))


def test_the_average_of_each_tensor():
    run = drive("normalize", gradients(), Mean(0.7, 10.0))
    scales = [s for step in run.scales[LATE + 1 :] if step for s in step.values()]
    assert 0.2 < np.mean(np.array(scales) > 1) < 0.8, "some are made larger, some smaller"
    assert max(scales) > 1.2
    for step in SPIKES:
        assert all(scale < 0.25 for scale in run.scales[step].values())


@pytest.mark.parametrize("most", [1.0, 1.05])
def test_a_gradient_grows_by_the_largest_factor_at_most(most):
    run = drive(f"normalize:gamma1=0.9,max_scale={most}", gradients(), Mean(0.9, most))
    scales = [s for step in run.scales if step for s in step.values()]
    assert max(scales) == pytest.approx(most, rel=1e-6)
    assert sum(scale > most - 1e-6 for scale in scales) > 20


def test_the_preset_is_the_published_ratio():
    """Of GradientStabilizer: norms of about 1, of a spike 0.3 / sqrt(0.1) at most however high it is."""
    run = louder(gradients(), 1e4, 90)
    found = drive("normalize_paper", run, Ratio(0.7, 0.9, math.inf))

    def left(step: int) -> list[float]:
        return [scale * np.linalg.norm(run[step][n]) for n, scale in (found.scales[step] or {}).items()]

    norms = [norm for step in range(SPIKES[0]) for norm in left(step) if norm > 0]
    assert max(norms) < 1.2
    assert np.median(norms) == pytest.approx(1.0, abs=0.05)
    assert left(90) == pytest.approx([0.3 / math.sqrt(0.1)] * 4, rel=5e-3)
    assert max(left(104)) < 0.1, "and is felt for long"


def test_a_lasting_change_of_level_is_the_new_size():
    """A level twenty times as high, which stands out, after 32 steps."""
    run = louder(gradients(quiet=True), 10, *range(SHIFT, 160))
    scales = drive("normalize", run, Mean(0.7, 10.0)).scales
    for step in (SHIFT + 1, SHIFT + 20):
        assert all(scale < 0.2 for scale in scales[step].values())
    assert all(0.6 < scale < 1.5 for scale in scales[SHIFT + 50].values())


def test_gradients_times_a_constant_are_scaled_alike():
    run = gradients()
    small = louder(run, 2.0**-20, *range(len(run)))
    scales, same = (drive("normalize", some, Mean(0.7, 10.0)).scales for some in (run, small))
    for a, b in zip(scales, same, strict=True):
        assert (a is None) == (b is None)
        assert a is None or list(a.values()) == pytest.approx(list(b.values()), rel=1e-9)


def test_the_first_step_is_left_alone_and_a_tensor_in_its_first_too():
    model = Tiny()
    clipper = Clipper.for_model(model, "normalize")
    for step in (0, LATE):
        grads = gradients()[step]
        set_gradients(model, grads)
        clipper.step()
        assert np.array_equal(model.late.grad if step else model.bias.grad, grads["late" if step else "bias"])


def test_the_preset_has_the_numbers_of_the_paper():
    found = ClipConfig.parse("normalize_paper").gradient
    assert (found.to, found.gamma1, found.gamma2, found.max_scale) == ("ratio", 0.7, 0.9, math.inf)


def test_the_ratio_goes_on_from_the_state_of_the_mean() -> None:
    """The mean of the squares is not in it. The norm after is about 1 at once, as after a run under the ratio alone."""
    torch.manual_seed(0)
    model, after = Tiny(), []
    first, second = Clipper.for_model(model, "normalize"), Clipper.for_model(model, "normalize:to=ratio")
    for clipper in (first, second):
        if clipper is second:
            second.load_state_dict(first.state_dict())
        for _ in range(60):
            for p in model.parameters():
                p.grad = torch.randn(p.shape)
            clipper.step()
            after.append(max(float(p.grad.norm()) for p in model.parameters()))
    assert max(after[60:]) < 1.5


@pytest.mark.parametrize(
    ("spec", "after"),
    [
        ("normalize:gamma1=0", [1.0, 1.0, 1.0, 1.0, 1e-17]),  # its own size, of a spike the median
        (
            "normalize:to=ratio,gamma1=0,gamma2=0",
            [1.0, 1.0, 1.0, 1.0, 1e-16],
        ),  # n / sqrt(n^2), up to the largest factor
    ],
)
def test_an_average_without_a_past_is_the_last_number(spec, after):
    """However much smaller than the one before it is."""
    one = [("w", torch.nn.Parameter(torch.zeros(1)))]
    clipper, found = Clipper.for_model(one, spec), []
    for size in (1.0, 1.0, 1.0, 1e6, 1e-17):
        one[0][1].grad = torch.full((1,), size)
        clipper.step()
        found.append(one[0][1].grad.item())
    np.testing.assert_allclose(found, after, rtol=1e-6)

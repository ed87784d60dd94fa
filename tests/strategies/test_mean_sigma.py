"""`mean_sigma` limits the total norm to the mean of those before it and some deviations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_gradclip import ClipConfig
from tests.strategies.past import Past
from tests.strategies.sequence import SHIFT, SPIKES, drive, gradients, limit_scale, louder, norm_of, scaled


class MeanSigma:
    """Of the norms that were not 0, as they came; and no further than where a norm stands out."""

    def __init__(self, window: int = 128, sigmas: float = 3.0, values: int = 64, least: float = 0.05) -> None:
        self.window, self.sigmas, self.values, self.least = window, sigmas, values, least
        self.norms: list[float] = []
        self.past = Past()

    def __call__(self, grads):
        n = norm_of(grads)
        _, limit = self.past(n)
        known = self.norms[-self.window :]
        if len(known) >= self.values:
            mean = float(np.mean(known))
            limit = min(limit, mean + self.sigmas * max(float(np.std(known)), self.least * mean))
        if n > 0:
            self.norms.append(n)
        return scaled(grads, limit_scale(limit, n))


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("mean_sigma", MeanSigma()),
        ("mean_sigma:window=20,min_values=5,sigmas=1", MeanSigma(20, 1.0, 5)),
        ("mean_sigma:window=2,min_values=2,sigmas=0.5,min_sigma=0", MeanSigma(2, 0.5, 2, 0.0)),
    ],
)
def test_mean_and_deviations(spec, rule):
    run = drive(spec, gradients(), rule)
    assert 0.03 < run.share() < 0.7
    assert all(run.clipped[step] for step in SPIKES)


def test_the_preset_is_the_rule_of_marin_where_nothing_is_loud():
    """Mean and two deviations of up to 128 norms, once 64 are known, and no clip before."""
    run = gradients(400, quiet=True)[:SHIFT] * 3
    found = drive("mean_sigma_marin", run, MeanSigma(128, 2.0, 64, 0.0))
    norms: list[float] = []
    clipped = 0
    for grads, scales in zip(run, found.scales, strict=True):
        if scales is None:
            continue
        n, known = norm_of({name: np.float64(g) for name, g in grads.items()}), norms[-128:]
        limit = np.mean(known) + 2 * np.std(known) if len(known) >= 64 else math.inf
        assert list(scales.values()) == pytest.approx([min(1.0, limit / n)] * len(scales), rel=1e-9)
        clipped += limit < n
        norms.append(n)
    assert 3 < clipped < 30
    assert ClipConfig.parse("mean_sigma_marin").gradient.sigmas == 2


def test_a_loud_step_does_not_disarm_it():
    """By mean and deviation alone, norms up to 30 times the usual one would pass for 128 steps."""
    run = louder(gradients(quiet=True), 100, 70)
    run = louder(run, 10, 80)
    found = drive("mean_sigma", run, MeanSigma())
    assert all(scale < 0.04 for scale in found.scales[70].values())
    assert all(scale < 0.4 for scale in found.scales[80].values())


def test_a_lasting_change_of_level_ends():
    run = louder(gradients(240, quiet=True), 10, *range(SHIFT, 240))
    found = drive("mean_sigma", run, MeanSigma())
    assert all(scale < 0.4 for scale in found.scales[SHIFT + 1].values())
    assert found.share(SHIFT + 40) == 0


def test_gradients_times_a_constant_are_scaled_alike():
    run = gradients()
    small = louder(run, 2.0**-20, *range(len(run)))
    scales, same = (drive("mean_sigma", some, MeanSigma()).scales for some in (run, small))
    for a, b in zip(scales, same, strict=True):
        assert (a is None) == (b is None)
        assert a is None or list(a.values()) == pytest.approx(list(b.values()), rel=1e-9)

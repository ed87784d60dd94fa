"""`zclip` against its equations in float64: design's safe mode, and the authors' code for `mode=reference`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.strategies.past import Past
from tests.strategies.sequence import (
    SHAPES,
    SHIFT,
    SPIKES,
    TENSOR_SPIKES,
    drive,
    gradients,
    limit_scale,
    louder,
    norm_of,
    scaled,
    staircase,
    torch_scale,
)


class Safe:
    """G the total norm. Warm-up, then mu + 2.5^2 sigma / z for a spike; 20 spikes in a row are a new level.

    In the warm-up a norm that stands out is brought to the median, and collected as that.
    """

    def __init__(self, z=2.5, alpha=0.97, warmup=25, max_norm=math.inf, min_sigma=0.05, release_after=20) -> None:
        self.z, self.alpha, self.warmup, self.max_norm = z, alpha, warmup, max_norm
        self.min_sigma, self.release_after = min_sigma, release_after
        self.collected: list[float] = []
        self.past = Past()
        self.mean = self.var = 0.0
        self.spikes = 0
        self.released: list[float] = []

    def __call__(self, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        norm = norm_of(grads)
        if norm == 0:
            return grads
        if len(self.collected) < self.warmup:
            cap, _ = self.past(norm)
            self.collected.append(min(norm, cap))
            self.mean, self.var = float(np.mean(self.collected)), float(np.var(self.collected))
            return scaled(grads, limit_scale(min(self.max_norm, cap), norm))
        sigma = max(math.sqrt(self.var), self.min_sigma * self.mean)
        z = (norm - self.mean) / sigma
        limit = self.mean + self.z**2 * sigma / z if z > self.z else math.inf
        x = min(norm, limit)
        self.spikes = self.spikes + 1 if z > self.z else 0
        if self.spikes == self.release_after:
            self.mean, self.spikes = norm, 0
            self.released.append(norm)
        else:
            old, self.mean = self.mean, self.alpha * self.mean + (1 - self.alpha) * x
            self.var = self.alpha * self.var + (1 - self.alpha) * (x - old) * (x - self.mean)
        return scaled(grads, limit_scale(limit, norm))


class Reference:
    """The authors' code: eps in z, a cap at max_norm on every step, the variance about the new mean, no release."""

    def __init__(self, z=2.5, alpha=0.97, warmup=25, max_norm=1.0) -> None:
        self.z, self.alpha, self.warmup, self.max_norm = z, alpha, warmup, max_norm
        self.raw: list[float] = []
        self.mean = self.var = 0.0

    def __call__(self, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        norm = norm_of(grads)
        if len(self.raw) < self.warmup:
            self.raw.append(norm)
            self.mean, self.var = float(np.mean(self.raw)), float(np.var(self.raw))
            return scaled(grads, torch_scale(self.max_norm, norm))
        sigma = math.sqrt(self.var)
        z = (norm - self.mean) / (sigma + 1e-6)
        x = self.mean + self.z**2 * sigma / z if z > self.z else norm
        self.mean = self.alpha * self.mean + (1 - self.alpha) * x
        self.var = self.alpha * self.var + (1 - self.alpha) * (x - self.mean) ** 2
        limit = min(x if z > self.z else math.inf, self.max_norm)
        return scaled(grads, torch_scale(limit, norm))


def test_safe():
    rule = Safe()
    run = drive("zclip", louder(gradients(steps=200), 20, 5, 18), rule)
    assert [step for step in range(25) if run.clipped[step]] == [5, 18], "what stands out in the warm-up"
    assert all(run.clipped[step] for step in (*SPIKES, *TENSOR_SPIKES))
    assert run.share(26, SHIFT) < 0.3
    assert run.share(SHIFT, SHIFT + 22) == 20 / 21, "a zero and a NaN step do not end a row of spikes"
    assert len(rule.released) == 1
    assert run.share(SHIFT + 22) < 0.3


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("zclip:z_threshold=1.5,alpha=0.9", Safe(z=1.5, alpha=0.9)),
        ("zclip:warmup_steps=4,max_norm=0.5", Safe(warmup=4, max_norm=0.5)),
        ("zclip:min_sigma=0.3,max_norm=1", Safe(min_sigma=0.3, max_norm=1.0)),
        ("zclip:release_after=3", Safe(release_after=3)),
    ],
)
def test_safe_with_other_fields(spec, rule):
    assert 0 < drive(spec, gradients(), rule).share() < 1


def test_safe_counts_anew_after_a_release():
    """When every step is a spike, every third one is taken as the level, and not every one after the third."""
    rule = Safe(release_after=3)
    run = drive("zclip:release_after=3", staircase(), rule)
    assert run.share(30) == pytest.approx(1)
    assert len(rule.released) == 10


@pytest.mark.parametrize("max_norm", [1.0, 2.0, math.inf])
def test_reference(max_norm):
    run = drive(f"zclip:mode=reference,max_norm={max_norm}", gradients(), Reference(max_norm=max_norm))
    assert 0 < run.share() < 1
    assert all(run.clipped[step] for step in (*SPIKES, *TENSOR_SPIKES))


@pytest.mark.parametrize(("mode", "rule"), [("safe", Safe), ("reference", Reference)])
def test_a_lasting_shift_locks_reference_out_and_not_safe(mode, rule):
    """After the norm doubles for good, the reference clips nearly every step for ever; safe clips 20 and goes on."""
    run = gradients(steps=500, quiet=True)
    clipped = drive(f"zclip:mode={mode},max_norm=inf", run, rule(max_norm=math.inf))
    before, after, late = clipped.share(25, SHIFT), clipped.share(SHIFT, SHIFT + 20), clipped.share(SHIFT + 21)
    assert before < 0.3
    assert after == 1
    assert late > 0.9 if mode == "reference" else late < 0.1


def test_safe_does_not_take_a_small_change_of_constant_norms_for_a_spike():
    """With var = 0 the reference clips a norm 1e-4 above the rest; safe has a least sigma of 5 % of the mean."""
    flat = {name: np.full(shape, 0.1, dtype=np.float32) for name, shape in SHAPES.items()}
    higher = {name: g * np.float32(1 + 1e-4) for name, g in flat.items()}
    nan = {name: g * np.float32("nan") for name, g in flat.items()}
    run = [*[flat] * 40, nan, higher]
    assert drive("zclip:max_norm=inf", run, Safe(max_norm=math.inf)).share() == 0
    assert drive("zclip:mode=reference,max_norm=inf", run, Reference(max_norm=math.inf)).clipped[-1]

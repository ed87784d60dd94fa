"""`ada_clip` clamps each tensor's elements to a moving average of its largest one, here a sum with its weights."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from hf_gradclip import Clipper
from tests.strategies.past import Past
from tests.strategies.sequence import LATE, SHIFT, SPIKES, TENSOR_SPIKES, drive, gradients, louder


class Average:
    """The limit of each tensor; what stands out counts as the median, and 0 not at all."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        self.largest: dict[str, list[float]] = defaultdict(list)
        self.pasts: dict[str, Past] = defaultdict(Past)

    def limit(self, name: str, g: np.ndarray) -> float:
        top, largest = float(np.abs(g).max()), self.largest[name]
        cap, _ = self.pasts[name](top)
        if top > 0:
            largest.append(min(top, cap))
        weights = self.gamma ** np.arange(len(largest))[::-1]
        return float(np.average(largest, weights=weights))

    def __call__(self, grads):
        after = {}
        for name, g in grads.items():
            limit = self.limit(name, g)
            after[name] = np.clip(g, -limit, limit) if np.abs(g).max() > limit * (1 + 1e-12) else g
        return after


@pytest.mark.parametrize(("spec", "gamma"), [("ada_clip", 0.999), ("ada_clip:gamma=0.7", 0.7)])
def test_the_average_of_the_largest_elements(spec, gamma):
    run = drive(spec, gradients(), Average(gamma))
    counts = [len(names) / 4 for names in run.clipped[LATE + 1 : SHIFT] if names is not None]
    assert 0.3 < np.mean(counts) < 0.8, "about every second tensor"
    for step in SPIKES:
        assert len(run.clipped[step]) == 4
    for step, name in TENSOR_SPIKES.items():
        assert name in run.clipped[step]


def test_the_largest_element_is_that_of_the_published_rule():
    """g / max |g| * M above M, where nothing stands out: equal up to M, and in the largest element; never above M."""
    run = gradients(60, quiet=True)
    rule, found, differ = Average(0.999), Average(0.999), 0
    for grads in run:
        wide = {name: np.float64(g) for name, g in grads.items()}
        if not all(np.isfinite(g).all() for g in wide.values()):
            continue
        mine = found(wide)
        for name, g in wide.items():
            limit, size = rule.limit(name, g), np.abs(g)
            theirs = np.where(size > limit, g / size.max() * limit, g)
            assert np.abs(theirs).max() == pytest.approx(np.abs(mine[name]).max(), rel=1e-12)
            above = size > limit
            np.testing.assert_array_equal(mine[name][~above], theirs[~above])
            assert (np.abs(theirs[above]) <= np.abs(mine[name][above]) * (1 + 1e-12)).all()
            differ += int((np.abs(theirs - mine[name]) > 1e-9).sum())
    assert differ > 10, "one just above M becomes smaller there than one just below"
    drive("ada_clip", run, Average(0.999))


def test_a_broken_step_does_not_disarm_it():
    run = louder(gradients(quiet=True), 1000, 60)
    rule = Average(0.999)
    drive("ada_clip", run, rule)
    assert max(rule.largest["embed"]) < 2
    drive("ada_clip:gamma=0.9", louder(gradients(240), 10, *range(SHIFT, 240)), rule := Average(0.9))
    assert rule.largest["embed"][-1] > 2, "a lasting change of level is let in"


def test_gradients_times_a_constant_are_bounded_alike():
    run = gradients()
    small = louder(run, 2.0**-20, *range(len(run)))
    clipped, same = (drive("ada_clip", some, Average(0.999)).clipped for some in (run, small))
    assert clipped == same


def test_an_average_without_a_past_bounds_nothing_that_is_usual():
    """Its limit is the largest element, however much smaller than the one before that is; of a spike, the median."""
    weight = torch.nn.Parameter(torch.zeros(2))
    clipper = Clipper.for_model([("w", weight)], "ada_clip:gamma=0")
    for size in (1.0, 1.0, 1.0, 1e6, 1e-17):
        given = torch.tensor([size, size / 2])
        weight.grad = given.clone()
        clipper.step()
        assert torch.equal(weight.grad, torch.ones(2) if size == 1e6 else given)

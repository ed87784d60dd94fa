"""`global_norm` scales all gradients by min(1, max_norm / (n + 1e-6)), n being their 2-norm or largest element."""

from __future__ import annotations

import numpy as np
import pytest

from tests.strategies.sequence import drive, gradients, norm_of, scaled, torch_scale


@pytest.mark.parametrize("max_norm", [0.9, 2.5])
def test_2_norm(max_norm):
    def rule(grads):
        return scaled(grads, torch_scale(max_norm, norm_of(grads)))

    run = drive(f"global_norm:max_norm={max_norm}", gradients(), rule)
    assert 0.01 < run.share() < 0.9


def test_largest_element():
    def rule(grads):
        largest = max(float(np.abs(g).max()) for g in grads.values())
        return scaled(grads, torch_scale(0.5, largest))

    run = drive("global_norm:max_norm=0.5,norm_type=inf", gradients(), rule)
    assert 0.1 < run.share() < 0.9


def test_inf_never_clips():
    assert drive("global_norm:max_norm=inf", gradients(), lambda grads: grads).share() == 0

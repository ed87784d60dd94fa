"""Clipping the update: each strategy, the other sign, and an update that is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_gradclip import optim
from tests.optim import reference
from tests.optim.reference import Arrays
from tests.optim.sequence import LIMITS, LR, NAMES, OPTIMIZERS, RUN, START, STEPS, close, expected, parameters, trained
from tests.strategies import test_ada_clip, test_adagc, test_autoclip, test_mean_sigma, test_percentile, test_zclip


class Soft:
    """u c / (c + n)."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, u: Arrays) -> Arrays:
        n = math.sqrt(sum(float((a * a).sum()) for a in u.values()))
        return {name: a * self.limit / (self.limit + n) for name, a in u.items()}


STRATEGIES = {
    "zclip": (
        "zclip:warmup_steps=12,max_norm=inf,z_threshold=1.5",
        lambda: test_zclip.Safe(z=1.5, warmup=12, max_norm=math.inf),
    ),
    "adagc": (
        "adagc:warmup_steps=5,max_norm=inf,lambda_rel=1.2",
        lambda: test_adagc.Safe(warmup=5, max_norm=math.inf, lambda_rel=1.2),
    ),
    "autoclip": ("autoclip:percentile=70,window=12", lambda: test_autoclip.Percentile(70, 12)),
    "mean_sigma": (
        "mean_sigma:window=12,min_values=4,sigmas=0.5",
        lambda: test_mean_sigma.MeanSigma(window=12, sigmas=0.5, values=4),
    ),
    "percentile": ("percentile:percentile=70,window=12", lambda: test_percentile.Window(70, 12)),
    "ada_clip": ("ada_clip:gamma=0.8", lambda: test_ada_clip.Average(0.8)),
    "soft": ("soft:max_norm=3", lambda: Soft(3.0)),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NAMES)
def test_strategies_with_a_memory(name: str, strategy: str) -> None:
    ours, theirs = OPTIMIZERS[name]
    spec, rule = STRATEGIES[strategy]
    weights, optimizer = trained(lambda params: ours(params, lr=LR, update_clip=spec))
    wanted, clips = expected(theirs(), rule())
    close(weights, wanted)
    summary = optimizer.update_clipper.report.summary()
    assert (summary["steps"], summary["clipped"]) == (STEPS, clips)
    assert clips == STEPS if strategy == "soft" else 0 < clips < STEPS


@pytest.mark.parametrize("name", NAMES)
def test_maximize(name: str) -> None:
    """The gradient with the other sign; decay still shrinks the weights."""
    ours, theirs = OPTIMIZERS[name]
    spec = f"block_rms:max_rms={LIMITS[name]}"
    weights, optimizer = trained(lambda params: ours(params, lr=LR, maximize=True, update_clip=spec))
    wanted, clips = expected(theirs(), reference.block_rms(LIMITS[name]), sign=-1.0)
    close(weights, wanted)
    assert optimizer.update_clipper.report.summary()["clipped"] == clips
    assert 0 < clips < STEPS


@pytest.mark.parametrize("name", ["AdamW", "Adam", "RMSprop"])
def test_an_update_that_is_not_finite_moves_no_weight(name: str) -> None:
    """0 / 0: a zero gradient with eps=0. Neither it nor the decay of this step reaches a weight."""
    params = parameters()
    optimizer = getattr(optim, name)(params.items(), lr=LR, eps=0.0, weight_decay=0.0, update_clip="value:max_value=2")
    if name == "AdamW":
        optimizer.param_groups[0]["weight_decay"] = 0.1
    for name, p in params.items():
        p.grad = torch.from_numpy(RUN[0][name].copy())
    params["b"].grad[2] = 0.0
    optimizer.step()
    for name, p in params.items():
        np.testing.assert_array_equal(p.detach().numpy(), START[name])
    summary = optimizer.update_clipper.report.summary()
    assert (summary["steps"], summary["nonfinite"], summary["skipped"]) == (1, 1, 1)
    assert optimizer.update_clipper.step_was_skipped

    for name, p in params.items():
        p.grad = torch.from_numpy(RUN[1][name].copy())
    optimizer.step()
    assert all((p.detach().numpy() != START[name]).all() for name, p in params.items())
    assert optimizer.update_clipper.report.summary()["nonfinite"] == 1

"""Every optimizer with every clip rule in both places, against the equations in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from hf_gradclip import optim
from tests.optim import reference
from tests.optim.reference import Arrays, changed, go

STEPS = 20
DECAY = 0.1
LRS = [0.01 * min(1.0, step / 5) for step in range(STEPS)]
"""A warm-up from 0: at the first step nothing moves but the moments."""

SHAPES = {"matrix": (4, 3), "vector": (6,), "cube": (2, 3, 2), "number": ()}
LOUD = {4: 5.0, 9: 8.0, 10: 3.0, 15: 6.0}
"""Steps whose gradients are larger by this factor."""

OPTIMIZERS: dict[str, tuple[Callable, Callable]] = {
    "AdamW": (
        lambda params, **clip: optim.AdamW(params, weight_decay=DECAY, **clip),
        lambda: reference.AdamW(decay=DECAY),
    ),
    "Adam": (
        lambda params, **clip: optim.Adam(params, weight_decay=DECAY, **clip),
        lambda: reference.Adam(decay=DECAY),
    ),
    "RMSprop": (
        lambda params, **clip: optim.RMSprop(params, weight_decay=DECAY, **clip),
        lambda: reference.RMSprop(decay=DECAY),
    ),
    "SGD momentum": (
        lambda params, **clip: optim.SGD(params, momentum=0.9, weight_decay=DECAY, **clip),
        lambda: reference.SGD(momentum=0.9, decay=DECAY),
    ),
}

RULES = {
    "value": ("value:max_value", reference.value),
    "global_norm": ("global_norm:max_norm", reference.global_norm),
    "param_norm": ("param_norm:max_norm", reference.param_norm),
    "block_rms": ("block_rms:max_rms", reference.block_rms),
}

LIMITS = {
    "gradient": {"value": 3.0, "global_norm": 6.0, "param_norm": 4.8, "block_rms": 1.4},
    "AdamW": {"value": 0.72, "global_norm": 2.05, "param_norm": 1.45, "block_rms": 0.45},
    "Adam": {"value": 0.72, "global_norm": 2.05, "param_norm": 1.45, "block_rms": 0.45},
    "RMSprop": {"value": 6.0, "global_norm": 15.0, "param_norm": 10.0, "block_rms": 3.0},
    "SGD momentum": {"value": 15.0, "global_norm": 33.0, "param_norm": 22.5, "block_rms": 8.0},
}
"""Of the gradient for every optimizer, and of the update by optimizer: some steps go over it and some do not."""


@dataclass
class Seen:
    """What the reference did: the weights after each step, and how many steps and tensors it clipped."""

    weights: list[Arrays] = field(default_factory=list)
    steps: int = 0
    clipped: int = 0
    tensors: int = 0

    def count(self, before: Arrays, after: Arrays) -> None:
        names = changed(before, after)
        self.steps += 1
        self.clipped += bool(names)
        self.tensors += len(names)


def arrays(seed: int, size: float = 1.0) -> Arrays:
    """Float32 numbers, each tensor with a size of its own."""
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(size * rng.lognormal(0.0, 0.3) * rng.standard_normal(shape), dtype=np.float32)
        for name, shape in SHAPES.items()
    }


START = arrays(seed=1000)
GRADIENTS = [arrays(seed=step, size=LOUD.get(step, 1.0)) for step in range(STEPS)]


def expected(optimizer, place: str, clip: reference.Clip) -> Seen:
    """The run by the equations."""
    seen = Seen()
    w = {name: np.float64(a) for name, a in START.items()}
    for lr, given in zip(LRS, GRADIENTS, strict=True):
        g = {name: np.float64(a) for name, a in given.items()}
        if place == "gradient":
            seen.count(g, g := clip(g))
        u = optimizer.update(g, w)
        if place == "update" and lr > 0:
            seen.count(u, u := clip(u))
        w = go(optimizer, w, u, lr)
        seen.weights.append(w)
    return seen


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", ["gradient", "update"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_table(name: str, place: str, rule: str) -> None:
    ours, theirs = OPTIMIZERS[name]
    spec, clip = RULES[rule]
    limit = LIMITS[name if place == "update" else "gradient"][rule]
    seen = expected(theirs(), place, clip(limit))

    parameters = {name: nn.Parameter(torch.from_numpy(a.copy())) for name, a in START.items()}
    where = {"gradient": "clip", "update": "update_clip"}[place]
    optimizer = ours(parameters.items(), **{where: f"{spec}={limit}"})
    for step, given in enumerate(GRADIENTS):
        optimizer.param_groups[0]["lr"] = LRS[step]
        for key, parameter in parameters.items():
            parameter.grad = torch.from_numpy(given[key].copy())
        optimizer.step()
        for key, parameter in parameters.items():
            wanted = seen.weights[step][key]
            np.testing.assert_allclose(
                parameter.detach().numpy(), wanted, rtol=1e-6, atol=1e-6, err_msg=f"step {step}, {key}"
            )

    clipper = optimizer.clipper if place == "gradient" else optimizer.update_clipper
    counted = clipper.report.scalars()
    summary = clipper.report.summary()
    assert summary["steps"] == seen.steps == (STEPS if place == "gradient" else STEPS - 1)
    assert summary["clipped"] == seen.clipped
    assert counted["clip_update/tensor_rate" if place == "update" else "clip/tensor_rate"] == pytest.approx(
        seen.tensors / (seen.steps * len(SHAPES))
    )
    assert 2 <= seen.clipped <= seen.steps - 4, "some steps must clip and some must not"
    if rule in ("param_norm", "block_rms"):
        assert seen.tensors < seen.clipped * len(SHAPES), "some steps must clip some tensors only"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_at_a_learning_rate_of_0_no_update_is_measured_and_no_weight_moves(name: str) -> None:
    ours, _ = OPTIMIZERS[name]
    parameters = {name: nn.Parameter(torch.from_numpy(a.copy())) for name, a in START.items()}
    optimizer = ours(parameters.items(), lr=0.0, update_clip="zclip")
    for key, parameter in parameters.items():
        parameter.grad = torch.from_numpy(GRADIENTS[0][key].copy())
    optimizer.step()
    assert optimizer.update_clipper.report.summary()["steps"] == 0
    assert optimizer.update_clipper.state.seen == 0
    for key, parameter in parameters.items():
        np.testing.assert_array_equal(parameter.detach().numpy(), START[key])
    assert len(optimizer.state) == len(SHAPES), "the moments move"

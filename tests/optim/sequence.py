"""A run of gradients set by hand, trained by an optimizer of ours and by the equations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from hf_gradclip import optim
from tests.optim import reference
from tests.optim.reference import Arrays, Clip, changed, go

NAMES = ["AdamW", "Adam", "RMSprop", "SGD"]
SHAPES = {"a": (6, 4), "b": (5,)}
LR = 0.02
STEPS = 30


def arrays(seed: int, size: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: (size * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


START = arrays(0)
RUN = [
    {name: a + np.float32(10 if 20 <= step < 24 else 0) for name, a in arrays(1 + step).items()}
    for step in range(STEPS)
]
"""Noise, and four steps that are large and all of one sign, so that the updates of Adam grow too."""


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.from_numpy(a.copy()).to(dtype)) for name, a in START.items()}


def trained(make: Callable, dtype: torch.dtype = torch.float32) -> tuple[Arrays, torch.optim.Optimizer]:
    """The weights after the run."""
    params = parameters(dtype)
    optimizer = make(params.items())
    for grads in RUN:
        for name, p in params.items():
            p.grad = torch.from_numpy(grads[name].copy()).to(dtype)
        optimizer.step()
    return {name: p.detach().double().numpy() for name, p in params.items()}, optimizer


def expected(optimizer: object, clip: Clip, sign: float = 1.0) -> tuple[Arrays, int]:
    """The same by the equations, and how many steps were clipped."""
    w, clips = {name: np.float64(a) for name, a in START.items()}, 0
    for grads in RUN:
        u = optimizer.update({name: sign * np.float64(g) for name, g in grads.items()}, w)
        limited = clip(u)
        clips += bool(changed(u, limited))
        w = go(optimizer, w, limited, LR)
    return w, clips


def close(ours: Arrays, theirs: Arrays) -> None:
    for name, wanted in theirs.items():
        np.testing.assert_allclose(ours[name], wanted, rtol=1e-6, atol=1e-6, err_msg=name)


OPTIMIZERS = {
    "AdamW": (lambda params, **kw: optim.AdamW(params, weight_decay=0.1, **kw), lambda: reference.AdamW(decay=0.1)),
    "Adam": (lambda params, **kw: optim.Adam(params, weight_decay=0.1, **kw), lambda: reference.Adam(decay=0.1)),
    "RMSprop": (optim.RMSprop, reference.RMSprop),
    "SGD": (lambda params, **kw: optim.SGD(params, momentum=0.5, **kw), lambda: reference.SGD(momentum=0.5)),
}
LIMITS = {"AdamW": 0.5, "Adam": 0.5, "RMSprop": 4.2, "SGD": 2.0}
"""Of the RMS of each update; some are over it."""

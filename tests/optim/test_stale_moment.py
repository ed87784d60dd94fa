"""A second moment that has gone stale: a jump that clipping the gradient does not prevent and the update clip does."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from hf_gradclip import Clipper, optim

SIZE, LR = 64, 0.01
QUIET, NORMAL = 2000, 40
SHIFT = 0.08


class Outcome(NamedTuple):
    """`jump`: the largest loss of the normal batches as a multiple of the first one's; `last` the same of the last."""

    jump: float
    last: float
    norm: float
    quiet_norm: float
    clipper: Clipper


def train(**clips: str) -> Outcome:
    """Adam with beta2 = 0.999 on a linear regression, loss 1/2 (x w - y)^2 with 64 inputs of 0.25 in size.

    For 2000 batches the inputs are a thousandth of that, as of a rare feature, and y has a noise of 0.001: the second
    moment knows only such gradients. Then the inputs are of their usual size, and the prediction is off by 0.08. An
    update of RMS 1 moves it by 0.16, so it steps just across; a stale one is three times as long.
    """
    x = 0.25 * (1 - 2 * torch.randint(0, 2, (SIZE,), generator=torch.Generator().manual_seed(0)).float())
    w = nn.Parameter(torch.zeros(SIZE))
    optimizer = optim.Adam([w], lr=LR, betas=(0.9, 0.999), **clips)
    norms, losses = [], []
    for step in range(QUIET + NORMAL):
        quiet = step < QUIET
        inputs = x / 1000 if quiet else x
        y = 0.001 * (-1) ** step if quiet else SHIFT
        error = inputs @ w.detach() - y
        w.grad = error * inputs
        losses.append(0.5 * error.item() ** 2)
        norms.append(w.grad.norm().item())
        optimizer.step()
    normal = losses[QUIET:]
    clipper = optimizer.clipper or optimizer.update_clipper
    return Outcome(max(normal) / normal[0], normal[-1] / normal[0], norms[QUIET], max(norms[:QUIET]), clipper)


@pytest.mark.parametrize(("limit", "exceeded", "jump"), [(0.25, False, 21), (0.05, True, 47)])
def test_clipping_the_gradient_does_not_prevent_the_jump(limit: float, exceeded: bool, jump: float) -> None:
    """The first normal gradient is under the limit, or over it: then all the others are too, and the jump is larger.

    Adam does not mind the size of a gradient, and a smaller one leaves the second moment stale for longer.
    """
    outcome = train(clip=f"global_norm:max_norm={limit}")
    assert outcome.quiet_norm < 1e-4 < 0.1 < outcome.norm
    assert (outcome.norm > limit) == exceeded
    assert 0 < outcome.clipper.report.summary()["clipped"] <= NORMAL
    assert outcome.jump == pytest.approx(jump, rel=0.05), outcome
    if not exceeded:
        assert outcome.jump == train(clip="none").jump, "as without clipping"


def test_clipping_the_update_prevents_it() -> None:
    outcome = train(update_clip="block_rms:max_rms=1")
    assert 0 < outcome.clipper.report.summary()["clipped"] < NORMAL
    assert outcome.clipper.report.summary()["norm_max"] > 2.5 * SIZE**0.5, "the update was stale"
    assert outcome.jump == pytest.approx(1.7, rel=0.05), outcome
    assert outcome.last < 0.5, outcome

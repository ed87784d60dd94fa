"""`adagc` against its equations in float64: design's safe mode, and the authors' code for `mode=reference`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_gradclip import Clipper
from tests.strategies.past import Past
from tests.strategies.sequence import (
    LATE,
    NAN,
    SHAPES,
    SHIFT,
    TENSOR_SPIKES,
    ZERO,
    Tiny,
    drive,
    gradients,
    limit_scale,
    louder,
    norm_of,
    set_gradients,
    staircase,
    torch_scale,
)


class Safe:
    """gamma_i: minimum of the clipped non-zero norms, then an average of limited ones; low for long, a new level.

    In the warm-up a norm of the whole that stands out is brought to the median.
    """

    def __init__(self, lambda_rel=1.04, beta=0.99, warmup=100, max_norm=math.inf, release_after=50) -> None:
        self.lambda_rel, self.beta, self.warmup, self.max_norm = lambda_rel, beta, warmup, max_norm
        self.release_after = release_after
        self.seen = 0
        self.gamma: dict[str, float] = {}
        self.low: dict[str, int] = {}
        self.released: list[str] = []
        self.past = Past()

    def __call__(self, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        warm = self.seen < self.warmup
        self.seen += 1
        if warm:
            cap, _ = self.past(norm_of(grads))
            whole = limit_scale(min(self.max_norm, cap), norm_of(grads))
        result = {}
        for name, g in grads.items():
            norm = float(np.linalg.norm(g))
            if warm:
                result[name] = g * whole
                if norm > 0:
                    self.gamma[name] = min(self.gamma.get(name, math.inf), norm * whole)
                continue
            if norm == 0:
                result[name] = g
                continue
            if name not in self.gamma:
                result[name] = g
                self.gamma[name] = norm
                continue
            limit = self.lambda_rel * self.gamma[name]
            scale = limit_scale(limit, norm)
            result[name] = g * scale
            self.gamma[name] = self.beta * self.gamma[name] + (1 - self.beta) * min(norm, limit)
            self.low[name] = self.low.get(name, 0) + 1 if scale < 0.5 else 0
            if self.low[name] == self.release_after:
                self.gamma[name], self.low[name] = norm, 0
                self.released.append(name)
        return result


class Reference:
    """The authors' code. A missing gradient is a tensor with norm 0, so its minimum is 0 for ever."""

    def __init__(self, lambda_rel=1.04, beta=0.99, warmup=100, max_norm=1.0) -> None:
        self.lambda_rel, self.beta, self.warmup, self.max_norm = lambda_rel, beta, warmup, max_norm
        self.seen = 0
        self.gamma: dict[str, float] = {}

    def __call__(self, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.seen += 1
        whole = torch_scale(self.max_norm, norm_of(grads)) if self.seen <= self.warmup else None
        result = {}
        for name in SHAPES:
            g = grads.get(name, np.zeros(SHAPES[name]))
            norm = float(np.linalg.norm(g))
            if whole is not None:
                result[name] = g * whole
                self.gamma[name] = min(self.gamma.get(name, norm * whole), norm * whole)
                continue
            limit = self.lambda_rel * self.gamma[name]
            result[name] = g * torch_scale(limit, norm)
            self.gamma[name] = self.beta * self.gamma[name] + (1 - self.beta) * min(norm, limit)
        return result


def test_safe():
    rule = Safe(warmup=30, release_after=6)
    run = drive("adagc:warmup_steps=30,release_after=6", louder(gradients(), 20, 5, 18), rule)
    assert [step for step in range(30) if run.clipped[step]] == [5, 18], "what stands out in the warm-up"
    assert run.share(31, SHIFT) > 0.5
    assert run.clipped[LATE] is not None
    assert "late" not in run.clipped[LATE], "a tensor not seen in the warm-up starts unclipped"
    for step, name in TENSOR_SPIKES.items():
        others = [scale for other, scale in run.scales[step].items() if other != name]
        assert run.scales[step][name] < 0.2
        assert min(others) > 0.4, "one tensor's spike must not shrink the others"
    assert {"embed", "weight", "bias"} <= set(rule.released), "the shift must be taken as a new level"
    assert any(not names for names in run.clipped if names is not None)


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("adagc:warmup_steps=10,lambda_rel=1.2,beta=0.9", Safe(warmup=10, lambda_rel=1.2, beta=0.9)),
        ("adagc:warmup_steps=1,max_norm=0.5,release_after=1", Safe(warmup=1, max_norm=0.5, release_after=1)),
        ("adagc:warmup_steps=20,max_norm=1", Safe(warmup=20, max_norm=1.0)),
        ("adagc:warmup_steps=15,max_norm=0.3,release_after=5", Safe(warmup=15, max_norm=0.3, release_after=5)),
        ("adagc", Safe()),
    ],
)
def test_safe_with_other_fields(spec, rule):
    assert 0 < drive(spec, gradients(), rule).share() < 1


def test_safe_counts_anew_after_a_release():
    """When every step is far too high, every third norm is taken as the level, and not every one after the third."""
    rule = Safe(warmup=10, release_after=3)
    drive("adagc:warmup_steps=10,release_after=3", staircase(), rule)
    assert all(4 <= rule.released.count(name) <= 10 for name in SHAPES)


def test_reference():
    """With every tensor present in the warm-up, and a zero step only after it."""
    plain = gradients()[82:SHIFT]
    run = [
        {name: plain[step % len(plain)][name] if g is None else g for name, g in grads.items()}
        for step, grads in enumerate(gradients())
    ]
    run[ZERO[0]] = run[8]
    result = drive("adagc:mode=reference,warmup_steps=20,max_norm=1", run, Reference(warmup=20))
    assert 0 < result.share(0, 20) < 1
    assert result.share(20) > 0.5
    partly = [names for names in result.clipped if names and len(names) < len(SHAPES)]
    assert len(partly) > 10


def test_reference_with_its_dead_tensors():
    """A gradient of 0 or none in the warm-up is a limit of 0: those tensors never move again."""
    result = drive("adagc:mode=reference,warmup_steps=20,max_norm=1", gradients(), Reference(warmup=20))
    assert all(names == set(SHAPES) for names in result.clipped[max(NAN) + 1 :])


@pytest.mark.parametrize("mode", ["safe", "reference"])
def test_a_tensor_unused_in_three_steps_of_four(mode):
    """Safe leaves gamma alone at a zero norm. By the reference rule it decays, and cuts the tensor's true gradients."""
    model = Tiny()
    clipper = Clipper.for_model(model, f"adagc:mode={mode},warmup_steps=10,max_norm=inf")
    steady = {name: np.full(shape, 0.25, dtype=np.float32) for name, shape in SHAPES.items()}
    for step in range(410):
        used = step < 10 or step % 4 == 1
        set_gradients(model, steady if used else steady | {"embed": None})
        clipper.step()
    set_gradients(model, steady)
    clipper.step()
    norms = {name: p.grad.norm().item() / np.linalg.norm(steady[name]) for name, p in model.named_parameters()}
    assert norms.pop("embed") < 0.1 if mode == "reference" else norms.pop("embed") == pytest.approx(1)
    assert all(norm == pytest.approx(1) for norm in norms.values())


@pytest.mark.parametrize("mode", ["safe", "reference"])
def test_a_zero_gradient_in_the_warm_up(mode):
    """LoRA's A at its first step: the reference gives the tensor a limit of 0 for ever, safe does not see that step."""
    model = Tiny()
    clipper = Clipper.for_model(model, f"adagc:mode={mode},warmup_steps=5,max_norm=inf")
    steady = {name: np.full(shape, 0.25, dtype=np.float32) for name, shape in SHAPES.items()}
    set_gradients(model, steady | {"embed": np.zeros(SHAPES["embed"], dtype=np.float32)})
    clipper.step()
    for _ in range(50):
        set_gradients(model, steady)
        clipper.step()
    left = torch.count_nonzero(model.embed.grad).item()
    assert left == (0 if mode == "reference" else model.embed.numel())


@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-6, 1e-8])
def test_constant_norms_are_left_alone_however_small(size):
    """At its limit and below it a gradient keeps every bit, from the first step until long after the warm-up."""
    model = Tiny()
    clipper = Clipper.for_model(model, "adagc:warmup_steps=20")
    grads = {name: np.full(shape, size / math.sqrt(math.prod(shape)), np.float32) for name, shape in SHAPES.items()}
    for step in range(120):
        set_gradients(model, grads)
        plan = clipper.decide().plan
        assert (plan.scale_S == 1).all(), step
        clipper.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, torch.from_numpy(grads[name])), step

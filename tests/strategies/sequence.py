"""A run of gradients set by hand, and a driver that compares every step with a float64 rule written in the test."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from hf_gradclip import Clipper
from hf_gradclip.state import flatten

SHAPES = {"embed": (6, 4), "weight": (3, 5), "bias": (5,), "late": (2, 2)}
"""`late` has no gradient for the first LATE steps; the others have norms of about 0.5 each, 0.9 together."""

LATE = 40
ZERO = (7, 60, 103)
NAN = (12, 75, 105)
MISSING = (9, 64)
SPIKES = (45, 55, 71)
TENSOR_SPIKES = {50: "embed", 66: "bias", 80: "weight", 81: "weight"}
SHIFT = 100

Gradients = dict[str, np.ndarray | None]
Rule = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class Tiny(nn.Module):
    """A few parameters without a forward: the gradients are set by hand."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def gradients(steps: int = 160, quiet: bool = False) -> list[Gradients]:
    """One dict of float32 arrays per step: noise, spikes of all and of one tensor, zero steps, NaN steps, a x2 shift.

    A quiet run has only the noise, the NaN steps and the shift, and every gradient from the first step.
    """
    rng = np.random.default_rng(0)
    run: list[Gradients] = []
    for step in range(steps):
        height = rng.lognormal(0.0, 0.1) * (2 if step >= SHIFT else 1)
        height *= 8 if step in SPIKES and not quiet else 1
        grads: Gradients = {}
        for name, shape in SHAPES.items():
            array = rng.standard_normal(shape)
            array *= 0.5 * height * rng.lognormal(0.0, 0.1) / np.linalg.norm(array)
            array *= 12 if TENSOR_SPIKES.get(step) == name and not quiet else 1
            array *= 0 if step in ZERO and not quiet else 1
            grads[name] = array.astype(np.float32)
        if step in NAN:
            grads["weight"].flat[3] = np.nan
        if step in MISSING and not quiet:
            grads["bias"] = None
        if step < LATE and not quiet:
            grads["late"] = None
        run.append(grads)
    return run


def staircase(steps: int = 60) -> list[Gradients]:
    """A run that is quiet for half its steps and a NaN, then grows by half at every step: each one a new level."""
    run = gradients(steps, quiet=True)
    for step in range(steps // 2, steps):
        run[step] = {name: g * np.float32(1.5 ** (step - steps // 2 + 1)) for name, g in run[step].items()}
    return run


def norm_of(grads: dict[str, np.ndarray]) -> float:
    """2-norm of all gradients together."""
    return math.sqrt(sum(float((g * g).sum()) for g in grads.values()))


def scaled(grads: dict[str, np.ndarray], factor: float) -> dict[str, np.ndarray]:
    """Every gradient times one factor."""
    return {name: g * factor for name, g in grads.items()}


def louder(run: list[Gradients], factor: float, *steps: int) -> list[Gradients]:
    """The run with some steps multiplied."""
    run = list(run)
    for step in steps:
        run[step] = {name: None if g is None else g * np.float32(factor) for name, g in run[step].items()}
    return run


def limit_scale(limit: float, norm: float) -> float:
    """min(1, limit / norm)."""
    return limit / norm if norm > limit else 1.0


def torch_scale(limit: float, norm: float) -> float:
    """min(1, limit / (norm + 1e-6)), as torch's clip_grad_norm_."""
    return min(1.0, limit / (norm + 1e-6))


@dataclass
class Run:
    """What the driver saw, one entry per step, None for a NaN step.

    `scales` has norm out / norm in of every tensor with a gradient, `clipped` the names of the tensors changed.
    """

    clipper: Clipper
    scales: list[dict[str, float] | None]
    clipped: list[set[str] | None]

    def share(self, first: int = 0, last: int | None = None) -> float:
        """Share of the steps first..last-1 in which something was clipped; NaN steps are left out."""
        seen = [bool(names) for names in self.clipped[first:last] if names is not None]
        return sum(seen) / len(seen)


def set_gradients(model: nn.Module, grads: Gradients) -> None:
    """Put copies of the arrays into `.grad`."""
    for name, parameter in model.named_parameters():
        array = grads[name]
        parameter.grad = None if array is None else torch.from_numpy(array.copy()).to(parameter.dtype)


def drive(spec: object, run: list[Gradients], rule: Rule) -> Run:
    """Run `Clipper.for_model(...).step()` over the gradients; every step must do what the rule says in float64.

    A NaN step must drop every gradient, leave the state as it was, and is not shown to the rule.
    """
    model = Tiny()
    clipper = Clipper.for_model(model, spec)
    scales: list[dict[str, float] | None] = []
    clipped: list[set[str] | None] = []
    for step, grads in enumerate(run):
        set_gradients(model, grads)
        before = {key: value.clone() for key, value in flatten(clipper.state).items()}
        norm = clipper.step().item()

        wide = {name: np.float64(g) for name, g in grads.items() if g is not None}
        if not math.isfinite(norm_of(wide)):
            assert math.isnan(norm), step
            assert clipper.step_was_skipped, step
            assert all(p.grad is None for p in model.parameters()), step
            after = flatten(clipper.state)
            assert all(torch.equal(before[key], after[key]) for key in before), step
            scales.append(None)
            clipped.append(None)
            continue

        assert not clipper.step_was_skipped, step
        assert norm == pytest.approx(norm_of(wide), rel=1e-6, abs=1e-12), step
        expected = rule(wide)
        for name, parameter in model.named_parameters():
            if grads[name] is None:
                assert parameter.grad is None, (step, name)
                continue
            np.testing.assert_allclose(
                parameter.grad.numpy(), expected[name], rtol=2e-6, atol=1e-12, err_msg=f"step {step}, {name}"
            )
        scales.append({name: _ratio(expected[name], wide[name]) for name in wide})
        clipped.append({name for name in wide if not np.array_equal(wide[name], expected[name])})
    assert any(names is None for names in clipped), "the run must hold a NaN step"
    return Run(clipper, scales, clipped)


def _ratio(out: np.ndarray, given: np.ndarray) -> float:
    return float(np.linalg.norm(out) / np.linalg.norm(given)) if given.any() else 1.0

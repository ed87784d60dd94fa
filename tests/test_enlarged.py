"""A scale above 1 is applied wherever one below 1 is, and counted apart: against float64, on each path of one process.

tests/optim/test_languages.py has the optimizers of this package, tests/integrations/scenarios.py the sharded backends.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import hf_gradclip
from hf_gradclip import Clipper, optim
from hf_gradclip.decision import judge_on_device
from hf_gradclip.record.buffer import Recorder
from hf_gradclip.views.view import View
from tests.integrations.loops import batches
from tests.kernels.languages import NAMES, serving
from tests.strategies.sequence import SHAPES, Tiny, gradients, norm_of, set_gradients
from tests.tiny import FACTORS, Enlarge, tiny_llama, turn_of, weights_of

STEPS = 7
BY = ("whole", "tensor", "row")


def factor_of(by: str, step: int, name: str, first: int, shape: tuple[int, ...]) -> np.ndarray:
    """What `Enlarge` gives the rows of a tensor whose first segment has this number, to be multiplied with it."""
    factor = FACTORS[(step + (turn_of(name) if by != "whole" else 0)) % 3]
    if by != "row":
        return np.float64(factor)
    rows = shape[0] if len(shape) > 1 else 1  # a vector is one unit
    row = np.where((first + np.arange(rows)) % 2 == 0, factor, 1.0)
    return row.reshape(rows, *[1] * (len(shape) - 1))


def wanted(by: str, step: int, grads: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float, bool]:
    """The gradients after a step in float64, the largest factor, and whether one is below 1."""
    found, largest, below, first = {}, 0.0, False, 0
    for name, shape in SHAPES.items():
        factor = factor_of(by, step, name, first, shape)
        largest, below = max(largest, float(factor.max())), below or bool((factor < 1).any())
        first += np.size(factor) if by == "row" else 1
        if grads[name] is not None:
            found[name] = np.float64(grads[name]) * factor
    return found, largest, below


@pytest.mark.parametrize("judged", ["on the host", "on the device"])
@pytest.mark.parametrize("nonfinite", ["skip", "pass"])
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("language", NAMES)
def test_gradients_log_and_record(language, by, nonfinite, judged, monkeypatch):
    """On a device, where the host reads one number or none, the same as where it has all of them."""
    if judged == "on the device":
        monkeypatch.setattr("hf_gradclip.clipper.judge", lambda *given: judge_on_device(*given[:3]))
    with serving(language):
        model = Tiny()
        clipper = Clipper.for_model(model, Enlarge(by), nonfinite=nonfinite)
        clipper.recorder = Recorder()
        scale_max, scales, rates = [], [], []
        for step, grads in enumerate(gradients(STEPS)):
            set_gradients(model, grads)
            clipper.step()
            expected, largest, below = wanted(by, step, grads)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    np.testing.assert_allclose(p.grad.numpy(), expected[name], rtol=1e-6, atol=1e-12)
            log = clipper.report.scalars()
            before = norm_of({name: np.float64(g) for name, g in grads.items() if g is not None})
            scales.append(norm_of(expected) / before)
            assert log["clip/norm_post"] == pytest.approx(norm_of(expected), rel=1e-6)
            assert log["clip/scale"] == pytest.approx(scales[-1], rel=1e-6)
            assert log.get("clip/scale_max") == (largest if largest > 1 else None)
            assert log["clip/rate"] == below
            scale_max.append(largest)
            rates.append(below)
        assert clipper.report.summary()["clipped"] == sum(rates)
        rows = clipper.recorder.drain()
    np.testing.assert_array_equal(rows["scale_max"], scale_max)
    after = np.sqrt(((rows["norms"] * rows["scales"]) ** 2).sum(1))
    np.testing.assert_allclose(after, np.array(scales) * rows["norm"], rtol=1e-5)
    assert 3.0 in scale_max
    assert by != "whole" or {*scale_max} == {*FACTORS}


FUSED = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("more", [{"fold": True}, {"fold": True, "skip_sync": False}, {"skip_sync": False}])
@pytest.mark.parametrize("name", FUSED)
def test_handed_to_a_fused_optimizer(name, more):
    """Against the same loop whose gradients are multiplied by hand."""

    def trained(clips: bool) -> torch.Tensor:
        model = tiny_llama()
        optimizer = FUSED[name](model.parameters())
        clipper = Clipper.for_model(model, Enlarge(), optimizer=optimizer, **more) if clips else None
        for step, (batch, _) in enumerate(batches(8)):
            model(**batch).loss.backward()
            if clipper is not None:
                clipper.step()
            else:
                for p in model.parameters():
                    p.grad *= FACTORS[step % 3]
            optimizer.step()
            optimizer.zero_grad()
        return weights_of(model)

    assert (trained(True) - trained(False)).abs().max() < 1e-6


@pytest.mark.parametrize("by", BY)
def test_a_plan_that_an_optimizer_takes(by):
    """`.grad` stays as it came, and the step is that of torch's optimizer on the multiplied gradients."""
    accelerator, model, plain = Accelerator(cpu=True), Tiny(), Tiny()
    attachment = hf_gradclip.attach(accelerator, Enlarge(by))
    model, optimizer = accelerator.prepare(model, optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2))
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-2)
    for step, grads in enumerate(gradients(STEPS)):
        set_gradients(model, grads)
        attachment.clip(model)
        taken = all(np.array_equal(p.grad, grads[name]) for name, p in model.named_parameters() if p.grad is not None)
        assert taken or by == "row", "a gradient was written"
        optimizer.step()
        set_gradients(plain, dict.fromkeys(grads) | wanted(by, step, grads)[0])
        reference.step()
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


TORCHS: dict[str, Any] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("by", ["whole", "tensor"])
@pytest.mark.parametrize("name", TORCHS)
def test_updates_of_any_optimizer(name, by):
    """Through the weight difference: the steps of a twin that is left alone, each times its factor."""
    accelerator, model = Accelerator(cpu=True), Tiny().double()
    attachment = hf_gradclip.attach(accelerator, {"gradient": "none", "update": Enlarge(by)})
    twin = copy.deepcopy(model)
    model, optimizer = accelerator.prepare(model, TORCHS[name](model.parameters()))
    alone = TORCHS[name](twin.parameters())
    at = {key: p.detach().clone() for key, p in model.named_parameters()}
    for step, grads in enumerate(gradients(STEPS)):
        before = {key: p.detach().clone() for key, p in twin.named_parameters()}
        for some, stepped in ((model, optimizer), (twin, alone)):
            set_gradients(some, grads)
            if some is model:
                attachment.clip(model)
            stepped.step()
        largest = 0.0
        for key, p in twin.named_parameters():
            factor = FACTORS[(step + (turn_of(key) if by == "tensor" else 0)) % 3]
            largest = max(largest, factor)
            at[key] += factor * (p.detach() - before[key])
            torch.testing.assert_close(model.get_parameter(key).detach(), at[key], rtol=1e-6, atol=1e-9)
        log = attachment.scalars()
        assert log.get("clip_update/scale_max") == (largest if largest > 1 else None)


def test_one_group_of_parameters_is_made_larger():
    """The others are left alone, and each group has its own largest factor."""
    model = Tiny()
    clipper = Clipper.for_model(model, "embed=tests.tiny.Enlarge:by=whole;*=none")
    grads = gradients(1)[0]
    set_gradients(model, grads)
    clipper.step()
    for name, p in model.named_parameters():
        if p.grad is not None:
            np.testing.assert_allclose(p.grad.numpy(), grads[name] * (3 if name == "embed" else 1), rtol=1e-6)
    log = clipper.report.scalars()
    assert (log["clip/scale_max"], log["clip/embed/scale_max"], log["clip/rate"]) == (3.0, 3.0, 0.0)
    assert [key for key in log if key.endswith("/scale_max")] == ["clip/scale_max", "clip/embed/scale_max"]


def test_a_plan_of_ones_writes_nothing(monkeypatch):
    monkeypatch.setattr(View, "apply_", lambda *_: pytest.fail("applied"))
    model = Tiny()
    clipper = Clipper.for_model(model, "none")
    set_gradients(model, gradients(1)[0])
    clipper.step()

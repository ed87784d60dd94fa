"""What the Recorder keeps, against norms computed in float64 from the gradients before and after."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_gradclip import Clipper, optim
from hf_gradclip.record.buffer import Recorder
from tests.tiny import SkipThird, tiny_llama


class HostReads(TorchDispatchMode):
    """Counts what would wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


def norms_of(model: torch.nn.Module) -> np.ndarray:
    return np.array([p.grad.double().norm().item() for p in model.parameters()])


def run(clip: object, steps: int = 6, spoil: int | None = None) -> tuple[Clipper, dict, np.ndarray, np.ndarray]:
    """Random gradients of rising size through a clipper; the record, and the norms in and out in float64."""
    model = tiny_llama()
    clipper = Clipper.for_model(model, clip)
    clipper.recorder = Recorder()
    generator = torch.Generator().manual_seed(0)
    before, after = [], []
    for i in range(steps):
        for k, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=generator) * 0.01 * (i + 1) * (k % 3)
        if i == spoil:
            next(model.parameters()).grad[0, 0] = float("nan")
        before.append(norms_of(model))
        clipper.step()
        after.append(norms_of(model) if not clipper.step_was_skipped else before[-1])
    return clipper, clipper.recorder.drain(), np.array(before), np.array(after)


@pytest.mark.parametrize(
    "clip",
    ["global_norm:max_norm=3", "adagc:warmup_steps=2", "agc:clip_factor=0.02", "param_norm:max_norm=0.4", "none"],
)
def test_norms_and_scales_are_those_of_the_gradients(clip) -> None:
    _, rows, before, after = run(clip)
    assert rows["step"].tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(rows["norms"], before, rtol=1e-6)
    np.testing.assert_allclose(rows["norm"], np.sqrt((before**2).sum(1)), rtol=1e-6)
    ratio = np.divide(after, before, out=np.ones_like(before), where=before > 0)
    np.testing.assert_allclose(rows["scales"], ratio, rtol=1e-5)
    assert (rows["scales"] == 1).any(), "a parameter without a gradient is untouched"
    assert (rows["scales"] < 1).any() == (clip != "none"), "the strategy acts in this run"
    assert rows["finite"].all()
    assert not rows["skipped"].any()
    assert not rows["bounded"].any()


def test_one_threshold_where_there_is_one() -> None:
    assert (run("global_norm:max_norm=3")[1]["threshold"] == 3).all()
    assert np.isnan(run("adagc:warmup_steps=1")[1]["threshold"][2:]).all()


def test_bounded_elements_are_marked() -> None:
    _, rows, _, _ = run("value:max_value=0.05")
    assert rows["bounded"].all()
    np.testing.assert_array_equal(rows["scales"], 1)


def test_a_nan_and_a_skip() -> None:
    _, rows, _, _ = run("global_norm:max_norm=3", spoil=4)
    assert rows["finite"].tolist() == [True] * 4 + [False, True]
    assert rows["skipped"].tolist() == [False] * 4 + [True, False]
    assert np.isnan(rows["norm"][4])
    assert np.isnan(rows["norms"][4]).sum() == 1
    np.testing.assert_array_equal(rows["scales"][4], 1)
    assert run(SkipThird())[1]["skipped"].tolist() == [False, False, True, False, False, False]


def test_an_overflow_is_a_step_without_norms() -> None:
    clipper, *_ = run("global_norm:max_norm=3")
    clipper.count_overflow()
    rows = clipper.recorder.drain()
    assert rows["step"].tolist() == [7]
    assert np.isinf(rows["norm"]).all()
    assert np.isnan(rows["norms"]).all()
    assert rows["skipped"].all()
    assert not rows["finite"].any()


def test_losses_and_rates_of_the_steps_that_had_them() -> None:
    model = tiny_llama()
    clipper = Clipper.for_model(model, "none")
    recorder = clipper.recorder = Recorder()
    for i in range(600):  # past the fold
        for p in model.parameters():
            p.grad = torch.full_like(p, float(i))
        clipper.step()
        if i % 2:
            recorder.note(0.1 * i, torch.tensor(float(i)))
    rows = recorder.drain()
    odd = rows["step"] % 2 == 0
    np.testing.assert_allclose(rows["loss"][odd], np.arange(1, 600, 2))
    np.testing.assert_allclose(rows["learning_rate"][odd], 0.1 * np.arange(1, 600, 2))
    assert np.isnan(rows["loss"][~odd]).all()
    size = sum(p.numel() for p in model.parameters())
    np.testing.assert_allclose(rows["norm"], np.arange(600) * size**0.5, rtol=1e-5)
    assert recorder.drain() == {}


def test_an_update_has_the_step_of_its_gradient() -> None:
    gradient = Recorder()
    update = Recorder(clock=gradient)
    model = tiny_llama()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for skipped in (False, True, False):
        for recorder in (gradient,) if skipped else (gradient, update):
            clipper = Clipper.for_model(model, "none")
            clipper.recorder = recorder
            clipper.step()
    assert gradient.drain()["step"].tolist() == [1, 2, 3]
    assert update.drain()["step"].tolist() == [1, 3]


def test_nothing_is_read_before_the_drain() -> None:
    model = tiny_llama()
    clipper = Clipper.for_model(model, "agc+zclip")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    decision = clipper.decide()
    recorder, finite = Recorder(), torch.tensor(True)
    with HostReads() as reads:
        for _ in range(300):
            recorder.add(decision.stats, decision.plan, finite, ~finite)
            recorder.note(1e-3, torch.tensor(1.0))
    assert reads.count == 0
    with HostReads() as reads:
        float(decision.stats.total)
    assert reads.count == 1, "the counter sees a read"


def test_an_update_whose_step_is_void_is_left_out_and_finite() -> None:
    """With `skip_sync=False` it is measured before anybody knows that the gradient was left out."""
    net = nn.Linear(4, 5)
    optimizer = optim.AdamW(
        net.named_parameters(), lr=0.01, clip={"gradient": "skip_step", "skip_sync": False}, update_clip="block_rms"
    )
    recorder = optimizer.update_clipper.recorder = Recorder()
    for step in range(12):
        for p in net.parameters():
            p.grad = torch.ones_like(p) * (200 if step == 9 else 1)
        if step == 5:
            net.bias.grad[0] = float("nan")
        optimizer.step()
    found = recorder.drain()
    assert np.flatnonzero(found["skipped"]).tolist() == [5, 9]
    assert np.flatnonzero(~found["finite"]).tolist() == [5]

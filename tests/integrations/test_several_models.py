"""attach() over several models and optimizers, and over models that come and go."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

import hf_gradclip

LIMIT = 1e-3


@pytest.fixture(autouse=True)
def _fresh_state(caplog):
    caplog.set_level(logging.INFO, logger="hf_gradclip")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def sgd(*models: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for model in models for p in model.parameters()], lr=1.0)


def moved(model: nn.Module, before: torch.Tensor) -> float:
    return float((vector(model) - before).norm())


def vector(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def two_layers() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 10 * torch.randn(8, 4)


@pytest.mark.parametrize("auto", [True, False])
def test_two_optimizers_that_step_in_turn_are_both_clipped(auto) -> None:
    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, f"global_norm:max_norm={LIMIT}", auto=auto)
    model, x = two_layers()
    turns = [sgd(layer) for layer in model]
    model, *turns = accelerator.prepare(model, *turns)
    for turn in range(6):
        before = vector(model)
        accelerator.backward(model(x).square().sum())
        if not auto:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        turns[turn % 2].step()
        for optimizer in turns:
            optimizer.zero_grad()
        assert 0 < moved(model, before) <= LIMIT * 1.001
    assert attachment.scalars()["clip/rate"] == 1.0


def test_a_clip_before_another_backward_does_not_count_for_it() -> None:
    accelerator = Accelerator(cpu=True)
    hf_gradclip.attach(accelerator, f"global_norm:max_norm={LIMIT}")
    model, x = two_layers()
    turns = [sgd(layer) for layer in model]
    model, *turns = accelerator.prepare(model, *turns)
    accelerator.backward(model(x).square().sum())
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    turns[0].step()
    accelerator.backward(model(x).square().sum())
    with pytest.raises(RuntimeError, match="clip_grad_norm_"):
        turns[1].step()


def test_a_model_that_waits_for_its_step_stays_clipped() -> None:
    """clip(a), backward of b, clip(b), and then both steps: a is not clipped twice, nor called unclipped."""
    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, f"global_norm:max_norm={LIMIT}")
    (a, x), (b, _) = two_layers(), two_layers()
    a, b, of_a, of_b = accelerator.prepare(a, b, sgd(a), sgd(b))
    accelerator.backward(a(x).square().sum())
    accelerator.clip_grad_norm_(a.parameters(), 1.0)
    accelerator.backward(b(x).square().sum())
    accelerator.clip_grad_norm_(b.parameters(), 1.0)
    before = vector(a), vector(b)
    of_a.step()
    of_b.step()
    assert 0 < moved(a, before[0]) <= LIMIT * 1.001
    assert 0 < moved(b, before[1]) <= LIMIT * 1.001
    assert [attachment.clipper_of(model).report.summary()["steps"] for model in (a, b)] == [1, 1]


@pytest.mark.parametrize("auto", [True, False])
def test_one_optimizer_of_two_models_needs_both_clipped(auto) -> None:
    accelerator = Accelerator(cpu=True)
    hf_gradclip.attach(accelerator, f"global_norm:max_norm={LIMIT}", auto=auto)
    (a, x), (b, _) = two_layers(), two_layers()
    a, b, optimizer = accelerator.prepare(a, b, sgd(a, b))
    before = vector(a), vector(b)
    accelerator.backward(b(a(x)).square().sum())
    if not auto:
        accelerator.clip_grad_norm_(a.parameters(), 1.0)
        with pytest.raises(RuntimeError, match="every model that it steps"):
            optimizer.step()
        accelerator.clip_grad_norm_(b.parameters(), 1.0)
    optimizer.step()
    assert 0 < moved(a, before[0]) <= LIMIT * 1.001
    assert 0 < moved(b, before[1]) <= LIMIT * 1.001


@pytest.mark.parametrize("first", [True, False])
def test_a_nan_in_one_of_two_models_skips_their_one_optimizer(first) -> None:
    accelerator = Accelerator(cpu=True)
    hf_gradclip.attach(accelerator, "none", auto=True)
    (a, x), (b, _) = two_layers(), two_layers()
    a, b, optimizer = accelerator.prepare(a, b, sgd(a, b))
    accelerator.backward(b(a(x)).square().sum())
    next((a if first else b).parameters()).grad.fill_(float("nan"))
    before = vector(a), vector(b)
    optimizer.step()
    assert accelerator.optimizer_step_was_skipped
    assert moved(a, before[0]) == moved(b, before[1]) == 0


class Counting(torch.optim.SGD):
    """Counts its steps in the group, as schedule-free optimizers do, gradient or not."""

    def step(self, closure=None):
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        return super().step(closure)


def test_a_skipped_step_counts_nowhere() -> None:
    accelerator = Accelerator(cpu=True)
    hf_gradclip.attach(accelerator, f"global_norm:max_norm={LIMIT}")
    model, x = two_layers()
    model, optimizer = accelerator.prepare(model, Counting(model.parameters(), lr=1.0))
    for step in range(5):
        accelerator.backward(model(x).square().sum() * (float("nan") if step in (1, 3) else 1.0))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert accelerator.optimizer_step_was_skipped == (step in (1, 3))
        optimizer.zero_grad()
    assert optimizer.param_groups[0]["k"] == 3


def test_two_models_of_one_backward_are_judged_by_one_loss() -> None:
    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, "skip_step:window=16,min_values=8,on=loss")
    (a, x), (b, _) = two_layers(), two_layers()
    a, b, of_a, of_b = accelerator.prepare(a, b, sgd(a), sgd(b))
    skipped = []
    for step in range(12):
        size = 1e3 if step == 10 else 1 + 0.01 * step
        accelerator.backward((b(a(x)).square().mean() * 0).add(size))
        for model in (a, b):
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        skipped.append([attachment.clipper_of(model).step_was_skipped for model in (a, b)])
        of_a.step()
        of_b.step()
    assert [any(pair) for pair in skipped] == [step == 10 for step in range(12)]
    assert skipped[10] == [True, True]
    with pytest.raises(ValueError, match="judges the loss"):
        accelerator.clip_grad_norm_(a.parameters(), 1.0)  # no backward since


@pytest.mark.parametrize("record", [False, True])
def test_after_free_memory_another_model_may_come(record, tmp_path, caplog) -> None:
    accelerator = Accelerator(cpu=True)
    folder = tmp_path if record else None
    attachment = hf_gradclip.attach(accelerator, f"global_norm:max_norm={LIMIT}", auto=True, record=folder)
    gone = []
    for _ in range(2):
        model, x = two_layers()
        model, optimizer = accelerator.prepare(model, sgd(model))
        for _ in range(3):
            before = vector(model)
            accelerator.backward(model(x).square().sum())
            optimizer.step()
            optimizer.zero_grad()
            assert 0 < moved(model, before) <= LIMIT * 1.001
        assert attachment.scalars()["clip/rate"] == 1.0
        gone.append(weakref.ref(model))
        model, optimizer = accelerator.free_memory(model, optimizer)
        gc.collect()
    assert [ref() for ref in gone] == [None, None]
    said = [line for line in caplog.messages if "clip: steps 3, clipped 3" in line]
    assert len(said) == 2, "what each of them did is said before it goes"
    if record:
        from hf_gradclip.record.files import read_record

        assert read_record(tmp_path).step_T.tolist() == [1, 2, 3], "another run, so the old record was put aside"
        assert read_record(tmp_path / "gradclip.old1").step_T.tolist() == [1, 2, 3]


def test_an_idle_model_of_an_optimizer_needs_no_clip_call() -> None:
    accelerator = Accelerator(cpu=True)
    hf_gradclip.attach(accelerator, f"global_norm:max_norm={LIMIT}")
    (a, x), (b, _) = two_layers(), two_layers()
    a, b, optimizer = accelerator.prepare(a, b, sgd(a, b))
    before = vector(a), vector(b)
    accelerator.backward(a(x).square().sum())
    accelerator.clip_grad_norm_(a.parameters(), 1.0)
    optimizer.step()
    assert 0 < moved(a, before[0]) <= LIMIT * 1.001
    assert moved(b, before[1]) == 0

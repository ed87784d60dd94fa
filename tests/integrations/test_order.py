"""Loops in another order than backward, clip, step, zero_grad: clipped as they should be, or an error by name.

The model is one vector w with the loss 100 times its first element, so that an unclipped SGD step at lr 1 moves 100.
"""

from __future__ import annotations

import logging
import tempfile

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from transformers import Trainer

import hf_gradclip
from hf_gradclip import Clipper, GradClipTrainer
from hf_gradclip.clipper import NonFiniteError
from hf_gradclip.views.view import UnsupportedBackendError
from tests.tiny import counting_data, tiny_llama, training_args

LIMIT = 0.01
SPEC = f"global_norm:max_norm={LIMIT}"


class Line(nn.Module):
    """A loss that is linear in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, factor: float = 1.0) -> torch.Tensor:
        return (100 * factor * self.weight).sum() / 2  # a gradient of norm 100 factor


class Looped:
    """A prepared model and optimizer."""

    def __init__(
        self, spec="global_norm:max_norm=0.01", optimizer=None, prepared=True, scaler=None, frozen=False, **settings
    ) -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        self.accelerator = Accelerator(cpu=True, mixed_precision=None if scaler is None else "fp16")
        if scaler is not None:  # Accelerate makes none on a CPU
            self.accelerator.scaler, self.accelerator.native_amp = scaler, True
        self.attachment = hf_gradclip.attach(self.accelerator, spec, **settings)
        self.model: nn.Module = Line().requires_grad_(not frozen)
        self.optimizer = (optimizer or (lambda params: torch.optim.SGD(params, lr=1.0)))(self.model.parameters())
        if prepared:
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        else:
            self.model = self.accelerator.prepare(self.model)

    def clip(self):
        return self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)

    def backward(self, factor: float = 1.0) -> torch.Tensor:
        loss = self.model(factor)
        self.accelerator.backward(loss)
        return loss

    def closure(self, clips: bool = False, factor: float = 1.0):
        """The usual one, which may clip at its end."""

        def call() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = self.backward(factor)
            if clips:
                self.clip()
            return loss

        return call

    @property
    def moved(self) -> float:
        return float(self.model.weight.detach().norm())


class TestClosure:
    @pytest.mark.parametrize("auto", [True, False])
    def test_its_gradients_are_clipped(self, auto) -> None:
        loop = Looped(auto=auto)
        for _ in range(2):
            loop.optimizer.step(loop.closure(clips=not auto))
        assert 0.999 * 2 * LIMIT < loop.moved < 1.001 * 2 * LIMIT
        scalars = loop.attachment.scalars()
        assert (scalars["clip/rate"], scalars["clip/norm_max"]) == (1.0, pytest.approx(100))

    def test_it_is_called_once_a_step(self) -> None:
        loop, calls = Looped(auto=True), []
        inner = loop.closure()

        def counted() -> torch.Tensor:
            calls.append(1)
            return inner()

        for _ in range(3):
            loop.optimizer.step(counted)
        assert len(calls) == 3
        assert loop.attachment.clipper.report.summary()["steps"] == 3

    def test_a_nan_in_it_stays_out_of_the_weights(self) -> None:
        loop = Looped(auto=True)
        loop.optimizer.step(loop.closure())
        before = loop.model.weight.detach().clone()
        loop.optimizer.step(loop.closure(factor=float("nan")))
        assert torch.equal(loop.model.weight, before)
        assert loop.accelerator.optimizer_step_was_skipped
        loop.optimizer.step(loop.closure())
        assert not torch.equal(loop.model.weight, before)

    def test_its_updates_are_clipped(self) -> None:
        loop = Looped({"gradient": "none", "update": SPEC}, auto=True)
        for _ in range(2):
            loop.optimizer.step(loop.closure())
        assert loop.moved < 1.001 * 2 * LIMIT
        assert loop.attachment.scalars()["clip_update/rate"] == 1.0

    def test_a_clip_call_before_it_does_not_count(self) -> None:
        loop = Looped()
        loop.backward()
        loop.clip()
        with pytest.raises(RuntimeError, match="in a closure at its end"):
            loop.optimizer.step(loop.closure())
        assert loop.moved == 0

    def test_lbfgs_is_refused_by_name(self) -> None:
        with pytest.raises(UnsupportedBackendError, match=r"LBFGS: .*several gradients"):
            Looped(optimizer=torch.optim.LBFGS)

    def test_one_that_calls_it_at_moved_weights_is_refused_by_name(self) -> None:
        class SharpnessAware(torch.optim.SGD):
            def step(self, closure=None):
                with torch.no_grad():
                    for p in self.param_groups[0]["params"]:
                        p.add_(0.1)
                with torch.enable_grad():
                    closure()
                return super().step()

        loop = Looped(optimizer=lambda params: SharpnessAware(params, lr=1.0), auto=True)
        with pytest.raises(RuntimeError, match=r"SharpnessAware: .*Use an optimizer that calls its closure once"):
            loop.optimizer.step(loop.closure())


class TestOrder:
    @pytest.mark.parametrize("last", [True, False])
    def test_a_clip_before_backward_is_an_error(self, last) -> None:
        """zero_grad last, or between."""
        loop = Looped()
        loop.clip()
        if not last:
            loop.optimizer.zero_grad()
        loop.backward()
        with pytest.raises(RuntimeError, match="a backward came after the clip"):
            loop.optimizer.step()
        assert loop.moved == 0

    def test_a_backward_that_is_added_after_the_clip_is_an_error(self) -> None:
        loop = Looped()
        loop.backward()
        loop.clip()
        loop.backward()
        with pytest.raises(RuntimeError, match="a backward came after the clip"):
            loop.optimizer.step()

    def test_zero_grad_after_the_clip_is_an_error(self) -> None:
        loop = Looped()
        loop.backward()
        loop.clip()
        loop.optimizer.zero_grad()
        with pytest.raises(RuntimeError, match="zeroed after the clip"):
            loop.optimizer.step()

    def test_a_gradient_may_be_edited_after_the_clip(self) -> None:
        loop = Looped()
        for i in range(8):
            loop.backward()
            loop.clip()
            if i % 2:
                loop.model.weight.grad[:2] = 0
            else:
                loop.model.weight.grad = loop.model.weight.grad * torch.tensor([0.0, 0.0, 1.0, 1.0])
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        assert loop.model.weight[:2].tolist() == [0, 0]
        assert loop.moved == pytest.approx(8 * LIMIT / 2**0.5, rel=1e-4)

    def test_no_gradient_in_the_first_step_is_said(self, caplog) -> None:
        """As under an optimizer that steps inside backward, by hooks of its own."""
        loop = Looped()
        weight = loop.model.weight

        @torch.no_grad()
        def step_now(parameter: torch.Tensor) -> None:
            parameter.sub_(parameter.grad)
            parameter.grad = None

        weight.register_post_accumulate_grad_hook(step_now)
        for _ in range(3):
            loop.backward()
            loop.clip()
            loop.optimizer.step()
        assert caplog.text.count("no trainable parameter has a gradient in the first step") == 1
        assert caplog.text.count("1 trainable parameters have hooks") == 1

    @pytest.mark.parametrize("auto", [False, True])
    def test_an_optimizer_that_steps_in_backward_is_said(self, caplog, auto) -> None:
        """It leaves the gradient, so that all seems clipped: 0.01 in the log, and 1 in the weights."""
        loop = Looped(auto=auto, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
        inner = torch.optim.SGD([loop.model.weight], lr=0.01)
        loop.model.weight.register_post_accumulate_grad_hook(lambda parameter: inner.step())
        for step in range(3):
            loop.backward()
            if not auto:
                loop.clip()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            assert loop.moved == pytest.approx(step + 1)
        assert caplog.text.count("1 trainable parameters have hooks") == 1

    @pytest.mark.parametrize("fused", [False, True])
    def test_an_optimizer_that_steps_in_backward_of_a_trainer_is_said(self, caplog, tmp_path, fused) -> None:
        model = tiny_llama()
        for p in model.parameters():
            inner = torch.optim.AdamW([p], lr=0.01, fused=fused)
            p.register_post_accumulate_grad_hook(lambda parameter, inner=inner: inner.step())
        args = training_args(tmp_path, max_steps=3)
        GradClipTrainer(model=model, args=args, train_dataset=counting_data(), clip="adaptive").train()
        assert caplog.text.count("trainable parameters have hooks") == 1

    @pytest.mark.parametrize("since", [3, 6])
    def test_it_is_looked_for_in_the_first_five_steps(self, caplog, since) -> None:
        loop = Looped(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
        inner = torch.optim.SGD([loop.model.weight], lr=0.01)
        for step in range(10):
            if step == since:
                loop.model.weight.register_post_accumulate_grad_hook(lambda parameter: inner.step())
            loop.backward()
            loop.clip()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        assert ("have hooks" in caplog.text) == (since < 5)

    def test_a_hook_that_changes_no_weight_is_not_said(self, caplog) -> None:
        loop = Looped()
        loop.model.weight.register_post_accumulate_grad_hook(lambda parameter: None)
        loop.backward()
        loop.clip()
        assert "have hooks" not in caplog.text

    def test_weights_that_change_before_and_after_backward_are_no_optimizers_doing(self, caplog) -> None:
        """As in a loop of SAM by hand: up along the gradient, backward, and down again."""
        loop = Looped()
        loop.model.weight.register_post_accumulate_grad_hook(lambda parameter: None)
        for _ in range(3):
            for sign in (1, -1):
                with torch.no_grad():
                    loop.model.weight.add_(sign)
                loop.backward()
                with torch.no_grad():
                    loop.model.weight.sub_(sign)
            loop.clip()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        assert loop.moved == pytest.approx(3 * LIMIT, rel=1e-4)
        assert "have hooks" not in caplog.text


class TestSecondCall:
    @pytest.mark.parametrize(
        "spec", ["soft:max_norm=100", "autoclip:percentile=50", "zclip:warmup_steps=2", "adagc:warmup_steps=2"]
    )
    def test_it_gives_the_first_norm_and_does_nothing(self, spec) -> None:
        """Against the same run with one call a step."""
        weights, norms = [], []
        for calls in (1, 2):
            loop, seen = Looped(spec), []
            for i in range(6):
                loop.backward(1 + i % 3)
                seen += [float(loop.clip()) for _ in range(calls)][-1:]
                loop.optimizer.step()
                loop.optimizer.zero_grad()
            weights.append(loop.model.weight.detach().clone())
            norms.append(seen)
            assert loop.attachment.clipper.report.summary()["steps"] == 6
            assert loop.attachment.clipper.report.summary()["clipped"] > 0
            assert loop.moved < 0.99 * 1200, "the sum of the norms, which is how far it moves unclipped"
        assert torch.equal(*weights)
        assert norms[0] == norms[1] == pytest.approx([100.0, 200.0, 300.0] * 2)

    def test_a_loop_that_calls_backward_itself_is_clipped_in_every_step(self) -> None:
        loop = Looped()
        for _ in range(3):
            loop.model().backward()
            loop.clip()
            loop.optimizer.optimizer.step()  # not the prepared one
            loop.optimizer.zero_grad(set_to_none=False)
        assert loop.moved == pytest.approx(3 * LIMIT, rel=1e-4)

    @pytest.mark.parametrize("prepared", [True, False])
    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_a_clip_whose_step_was_left_out_does_not_count_for_the_next_gradient(self, prepared, set_to_none) -> None:
        """A probe of the gradient, or a step that a loop leaves out by itself, between steps that auto=True clips."""
        loop = Looped(auto=True)
        for step in range(10):
            backward = loop.backward if prepared else (lambda: loop.model().backward())
            backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            if step in (2, 5, 7):
                backward()
                loop.clip()
                loop.optimizer.zero_grad(set_to_none=set_to_none)
        assert loop.moved == pytest.approx(10 * LIMIT, rel=1e-4)

    def test_a_loop_with_such_clips_that_forgets_one_is_an_error(self) -> None:
        loop = Looped()
        for step in range(7):
            loop.backward()
            loop.clip()
            if step != 6:
                loop.optimizer.step()
            loop.optimizer.zero_grad()
        loop.backward()
        with pytest.raises(RuntimeError, match="clip_grad_norm_"):
            loop.optimizer.step()
        assert loop.moved == pytest.approx(6 * LIMIT, rel=1e-4)

    def test_two_kinds_of_backward_and_a_step_that_is_left_out(self) -> None:
        loop = Looped()
        loop.backward()
        for step in range(8):
            loop.clip()
            if step != 3:
                loop.optimizer.step()
            loop.optimizer.zero_grad(set_to_none=False)
            loop.model().backward()
        assert loop.moved == pytest.approx(7 * LIMIT, rel=1e-4)

    def test_a_gradient_that_was_edited_since_is_clipped_again(self) -> None:
        """As noise that is added, or gradients that are projected, after a first clip."""
        loop = Looped()
        for _ in range(4):
            loop.backward()
            loop.clip()
            loop.model.weight.grad.mul_(1000)
            assert loop.clip() == pytest.approx(1000 * LIMIT, rel=1e-4)
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        assert loop.moved == pytest.approx(4 * LIMIT, rel=1e-4)


class TestOptimizers:
    @pytest.mark.parametrize("auto", [True, False])
    def test_the_one_before_prepare_is_an_error_where_no_clip_call_came(self, auto) -> None:
        loop = Looped(auto=auto)
        loop.backward()
        with pytest.raises(RuntimeError, match=r"SGD.step\(\): this is the optimizer as it was before"):
            loop.optimizer.optimizer.step()
        assert loop.moved == 0

    def test_after_the_run_it_is_anybodys(self) -> None:
        loop = Looped()
        loop.backward()
        loop.clip()
        loop.optimizer.step()
        loop.accelerator.end_training()
        loop.model.weight.grad = torch.ones(4)
        loop.optimizer.optimizer.step()
        assert loop.moved > 1

    def test_a_second_trainer_with_the_same_optimizer(self) -> None:
        """While the first is still there, and then the stock Trainer."""
        model = tiny_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kept = []
        for cls, more in ((GradClipTrainer, {"clip": SPEC}), (GradClipTrainer, {"clip": SPEC}), (Trainer, {})):
            with tempfile.TemporaryDirectory() as folder:
                args = training_args(folder, max_steps=3)
                trainer = cls(
                    model=model, args=args, train_dataset=counting_data(), optimizers=(optimizer, None), **more
                )
                trainer.train()
                kept.append(trainer)
        assert len(kept) == 3

    def test_a_nan_does_not_reach_the_weights_through_it(self) -> None:
        loop = Looped()
        for factor in (1.0, float("nan"), 1.0):
            loop.backward(factor)
            loop.clip()
            loop.optimizer.optimizer.step()
            loop.optimizer.zero_grad()
        assert loop.moved == pytest.approx(2 * LIMIT, rel=1e-4)

    @pytest.mark.parametrize("by_accelerator", [True, False])
    def test_a_model_that_is_unfrozen_later_is_clipped(self, by_accelerator, caplog) -> None:
        loop = Looped(auto=True, frozen=True)
        loop.optimizer.step()
        assert "belong to no prepared model" not in caplog.text
        loop.model.requires_grad_(True)
        for _ in range(3):
            loop.backward() if by_accelerator else loop.model().backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        assert loop.moved == pytest.approx(3 * LIMIT, rel=1e-4)
        assert "belong to no prepared model" not in caplog.text

    def test_one_that_nobody_prepared_is_an_error_where_nothing_would_clip(self) -> None:
        loop = Looped(prepared=False, auto=True)
        with pytest.raises(RuntimeError, match=r"nothing would be clipped.*weight.*Prepare their optimizer"):
            loop.backward()

    def test_one_that_nobody_prepared_is_named_where_a_call_clips(self, caplog) -> None:
        loop = Looped(prepared=False)
        for _ in range(3):
            loop.backward()
            loop.clip()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        assert loop.moved == pytest.approx(3 * LIMIT, rel=1e-4)
        assert caplog.text.count("1 trainable parameters are in no prepared optimizer (weight)") == 1

    def test_parameters_that_none_steps_are_named(self, caplog) -> None:
        accelerator = Accelerator(cpu=True)
        hf_gradclip.attach(accelerator, SPEC)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
        for _ in range(2):
            accelerator.backward(model(torch.ones(1, 2)).sum())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        assert caplog.text.count("2 trainable parameters are in no prepared optimizer (1.weight, 1.bias)") == 1


class TestSkip:
    def test_gradients_stay_where_the_step_is_withheld(self) -> None:
        """So that a mask between clip and step, which the run was written with, lives through the batch."""
        loop = Looped()
        for factor in (1.0, float("nan"), 1.0):
            loop.backward(factor)
            loop.clip()
            loop.model.weight.grad[:2] = 0
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        assert loop.model.weight.isfinite().all()
        assert loop.moved == pytest.approx(2 * LIMIT / 2**0.5, rel=1e-4)

    def test_they_go_where_an_optimizer_was_not_prepared(self) -> None:
        loop = Looped(prepared=False)
        for factor in (1.0, float("nan"), 1.0):
            loop.backward(factor)
            loop.clip()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        assert loop.moved == pytest.approx(2 * LIMIT, rel=1e-4)

    def test_they_go_under_a_loss_scaler(self) -> None:
        """Which would step with a finite gradient that a strategy skips."""
        loop = Looped("skip_step:window=4,min_values=2", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
        for factor in (1.0, 1.0, 1.0, 1e4):
            before = loop.model.weight.detach().clone()
            loop.accelerator.backward(loop.model(factor))
            loop.clip()
            loop.optimizer.step()
            assert torch.equal(loop.model.weight, before) == (factor > 1)
            assert (loop.model.weight.grad is None) == (factor > 1)
            loop.optimizer.zero_grad()

    @pytest.mark.parametrize("nonfinite", ["skip", "raise"])
    def test_two_steps_for_one(self, nonfinite) -> None:
        """Sharpness-aware minimization: the first moves the weights, the second moves them back and steps."""

        class TwoSteps(torch.optim.SGD):
            def first_step(self) -> None: ...

            def second_step(self) -> None: ...

        def make(params):
            return TwoSteps(params, lr=1.0)

        if nonfinite == "raise":
            Looped({"gradient": SPEC, "nonfinite": nonfinite}, optimizer=make)
        else:
            with pytest.raises(UnsupportedBackendError, match=r"TwoSteps with steps that may be skipped: .*'raise'"):
                Looped(SPEC, optimizer=make)


@pytest.mark.parametrize("given", [True, False])
def test_overflows_of_a_scaler_of_ones_own_are_its_own(given) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    clipper = Clipper.for_model(model, SPEC, scaler=scaler if given else None)

    def train() -> None:
        for _ in range(60):
            scaler.scale(model() * 2.0**60).backward()  # at first its gradient times the scale overflows
            scaler.unscale_(optimizer)
            clipper.step()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    if given:
        train()
        assert clipper.report.summary()["nonfinite"] > 20
        assert 0 < model.weight.detach().norm() < 40 * LIMIT
    else:
        with pytest.raises(NonFiniteError, match="20 steps in a row"):
            train()


@pytest.fixture(autouse=True)
def _heard(caplog):
    caplog.set_level(logging.INFO, logger="hf_gradclip")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()

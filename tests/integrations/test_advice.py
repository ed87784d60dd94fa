"""Warnings about a clip and an optimizer together: that they come, and that they do not, on real optimizers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from lion_pytorch import Lion
from torch import nn

import hf_gradclip
from hf_gradclip import GradClipTrainer
from tests.tiny import train

EPS = "below its eps"
STUCK = "is not finite by now"


@pytest.fixture(autouse=True)
def _fresh(caplog):
    caplog.set_level(logging.INFO, logger="hf_gradclip")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def fit(make: Any, clip: Any, logs: int = 1, loss: float = 1.0) -> tuple[nn.Module, torch.Tensor]:
    """A layer of 64 weights trained for a step per log; it, and how it was before."""
    torch.manual_seed(0)
    accelerator, model = Accelerator(cpu=True), nn.Linear(8, 8, bias=False)
    before = model.weight.detach().clone()
    attachment = hf_gradclip.attach(accelerator, clip, auto=True)
    model, optimizer = accelerator.prepare(model, make(model.parameters()))
    for _ in range(logs):
        accelerator.backward(model(torch.ones(4, 8)).square().mean() * loss)
        optimizer.step()
        optimizer.zero_grad()
        attachment.scalars()
    return model, before


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)


class TestEps:
    """Adam divides by sqrt(v) + eps: at an RMS of the gradient below eps its update is less than half of lr."""

    def test_a_limit_that_stalls_adam_is_said(self, caplog) -> None:
        model, before = fit(adamw, "global_norm:max_norm=1e-8")
        assert "AdamW is given has an RMS of 1.2e-09, below its eps of 1e-08" in caplog.text
        assert 0 < (model.weight - before).abs().max() < 0.5e-3, "where lr is 1e-3"

    def test_ten_times_eps_is_not(self, caplog) -> None:
        model, before = fit(adamw, "global_norm:max_norm=8e-7")
        assert EPS not in caplog.text
        assert (model.weight - before).abs().max() > 0.9e-3

    def test_a_loss_that_was_divided_too_often_is_said_too(self, caplog) -> None:
        fit(adamw, "adaptive_norm", loss=1e-10)
        assert "look at what the loss is divided by" in caplog.text

    @pytest.mark.parametrize("eps", [1e-15, 0.0])
    def test_a_smaller_eps_is_fine(self, eps, caplog) -> None:
        fit(lambda params: torch.optim.AdamW(params, eps=eps), "global_norm:max_norm=1e-8")
        assert EPS not in caplog.text

    def test_rmsprop_too_and_sgd_not(self, caplog) -> None:
        fit(lambda params: torch.optim.SGD(params, lr=0.1), "global_norm:max_norm=1e-8")
        assert EPS not in caplog.text
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        fit(lambda params: torch.optim.RMSprop(params, lr=0.1), "global_norm:max_norm=1e-8")
        assert f"RMSprop is given has an RMS of 1.2e-09, {EPS}" in caplog.text

    def test_one_small_step_among_others_is_not(self, caplog) -> None:
        """A batch in which everything is masked, say, right before a log."""
        accelerator, model = Accelerator(cpu=True), nn.Linear(8, 8, bias=False)
        attachment = hf_gradclip.attach(accelerator, "adaptive_norm", auto=True)
        model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
        for step in range(5):
            accelerator.backward(model(torch.ones(4, 8)).square().mean() * (1e-14 if step == 4 else 1.0))
            optimizer.step()
            optimizer.zero_grad()
        attachment.scalars()
        assert EPS not in caplog.text

    def test_elements_that_are_bounded_below_it_are_said(self, caplog) -> None:
        fit(adamw, "value:max_value=1e-12")
        assert EPS in caplog.text

    def test_an_eps_of_the_second_group_and_a_whole_number(self, caplog) -> None:
        def two(params):
            weight, *_ = params
            return torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [weight], "eps": 1}])

        fit(two, "adaptive_norm", loss=0.01)
        assert EPS in caplog.text

    def test_it_is_said_the_1st_2nd_4th_and_8th_time(self, caplog) -> None:
        fit(adamw, "global_norm:max_norm=1e-8", logs=10)
        assert caplog.text.count(EPS) == 4

    def test_in_the_trainer(self, caplog) -> None:
        train(GradClipTrainer, clip="global_norm:max_norm=1e-7", max_steps=2)
        assert EPS in caplog.text
        caplog.clear()
        train(GradClipTrainer, clip="adaptive", max_steps=2)
        assert EPS not in caplog.text


class TestStuck:
    """A finite gradient whose square is none in float32."""

    def test_a_second_moment_that_became_inf_is_said_by_name(self, caplog) -> None:
        fit(adamw, {"gradient": "none", "nonfinite": "pass"}, loss=1e30)
        assert "a step had a gradient of norm" in caplog.text
        assert "What AdamW keeps of 1 parameters is not finite by now (exp_avg_sq of weight)" in caplog.text
        assert STUCK in caplog.text

    @pytest.mark.parametrize("clip", ["global_norm:max_norm=1", "none"])
    def test_a_clip_or_a_skip_that_kept_it_away_says_nothing(self, clip, caplog) -> None:
        fit(adamw, clip, loss=1e30)
        assert STUCK not in caplog.text

    def test_moments_of_8_bits_are_not_asked(self, caplog) -> None:
        """Float8 has no isfinite; and an optimizer without a group has nothing to say."""

        class Eight(torch.optim.SGD):
            def step(self, closure=None):
                for p in self.param_groups[0]["params"]:
                    self.state[p] = {
                        "moment": torch.zeros(3, dtype=torch.float8_e4m3fn),
                        "other": torch.tensor([float("inf")]),
                    }

        fit(lambda params: Eight(params, lr=0.1), {"gradient": "none", "nonfinite": "pass"}, loss=1e30)
        assert "not finite by now (other of weight)" in caplog.text


class TestMuon:
    """Its updates do not depend on the size of the gradients."""

    @pytest.mark.parametrize(
        ("clip", "words"),
        [
            ("global_norm:max_norm=1", "A clip limits no update"),
            ("agc", "scaled apart change the direction"),
            ("value:max_value=0.1", "scaled apart change the direction"),
        ],
    )
    def test_a_clip_is_said(self, clip, words, caplog) -> None:
        fit(lambda params: torch.optim.Muon(params, lr=0.02), clip, logs=3)
        assert caplog.text.count("Muon with gradient=") == 1
        assert words in caplog.text

    @pytest.mark.parametrize("scale", [1.0, 1e-3])
    def test_what_is_said_is_so(self, scale) -> None:
        """A gradient a thousand times smaller moves the weights as far."""
        model, before = fit(lambda params: torch.optim.Muon(params, lr=0.02, weight_decay=0.0), "none", loss=scale)
        assert float((model.weight.detach() - before).norm()) == pytest.approx(0.02, rel=0.5)

    def test_no_clip_is_not(self, caplog) -> None:
        fit(lambda params: torch.optim.Muon(params, lr=0.02), "none")
        assert "orthogonal" not in caplog.text

    def test_adamw_is_not(self, caplog) -> None:
        fit(adamw, "global_norm:max_norm=1")
        assert "orthogonal" not in caplog.text


class TestSigns:
    def test_clipped_updates_of_lion_are_said(self, caplog) -> None:
        model, before = fit(lambda params: Lion(params, lr=1e-3), {"gradient": "none", "update": "adaptive_norm"})
        assert "Lion with update='adaptive_norm" in caplog.text
        assert (model.weight - before).abs().flatten().tolist() == pytest.approx([1e-3] * 64, rel=1e-3), "signs"

    def test_its_clipped_gradients_are_not(self, caplog) -> None:
        fit(lambda params: Lion(params, lr=1e-3), "adaptive_norm")
        assert "-1 or 1" not in caplog.text

    def test_clipped_updates_of_adamw_are_not(self, caplog) -> None:
        fit(adamw, {"gradient": "none", "update": "adaptive_norm"})
        assert "-1 or 1" not in caplog.text


class TestWhose:
    def test_each_optimizer_is_told_of_the_clip_of_its_own_model(self, caplog) -> None:
        accelerator, a, b = Accelerator(cpu=True), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        hf_gradclip.attach(accelerator, {a: "none", b: "global_norm:max_norm=1"}, auto=True)
        accelerator.prepare(a, b, torch.optim.Muon(a.parameters(), lr=0.02), adamw(b.parameters()))
        assert "orthogonal" not in caplog.text

    def test_a_name_that_holds_another_one(self, caplog) -> None:
        class MillionAdam(torch.optim.AdamW): ...

        fit(lambda params: MillionAdam(params), {"gradient": "none", "update": "adaptive_norm"})
        assert "-1 or 1" not in caplog.text

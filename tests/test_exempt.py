"""What `agc` leaves alone is said at the start; where that is everything, nothing starts."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_gradclip import Clipper, GradClipTrainer, attach, optim
from hf_gradclip.strategy import SpecError
from tests.tiny import tiny_llama, train


class Classifier(nn.Module):
    """A body of two matrices, a norm, and a head."""

    def __init__(self, **heads: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
        for name, head in (heads or {"classifier": nn.Linear(4, 2)}).items():
            self.add_module(name, head)


def probe() -> Classifier:
    """The head alone is trained."""
    model = Classifier()
    model.body.requires_grad_(False)
    return model


def bitfit() -> Classifier:
    """Vectors alone are."""
    model = Classifier(classifier=nn.Linear(4, 2, bias=False))
    for p in model.parameters():
        p.requires_grad_(p.ndim == 1)
    return model


def both() -> Classifier:
    """Vectors and the head are."""
    model = bitfit()
    model.classifier.requires_grad_(True)
    return model


def started(clip: Any, model: nn.Module, caplog: Any) -> str:
    """The start line of a run."""
    caplog.set_level(logging.INFO, logger="hf_gradclip")
    accelerator = Accelerator(cpu=True)
    attachment = attach(accelerator, clip)
    accelerator.prepare(model)
    assert attachment.clipper is not None
    (line,) = [message for message in caplog.messages if message.startswith("clip: ")]
    return line


class TestStartLine:
    @pytest.mark.parametrize(
        ("model", "words"),
        [
            (Classifier(), "agc leaves alone the head (classifier) and 3 vectors"),
            (
                Classifier(out=nn.Linear(4, 2)),
                "agc leaves alone 4 vectors; it found no trained head, so it clips every matrix",
            ),
            (
                Classifier(heads=nn.ModuleList(nn.Linear(4, 2) for _ in range(5))),
                "agc leaves alone 5 heads (heads.0, heads.1, heads.2 and 2 more) and 3 vectors",
            ),
            (
                tiny_llama(tied=True),
                "agc leaves alone the head (lm_head, tied to model.embed_tokens) and 5 vectors",
            ),
        ],
        ids=["one", "none", "many", "tied"],
    )  # fmt: skip
    @pytest.mark.parametrize("clip", ["agc", "adaptive"])
    def test_what_is_left_alone(self, clip, model, words, caplog):
        assert started(clip, model, caplog).endswith(f"; {words}")
        assert words in repr(Clipper.for_model(model, clip))

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ("include_head=true", "; agc leaves alone 4 vectors"),
            ("include_1d=true", "; agc leaves alone the head (classifier)"),
            ("include_1d=true,include_head=true", "to the host"),
        ],
    )
    def test_what_was_asked_for_is_not_said(self, fields, words, caplog):
        assert started(f"agc:{fields}", Classifier(), caplog).endswith(words)

    def test_a_trainer_says_it_too(self, caplog):
        caplog.set_level(logging.INFO, logger="hf_gradclip")
        train(GradClipTrainer, clip="agc", max_steps=1)
        assert caplog.text.count("agc leaves alone the head (lm_head) and 5 vectors") == 1


NOTHING = [
    (
        probe,
        "All 2 trainable parameters are left alone: the head (classifier). Use include_head=true or adaptive_norm,",
    ),
    (bitfit, "All 3 trainable parameters are left alone: 3 vectors. Use include_1d=true or adaptive_norm,"),
    (
        both,
        "All 4 trainable parameters are left alone: the head (classifier) and 3 vectors. "
        "Use include_1d=true or include_head=true or adaptive_norm,",
    ),
]


class TestNothingToClip:
    @pytest.mark.parametrize(("make", "words"), NOTHING, ids=["probe", "bitfit", "both"])
    @pytest.mark.parametrize("clip", ["agc", "none+agc"])
    def test_agc_alone_is_refused(self, clip, make, words):
        with pytest.raises(SpecError, match="clips nothing here") as error:
            Clipper.for_model(make(), clip)
        assert str(error.value).startswith("agc:clip_factor=0.01,")
        assert words in str(error.value)

    @pytest.mark.parametrize(
        "start",
        [
            lambda model: attach(accelerator := Accelerator(cpu=True), "agc") and accelerator.prepare(model),
            lambda model: optim.AdamW([p for p in model.named_parameters() if p[1].requires_grad], clip="agc"),
        ],
        ids=["attach", "optimizer"],
    )
    def test_wherever_a_run_starts(self, start):
        with pytest.raises(SpecError, match="clips nothing here"):
            start(probe())

    def test_a_trainer_stops_before_its_first_step(self):
        model = tiny_llama()
        model.model.requires_grad_(False)
        before = model.lm_head.weight.detach().clone()
        with pytest.raises(SpecError, match=r"the head \(lm_head\). Use include_head=true or adaptive_norm"):
            train(GradClipTrainer, clip="agc", max_steps=1, model=model)
        assert torch.equal(model.lm_head.weight, before)

    @pytest.mark.parametrize(
        "clip", ["agc:include_head=true", "agc:include_1d=true,include_head=true", "adaptive_norm"]
    )
    def test_what_is_to_be_used_instead_clips(self, clip):
        """Rows a million times their weights, or a norm so far above those before."""
        model = probe()
        clipper = Clipper.for_model(model, clip)
        for size in (*[1e-3 if clip == "adaptive_norm" else 1e6] * 20, 1e6):
            for p in model.classifier.parameters():
                p.grad = torch.full_like(p, size)
            clipper.step()
        assert model.classifier.weight.grad.norm() < 1

    @pytest.mark.parametrize("make", [probe, bitfit, both])
    def test_adaptive_still_acts_and_warns_once(self, make, caplog):
        model = make()
        clipper = Clipper.for_model(model, "adaptive")
        trained = [p for p in model.parameters() if p.requires_grad]
        for size in (*[1e-3] * 20, 1e6):
            for p in trained:
                p.grad = torch.full_like(p, size)
            clipper.step()
        assert all(float(p.grad.abs().max()) < 1e-2 for p in trained)
        assert len(caplog.messages) == 1
        assert "agc:clip_factor=0.01" in caplog.text
        assert "clips nothing here" in caplog.text
        assert caplog.messages[0].endswith("or adaptive_norm alone.")

    def test_a_run_of_adaptive_warns_once(self, caplog):
        started("adaptive", probe(), caplog)
        assert caplog.text.count("clips nothing here") == 1

    def test_a_model_that_loses_all_other_layers_in_mid_run(self, caplog):
        model = Classifier()
        clipper = Clipper.for_model(model, "agc")
        del model.body
        clipper.step()
        assert "clips nothing here" in caplog.text

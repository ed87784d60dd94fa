"""A plan that an optimizer of hf_gradclip.optim takes over: its step clips as it reads, and no gradient is written.

Compared with the same loop with torch's optimizer and torch's clip.
"""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainerCallback

import hf_gradclip
from hf_gradclip import Clipper, GradClipTrainer, optim
from hf_gradclip.clipper import NonFiniteError
from hf_gradclip.views.view import UnsupportedBackendError
from tests.tiny import counting_data, tiny_llama, training_args

STEPS = 12
LIMIT = 2.0
PAIRS = {
    "AdamW": (optim.AdamW, torch.optim.AdamW, {"lr": 1e-2, "eps": 1e-3}),
    "SGD": (optim.SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "RMSprop": (optim.RMSprop, torch.optim.RMSprop, {"lr": 1e-3, "eps": 1e-3}),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    """Some steps are above the limit, some below."""
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    return model(x).square().mean() * (1 + 10 * (step % 3))


def attached(make, spec=f"global_norm:max_norm={LIMIT}"):
    """A prepared model, its optimizer and the attachment."""
    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, spec)
    model = network()
    model, optimizer = accelerator.prepare(model, make(model.parameters()))
    return accelerator, attachment, model, optimizer


@pytest.mark.parametrize("pair", PAIRS)
def test_as_torch_clips_and_steps(pair):
    ours, torchs, options = PAIRS[pair]
    accelerator, attachment, model, optimizer = attached(lambda params: ours(params, **options))
    plain = network()
    reference, norms = torchs(plain.parameters(), **options), []
    for step in range(STEPS):
        accelerator.backward(loss_of(model, step))
        came = [p.grad.clone() for p in model.parameters()]
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        assert all(map(torch.equal, came, [p.grad for p in model.parameters()])), "a gradient was written"
        optimizer.step()
        optimizer.zero_grad()
        loss_of(plain, step).backward()
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), LIMIT)))
        reference.step()
        reference.zero_grad()
        assert float(norm) == pytest.approx(norms[-1], rel=1e-5)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert 2 < sum(norm > LIMIT for norm in norms) < STEPS - 2
    assert attachment.scalars()["clip/rate"] == pytest.approx(sum(norm > LIMIT for norm in norms) / STEPS)


@pytest.mark.parametrize(
    ("spec", "takes"),
    [
        (f"global_norm:max_norm={LIMIT}", True),
        ("param_norm:max_norm=0.5", True),
        ("value:max_value=0.05", True),
        ("adaptive_norm", True),
        ("adaptive", False),  # by unit
    ],
)
def test_which_plans_are_taken(spec, takes):
    """The step is the same as with a gradient that was written."""
    *_, attachment, model, optimizer = attached(lambda params: optim.SGD(params, lr=1.0), spec)
    plain = network()
    clipper, changed = Clipper.for_model(plain, spec), 0
    for step in range(8):
        loud = 100.0 if step == 7 else 0.1
        attachment.accelerator.backward(loss_of(model, step) * loud)
        came = [p.grad.clone() for p in model.parameters()]
        attachment.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        left = all(map(torch.equal, came, [p.grad for p in model.parameters()]))
        (loss_of(plain, step) * loud).backward()
        clipper.step()
        clipped = any(not torch.equal(p.grad, g) for p, g in zip(plain.parameters(), came, strict=True))
        changed += clipped
        assert left == (takes or not clipped)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p in plain.parameters():
                p -= p.grad
                p.grad = None
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert changed > 0


def test_two_optimizers_of_one_model_take_nothing():
    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, "global_norm:max_norm=1e-3")
    model = network()
    first, second = list(model[0].parameters()), list(model[2].parameters())
    model, *optimizers = accelerator.prepare(model, optim.SGD(first, lr=1.0), optim.SGD(second, lr=1.0))
    before = [p.detach().clone() for p in model.parameters()]
    accelerator.backward(loss_of(model, 1))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    moved = math.sqrt(
        sum(float((a - b).detach().square().sum()) for a, b in zip(before, model.parameters(), strict=True))
    )
    assert moved == pytest.approx(1e-3, rel=1e-4)
    assert attachment.scalars()["clip/rate"] == 1


@pytest.mark.parametrize("quiet", [(), (0,), (1,)])
def test_one_optimizer_of_two_models_takes_nothing(quiet):
    """Each has a plan of its own, or none where its gradient is quiet."""
    accelerator = Accelerator(cpu=True)
    models = [network(), network()]
    hf_gradclip.attach(accelerator, "global_norm:max_norm=1e-3")
    *models, optimizer = accelerator.prepare(*models, optim.SGD([p for m in models for p in m.parameters()], lr=1.0))
    before = [[p.detach().clone() for p in model.parameters()] for model in models]
    for i, model in enumerate(models):
        accelerator.backward(loss_of(model, 1) * (1e-6 if i in quiet else 1.0))
    for model in models:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for i, (model, old) in enumerate(zip(models, before, strict=True)):
        moved = [(a - b).detach().square().sum() for a, b in zip(old, model.parameters(), strict=True)]
        norm = math.sqrt(sum(map(float, moved)))
        assert norm < 1e-3 * 1.001
        assert i in quiet or norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("loud", [True, False])
def test_a_parameter_that_leaves_the_optimizer_after_the_clip_is_an_error(loud):
    spec = f"global_norm:max_norm={1e-3 if loud else 1e6}"
    accelerator, _, model, optimizer = attached(lambda params: optim.SGD(params, lr=1.0), spec)
    accelerator.backward(loss_of(model, 1))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.optimizer.param_groups[0]["params"].pop()
    with pytest.raises(RuntimeError, match="1 parameters left the optimizer between the clip and the step"):
        optimizer.optimizer.step()


def test_an_edit_is_taken_by_a_second_clip():
    """Of whichever gradient."""
    accelerator, _, model, optimizer = attached(lambda params: optim.SGD(params, lr=1.0), "global_norm:max_norm=1e-3")
    before = [p.detach().clone() for p in model.parameters()]
    accelerator.backward(loss_of(model, 1))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    model[2].weight.grad.add_(100.0)
    norm = float(accelerator.clip_grad_norm_(model.parameters(), 1.0))
    assert norm > 300
    optimizer.step()
    moved = [(a - b).detach().square().sum() for a, b in zip(before, model.parameters(), strict=True)]
    assert math.sqrt(sum(map(float, moved))) == pytest.approx(1e-3, rel=1e-3)


def test_a_gradient_that_is_taken_away_after_the_clip_is_none():
    accelerator, _, model, optimizer = attached(lambda params: optim.SGD(params, lr=1.0), "global_norm:max_norm=1e-3")
    before = model[0].weight.detach().clone()
    accelerator.backward(loss_of(model, 1))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    model[0].weight.grad = None
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_a_plan_of_gradients_that_are_gone_is_not_used():
    """A step that was left out, and another backward: by hand, where nobody else looks."""
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    clipper = Clipper.for_model(model, "global_norm:max_norm=1e-3")
    for step in range(20):
        loss_of(model, step).backward()
        clipper.step(to=optimizer)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        with pytest.raises(RuntimeError, match="was written to, or replaced"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="was written to, or replaced"):
            optimizer.step()  # still
        optimizer.zero_grad()


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_a_gradient_that_is_written_after_the_clip_is_an_error(limit):
    """Noise that is added to a clipped gradient would be scaled with it."""
    spec = f"global_norm:max_norm={limit}"
    accelerator, _, model, optimizer = attached(lambda params: optim.SGD(params, lr=1.0), spec)
    before = [p.detach().clone() for p in model.parameters()]
    accelerator.backward(loss_of(model, 1))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    model[0].weight.grad.add_(1.0)
    with pytest.raises(RuntimeError, match=r"SGD\.step\(\): a gradient was written to, or replaced, between the clip"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_plan_serves_one_step():
    """A step that nothing clips, after one that something does."""
    accelerator, _, model, optimizer = attached(lambda params: optim.SGD(params, lr=1.0), "global_norm:max_norm=2")
    for step, loud in ((0, 100.0), (1, 1e-3)):
        accelerator.backward(loss_of(model, step) * loud)
        before = [p.detach().clone() for p in model.parameters()]
        grads = [p.grad.clone() for p in model.parameters()]
        norm = float(accelerator.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        for p, old, grad in zip(model.parameters(), before, grads, strict=True):
            torch.testing.assert_close(old - p.detach(), grad * min(1.0, 2 / norm), rtol=1e-4, atol=1e-6)


def test_a_skipped_step_hands_nothing_over():
    accelerator, attachment, model, optimizer = attached(lambda params: optim.AdamW(params, lr=1.0), "zclip")
    for step in range(4):
        accelerator.backward(loss_of(model, step) * (math.nan if step == 2 else 1.0))
        before = [p.detach().clone() for p in model.parameters()]
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert all(map(torch.equal, before, model.parameters())) == (step == 2)
    assert attachment.scalars()["clip/skipped"] == 1


def test_what_holds_a_plan_can_be_copied():
    accelerator, attachment, model, optimizer = attached(
        lambda params: optim.SGD(params, lr=1.0), "global_norm:max_norm=1"
    )
    accelerator.backward(loss_of(model, 1))
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    pickle.loads(pickle.dumps(attachment.clipper))
    pickle.loads(pickle.dumps(optimizer.optimizer))
    optimizer.step()


class TestUnread:
    """`skip_sync=False`: the flag goes with the plan, or after gradients that were written."""

    @pytest.mark.parametrize("spec", ["zclip:warmup_steps=3,z_threshold=0.5,max_norm=inf", "adaptive"])
    @pytest.mark.parametrize("update", [None, "block_rms:max_rms=0.7"])
    def test_as_with_a_read(self, spec, update):
        found = []
        for sync in (True, False):
            accelerator, attachment, model, optimizer = attached(
                lambda params: optim.AdamW(params, lr=1e-2), {"gradient": spec, "update": update, "skip_sync": sync}
            )
            taker = attachment._steps_of.taker(attachment.clipper)
            assert (taker is not None) == (spec != "adaptive")
            for step in range(STEPS):
                accelerator.backward(loss_of(model, step) * (math.nan if step in (0, 5, 6) else 1.0))
                before = [p.detach().clone() for p in model.parameters()]
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                assert all(map(torch.equal, before, model.parameters())) == (step in (0, 5, 6))
            scalars = attachment.scalars()
            assert scalars["clip/skipped"] == scalars["clip/nonfinite"] == 3
            assert update is None or scalars["clip_update/rate"] > 0
            states = [optimizer.optimizer.state[p] for p in model.parameters()]
            found.append([*model.parameters(), *(entry[key] for entry in states for key in sorted(entry))])
            assert {entry["step"].item() for entry in states} == {STEPS - 3}
            assert update is None or optimizer.optimizer.update_clipper.config.skip_sync == sync
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)

    def test_no_more_skips_in_a_row_than_are_admitted(self):
        spec = {"gradient": "none", "skip_sync": False, "max_consecutive_skips": 3}
        accelerator, attachment, model, optimizer = attached(lambda params: optim.AdamW(params), spec)
        for step in range(4):
            accelerator.backward(loss_of(model, step) * math.nan)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with pytest.raises(NonFiniteError, match="4 steps in a row were skipped"):
            attachment.scalars()

    def test_two_optimizers_of_one_model_are_refused(self):
        accelerator = Accelerator(cpu=True)
        hf_gradclip.attach(accelerator, {"gradient": "zclip", "skip_sync": False})
        model = network()
        halves = [optim.SGD(part.parameters(), lr=1.0) for part in (model[0], model[2])]
        words = r"skip_sync=False: the optimizer steps 2 .* gradient is of 4"
        with pytest.raises(UnsupportedBackendError, match=words):
            accelerator.prepare(model, *halves)

    def test_under_the_trainer(self, tmp_path):
        """Trained, saved, and resumed the other way; schedulers go on in a step that is skipped."""

        class Poisoned(GradClipTrainer):
            def compute_loss(self, *args, **kwargs):
                return super().compute_loss(*args, **kwargs) * (math.nan if self.state.global_step in (0, 7, 12) else 1)

        found = []
        for name, halves in {
            "read": (True, True),
            "unread": (False, False),
            "to": (True, False),
            "from": (False, True),
        }.items():
            for until, sync in zip((10, 20), halves, strict=True):
                model = tiny_llama()
                optimizer = optim.AdamW(model.parameters(), lr=5e-3, eps=1e-3)
                clip = {"gradient": "zclip:warmup_steps=3,z_threshold=0.5,max_norm=0.5", "skip_sync": sync}
                args = training_args(
                    tmp_path / name, max_steps=until, save_steps=10, save_strategy="steps", lr_scheduler_type="constant"
                )
                trainer = Poisoned(model, args, clip=clip, train_dataset=counting_data(), optimizers=(optimizer, None))
                trainer.train(resume_from_checkpoint=until == 20)
            found.append([p.detach() for p in model.parameters()])
            steps = {optimizer.state[p]["step"].item() for p in model.parameters() if p in optimizer.state}
            assert steps == {20 - 3}, name
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


class Seen(TrainerCallback):
    """The norms of the gradients that the optimizer is about to read."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))


@pytest.mark.parametrize(("accumulation", "limit"), [(1, 0.5), (2, 0.38)])
def test_under_the_trainer_as_the_stock_one_with_torchs_optimizer(tmp_path, accumulation, limit):
    weights, logs = [], []
    for kind in (Trainer, GradClipTrainer):
        model, seen = tiny_llama(), Seen()
        optimizer = (optim if kind is GradClipTrainer else torch.optim).AdamW(model.parameters(), lr=5e-3, eps=1e-3)
        args = training_args(
            tmp_path / kind.__name__, max_steps=10, max_grad_norm=limit, gradient_accumulation_steps=accumulation
        )
        trainer = kind(model, args, train_dataset=counting_data(), optimizers=(optimizer, None), callbacks=[seen])
        trainer.train()
        weights.append([p.detach().clone() for p in model.parameters()])
        logs.append([log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log])
        if kind is GradClipTrainer:
            assert max(seen.norms) > limit * 1.01, "what is read is what backward left"
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    assert 0 < sum(norm > limit for norm in logs[0]) < 10
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

"""attach() over several models and optimizers, and over models that come and go."""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

import hf_gradclip
from hf_gradclip.state import flatten
from hf_gradclip.strategy import SpecError
from hf_gradclip.views.view import UnsupportedBackendError

LIMIT = 1e-3


class Generator(nn.Sequential): ...


class Discriminator(nn.Sequential): ...


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


def two_turns(auto: bool) -> tuple[Accelerator, Any, Any, list[Any], torch.Tensor]:
    """Two layers, an optimizer for each, and the attachment that clips them."""
    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, f"global_norm:max_norm={LIMIT}", auto=auto)
    model, x = two_layers()
    model, *turns = accelerator.prepare(model, *map(sgd, model))
    return accelerator, attachment, model, turns, x


@pytest.mark.parametrize("auto", [True, False])
def test_two_optimizers_that_step_in_turn_are_both_clipped(auto) -> None:
    accelerator, attachment, model, turns, x = two_turns(auto)
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


@pytest.mark.parametrize("in_turn", [True, False])
def test_two_optimizers_are_clipped_without_accelerators_backward(in_turn) -> None:
    """Nobody counts the backward passes then: the gradients of the second one tell whether they are new."""
    _, attachment, model, turns, x = two_turns(auto=True)
    for turn in range(6):
        before = vector(model)
        layer, stepped = (model[turn % 2], [turns[turn % 2]]) if in_turn else (model, turns)
        layer(x).square().sum().backward()
        for optimizer in stepped:
            optimizer.step()
        for optimizer in stepped:
            optimizer.zero_grad(set_to_none=turn < 4)
        assert moved(model, before) == pytest.approx(LIMIT, rel=1e-3)
    assert attachment.clipper.report.summary()["steps"] == 6, "one clip for both where one backward is of both"


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


class TestByModel:
    """attach(accelerator, {model: spec, ...})."""

    @staticmethod
    def gan(when: str, **settings: Any) -> tuple[Any, Any, list[nn.Module], list[Any], Tensor]:
        """A small generator that is limited to LIMIT, and a discriminator that is limited to ten times that."""
        accelerator, (a, x), (b, _) = Accelerator(cpu=True), two_layers(), two_layers()
        a, b = Generator(*a), Discriminator(*b)
        specs = {b: f"global_norm:max_norm={10 * LIMIT}", a: f"global_norm:max_norm={LIMIT}"}
        if when == "before":
            attachment = hf_gradclip.attach(accelerator, specs, **settings)
        a, b, of_a, of_b = accelerator.prepare(a, b, sgd(a), sgd(b))
        if when == "after":
            attachment = hf_gradclip.attach(accelerator, specs, **settings)
        return accelerator, attachment, [a, b], [of_a, of_b], x

    @pytest.mark.parametrize("auto", [True, False])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_each_is_clipped_by_its_own(self, when, auto) -> None:
        accelerator, attachment, models, optimizers, x = self.gan(when, auto=auto)
        for _ in range(3):
            for model, optimizer, limit in zip(models, optimizers, (LIMIT, 10 * LIMIT), strict=True):
                before = vector(model)
                accelerator.backward(model(x).square().sum())
                norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
                if not auto:
                    assert accelerator.clip_grad_norm_(model.parameters(), 1.0) == pytest.approx(norm.item())
                optimizer.step()
                optimizer.zero_grad()
                assert moved(model, before) == pytest.approx(limit, rel=1e-3)
        found = attachment.scalars()
        assert found["clip_Generator/norm_post"] == pytest.approx(LIMIT, rel=1e-3)
        assert found["clip_Discriminator/norm_post"] == pytest.approx(10 * LIMIT, rel=1e-3)
        assert found["clip_Generator/norm_mean"] > 1
        assert not any(key.startswith("clip/") for key in found)

    def test_each_has_a_record(self, tmp_path) -> None:
        from hf_gradclip.record.files import read_record

        accelerator, _, models, optimizers, x = self.gan("before", auto=True, record=tmp_path / "run")
        norms = {"Generator": [], "Discriminator": []}
        for step in range(12):
            for model, optimizer in zip(models, optimizers, strict=True):
                if model is models[0] and step % 3 == 2:
                    continue
                accelerator.backward(model(x).square().sum())
                norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
                norms[type(model).__name__].append(norm.item())
                optimizer.step()
                optimizer.zero_grad()
            if step == 5:
                accelerator.save_state(str(tmp_path / "saved"))
        accelerator.end_training()
        for name, expected in norms.items():
            record = read_record(tmp_path / "run" / name)
            assert record.norm_T.tolist() == pytest.approx(expected)
            assert record.names == ("0.weight", "0.bias", "1.weight", "1.bias")
        assert [len(found) for found in norms.values()] == [8, 12]

    def test_the_state_of_each_comes_back(self, tmp_path) -> None:
        def fit(steps, folder=None):
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
            accelerator, (a, x), (b, _) = Accelerator(cpu=True), two_layers(), two_layers()
            specs = {a: "zclip:warmup_steps=3", b: "autoclip"}
            attachment = hf_gradclip.attach(accelerator, specs, auto=True)
            prepared = accelerator.prepare(a, b, sgd(a), sgd(b))
            if folder is not None:
                accelerator.load_state(str(folder))
            for step in steps:
                for model, optimizer in zip(prepared[:2], prepared[2:], strict=True):
                    accelerator.backward(model(x).square().mean() * (1 + step % 4) * 1e-3)
                    optimizer.step()
                    optimizer.zero_grad()
            return accelerator, [flatten(attachment.clipper_of(model).state) for model in prepared[:2]]

        accelerator, _ = fit(range(6))
        accelerator.save_state(str(tmp_path))
        _, resumed = fit(range(6, 12), tmp_path)
        _, whole = fit(range(12))
        for mine, theirs in zip(resumed, whole, strict=True):
            assert mine
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)

    def test_one_that_is_not_named_is_an_error(self) -> None:
        accelerator, (a, _), (b, _) = Accelerator(cpu=True), two_layers(), two_layers()
        hf_gradclip.attach(accelerator, {a: "adaptive"})
        accelerator.prepare(a)
        with pytest.raises(SpecError, match=r"Sequential was prepared, has trainable"):
            accelerator.prepare(b)

    def test_a_frozen_one_need_not_be_named(self) -> None:
        accelerator, (a, _), (b, _) = Accelerator(cpu=True), two_layers(), two_layers()
        hf_gradclip.attach(accelerator, {a: "adaptive"})
        accelerator.prepare(a, b.requires_grad_(False))

    @pytest.mark.parametrize(
        ("specs", "more", "words"),
        [
            (lambda a, b: {a: "adaptive", "unet": "agc"}, {}, "'unet'.*must be a model"),
            (lambda a, b: {a: "adaptive", b: "agc"}, {"joint": True}, "one norm over all models has one spec"),
            (
                lambda a, b: {a: "adaptive", b: {"gradient": "agc", "update": "value:max_value=1"}},
                {},
                "update is None and .*must be the same for all models",
            ),
            (lambda a, b: {a: "adaptive", b: "adaptiv"}, {}, "adaptiv"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, specs, more, words) -> None:
        (a, _), (b, _) = two_layers(), two_layers()
        with pytest.raises(SpecError, match=words):
            hf_gradclip.attach(Accelerator(cpu=True), specs(a, b), **more)


class TestJoint:
    """attach(accelerator, spec, joint=True)."""

    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize("auto", [True, False])
    def test_one_norm_over_all_models(self, auto, order) -> None:
        """Against torch's clip over the chain of both, steps that clip and steps that do not."""

        def fit(ours: bool) -> tuple[Tensor, list[float], dict[str, float]]:
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
            accelerator, (a, x), (b, _) = Accelerator(cpu=True), two_layers(), two_layers()
            attachment = (
                hf_gradclip.attach(accelerator, "global_norm:max_norm=2", joint=True, auto=auto) if ours else None
            )
            a, b, optimizer = accelerator.prepare(a, b, torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.01))
            norms = []
            for step in range(10):
                accelerator.backward(b(a(x)).square().mean() * (0.01 if step % 2 else 1.0))
                chain = itertools.chain(*(model.parameters() for model in (a, b)[::order]))
                if not (ours and auto):
                    norms.append(float(accelerator.clip_grad_norm_(chain, 2.0)))
                optimizer.step()
                optimizer.zero_grad()
            return torch.cat([vector(a), vector(b)]), norms, attachment.scalars() if ours else {}

        (mine, norms, found), (theirs, expected, _) = fit(True), fit(False)
        assert (mine - theirs).abs().max() < 1e-6
        assert 0 < sum(norm > 2 for norm in expected) < len(expected)
        assert found["clip/norm_mean"] == pytest.approx(sum(expected) / len(expected))
        if not auto:
            assert norms == pytest.approx(expected)

    def test_the_record_names_parameters_by_model(self, tmp_path) -> None:
        from hf_gradclip.record.files import read_record

        accelerator, (a, x), (b, _) = Accelerator(cpu=True), two_layers(), two_layers()
        hf_gradclip.attach(accelerator, "adaptive_norm", joint=True, auto=True, record=tmp_path)
        a, b, optimizer = accelerator.prepare(Generator(*a), Discriminator(*b), sgd(a, b))
        accelerator.backward(b(a(x)).square().mean())
        optimizer.step()
        accelerator.end_training()
        names = read_record(tmp_path).names
        assert names[0] == "Generator.0.weight"
        assert names[-1] == "Discriminator.1.bias"

    def test_a_model_that_comes_later_is_in_it(self, caplog) -> None:
        accelerator, (a, x), (b, _) = Accelerator(cpu=True), two_layers(), two_layers()
        hf_gradclip.attach(accelerator, f"global_norm:max_norm={LIMIT}", joint=True, auto=True)
        a, of_a = accelerator.prepare(a, sgd(a))
        accelerator.backward(a(x).square().sum())
        of_a.step()
        b, of_b = accelerator.prepare(b, sgd(b))
        before = torch.cat([vector(a), vector(b)])
        of_a.zero_grad()
        accelerator.backward(b(a(x)).square().sum())
        of_a.step()
        of_b.step()
        assert float((torch.cat([vector(a), vector(b)]) - before).norm()) == pytest.approx(LIMIT, rel=1e-3)
        assert "start anew" in caplog.text

    def test_a_call_with_one_of_them_says_what_it_must_be(self) -> None:
        accelerator, (a, x), (b, _) = Accelerator(cpu=True), two_layers(), two_layers()
        hf_gradclip.attach(accelerator, "adaptive", joint=True)
        a, b, _ = accelerator.prepare(a, b, sgd(a, b))
        accelerator.backward(b(a(x)).square().sum())
        with pytest.raises(ValueError, match=r"must be all trainable parameters of all prepared models \(joint=True\)"):
            accelerator.clip_grad_norm_(a.parameters(), 1.0)


def test_a_call_over_two_models_is_told_of_joint() -> None:
    accelerator, (a, x), (b, _) = Accelerator(cpu=True), two_layers(), two_layers()
    hf_gradclip.attach(accelerator, "adaptive")
    a, b, _ = accelerator.prepare(a, b, sgd(a, b))
    accelerator.backward(b(a(x)).square().sum())
    with pytest.raises(ValueError, match=r"or use attach\(..., joint=True\) for one norm over all"):
        accelerator.clip_grad_norm_([*a.parameters(), *b.parameters()], 1.0)


def test_models_of_one_spec_are_logged_apart_and_two_of_a_class_by_number() -> None:
    accelerator, (a, x), (b, _) = Accelerator(cpu=True), two_layers(), two_layers()
    attachment = hf_gradclip.attach(accelerator, f"global_norm:max_norm={LIMIT}", auto=True)
    a, b, optimizer = accelerator.prepare(a, b, sgd(a, b))
    accelerator.backward(b(a(x)).square().sum())
    norms = [torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() for model in (a, b)]
    optimizer.step()
    found = attachment.scalars()
    assert found["clip_Sequential/norm_mean"] == pytest.approx(norms[0])
    assert found["clip_Sequential_2/norm_mean"] == pytest.approx(norms[1])


class TestFold:
    """A fused optimizer that does not hold all of what is measured would leave some unclipped."""

    @pytest.mark.parametrize("setting", [{"fold": True}, {"skip_sync": False}])
    def test_a_joint_model_that_comes_later_is_refused(self, setting) -> None:
        accelerator, (a, x), (b, _) = Accelerator(cpu=True), two_layers(), two_layers()
        clip = {"gradient": f"global_norm:max_norm={LIMIT}", **setting}
        hf_gradclip.attach(accelerator, clip, joint=True, auto=True)
        a, of_a = accelerator.prepare(a, torch.optim.SGD(a.parameters(), lr=1.0, fused=True))
        accelerator.backward(a(x).square().sum())
        of_a.step()
        b, of_b = accelerator.prepare(b, torch.optim.SGD(b.parameters(), lr=1.0, fused=True))
        before = vector(b)
        accelerator.backward(b(a(x)).square().sum())
        with pytest.raises(UnsupportedBackendError, match="the optimizer steps 4 parameters and the gradient is of 8"):
            of_b.step()
        assert moved(b, before) == 0

    def test_a_layer_that_another_optimizer_steps_is_refused_when_it_is_unfrozen(self) -> None:
        (model, x) = two_layers()
        model[1].requires_grad_(False)
        optimizer = torch.optim.SGD(model[0].parameters(), lr=1.0, fused=True)
        clipper = hf_gradclip.Clipper.for_model(model, f"global_norm:max_norm={LIMIT}", optimizer=optimizer, fold=True)
        model(x).square().sum().backward()
        clipper.step()
        model[1].requires_grad_(True)
        model(x).square().sum().backward()
        with pytest.raises(UnsupportedBackendError, match="One optimizer must hold all trainable parameters"):
            clipper.step()


def test_a_head_is_left_alone_by_agc_under_joint() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x))

    torch.manual_seed(0)
    accelerator, a, b = Accelerator(cpu=True), Net(), Net()
    hf_gradclip.attach(accelerator, "agc:clip_factor=1e-6", joint=True)
    a, b, _ = accelerator.prepare(a, b, sgd(a, b))
    accelerator.backward(100 * b(a(torch.randn(8, 4))).square().sum())
    before = {(net, name): p.grad.clone() for net in (a, b) for name, p in net.named_parameters()}
    accelerator.clip_grad_norm_([*a.parameters(), *b.parameters()], 1.0)
    for net in (a, b):
        assert torch.equal(net.fc.weight.grad, before[net, "fc.weight"])
        assert net.body.weight.grad.norm() < 1e-3 * before[net, "body.weight"].norm()


@pytest.mark.parametrize("joint", [False, True])
def test_the_record_of_updates_of_two_models(joint, tmp_path) -> None:
    """Their names are told apart, so that the part can be read, and the learning rate of each step is there."""
    from hf_gradclip.record.files import read_record

    accelerator, (a, x), (b, _) = Accelerator(cpu=True), two_layers(), two_layers()
    clip = {"gradient": "adaptive_norm", "update": "adaptive_norm"}
    spec = clip if joint else {a: clip, b: clip}
    hf_gradclip.attach(accelerator, spec, joint=joint, record=tmp_path)
    a, b, optimizer = accelerator.prepare(a, b, torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.01))
    for _ in range(3):
        accelerator.backward(b(a(x)).square().mean())
        for group in [[*a.parameters(), *b.parameters()]] if joint else [a.parameters(), b.parameters()]:
            accelerator.clip_grad_norm_(group, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.end_training()
    first, second = (tmp_path, tmp_path) if joint else (tmp_path / "Sequential", tmp_path / "Sequential_2")
    names = read_record(first, "update").names
    assert names[0] == "Sequential.0.weight"
    assert names[-1] == "Sequential_2.1.bias"
    assert len(set(names)) == 8
    for folder in (first, second):
        assert read_record(folder).learning_rate_T.tolist() == pytest.approx([0.01] * 3)


def test_a_frozen_model_beside_a_joint_one(caplog) -> None:
    accelerator, (a, x), (b, _), (c, _) = Accelerator(cpu=True), two_layers(), two_layers(), two_layers()
    hf_gradclip.attach(accelerator, f"global_norm:max_norm={LIMIT}", joint=True)
    c, a, b, optimizer = accelerator.prepare(c.requires_grad_(False), a, b, sgd(a, b))
    accelerator.backward(c(b(a(x))).square().sum())
    accelerator.clip_grad_norm_([*b.parameters(), *a.parameters()], 1.0)
    before = torch.cat([vector(a), vector(b)])
    optimizer.step()
    assert float((torch.cat([vector(a), vector(b)]) - before).norm()) == pytest.approx(LIMIT, rel=1e-3)


def test_one_model_under_two_keys_is_refused() -> None:
    (a, _) = two_layers()
    wrapped = nn.DataParallel(a)
    with pytest.raises(SpecError, match="Sequential is named twice"):
        hf_gradclip.attach(Accelerator(cpu=True), {a: "adaptive", wrapped: "none"})


def test_a_named_model_that_is_not_prepared_is_said(caplog) -> None:
    accelerator, (a, x), (b, _) = Accelerator(cpu=True), two_layers(), two_layers()
    hf_gradclip.attach(accelerator, {a: "adaptive", b: "agc"}, auto=True)
    a, of_a = accelerator.prepare(a, sgd(a))
    accelerator.backward(a(x).square().sum())
    of_a.step()
    assert "Sequential is named and was not prepared by the first step" in caplog.text


def test_a_clip_call_over_two_models_stands_beside_auto(caplog) -> None:
    """As in a script that `hf-gradclip run` runs: the call gives the norm, and each model is clipped at the step."""
    caplog.set_level("INFO", logger="hf_gradclip")
    accelerator = Accelerator(cpu=True)
    hf_gradclip.attach(accelerator, f"global_norm:max_norm={LIMIT}", auto=True)
    (a, x), (b, _) = two_layers(), two_layers()
    a, b, optimizer = accelerator.prepare(a, b, sgd(a, b))
    for _ in range(3):
        before = vector(a), vector(b)
        accelerator.backward(b(a(x)).square().sum())
        both = [*a.parameters(), *b.parameters()]
        norm = accelerator.clip_grad_norm_(itertools.chain(a.parameters(), b.parameters()), 1.0)
        assert float(norm) == pytest.approx(sum(float(p.grad.double().square().sum()) for p in both) ** 0.5, rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        assert [moved(model, was) for model, was in zip((a, b), before, strict=True)] == pytest.approx(
            [LIMIT] * 2, rel=1e-3
        )
    assert caplog.text.count("with auto=True every step is clipped when it is made") == 1
    assert "changed in place" not in caplog.text

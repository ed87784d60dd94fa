"""A fused optimizer that takes coefficient and skip flag: the same run as with written gradients, and the refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_gradclip import ClipConfig, Clipper, GradClipTrainer
from hf_gradclip.clipper import NonFiniteError
from hf_gradclip.strategy import SpecError
from hf_gradclip.views import view_of
from hf_gradclip.views.view import UnsupportedBackendError
from tests.integrations.loops import batches
from tests.kernels.languages import serving
from tests.tiny import SkipThird, logged, tiny_llama, train, weights_of

FUSED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.1, fused=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9, fused=True),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2, fused=True),
}


def fit(name: str, spec: Any, poison: tuple[int, ...] = (), **settings: Any) -> tuple[Tensor, Clipper, Any]:
    model = tiny_llama()
    optimizer = FUSED[name](model.parameters())
    clipper = Clipper.for_model(model, spec, optimizer=optimizer, **settings)
    for batch, factor in batches(20, poison):
        (model(**batch).loss * factor).backward()
        before = [p.grad.clone() for p in model.parameters()]
        clipper.step()
        if settings.get("fold") and factor == factor:
            grads = [p.grad for p in model.parameters()]
            assert all(map(torch.equal, grads, before)), "no gradient was written before the step"
        optimizer.step()
        assert getattr(optimizer, "grad_scale", None) is None, "handed over for one step only"
        assert getattr(optimizer, "found_inf", None) is None
        optimizer.zero_grad()
    return weights_of(model), clipper, optimizer


@pytest.mark.parametrize("spec", ["global_norm:max_norm=0.5", "zclip:warmup_steps=4,z_threshold=0.5,max_norm=0.5"])
@pytest.mark.parametrize("name", FUSED)
def test_folded_equals_written(name, spec) -> None:
    written, clipper, _ = fit(name, spec)
    folded, other, _ = fit(name, spec, fold=True)
    free, _, _ = fit(name, "none")
    assert (written - folded).abs().max() < 1e-6
    assert (written - free).abs().max() > 1e-4
    assert 0 < clipper.report.summary()["clipped"] == other.report.summary()["clipped"] < 20


@pytest.mark.parametrize("spec", ["zclip:warmup_steps=4,z_threshold=0.5", SkipThird()])
@pytest.mark.parametrize("name", FUSED)
def test_an_unread_skip_moves_nothing(name, spec) -> None:
    """The flag and the early return of the step give the same weights, moments and counters, bit for bit.

    The first step is skipped too, in which torch's fused SGD would leave its momentum as whatever was in the memory.
    """
    poison = (0, 7, 11) if isinstance(spec, str) else ()
    read, clipper, one = fit(name, spec, poison)
    unread, other, two = fit(name, spec, poison, skip_sync=False)
    assert torch.equal(read, unread)
    for mine, theirs in zip(one.state.values(), two.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine if torch.is_tensor(mine[key]))
    assert not other.step_was_skipped
    counts = other.report.summary()
    assert counts["skipped"] == clipper.report.summary()["skipped"] == max(len(poison), 1)
    assert counts["nonfinite"] == len(poison)


def test_too_many_unread_skips_stop_the_run_when_logging() -> None:
    clip = {"gradient": "none", "skip_sync": False, "max_consecutive_skips": 3}
    _, clipper, _ = fit("AdamW", clip, poison=(3, 4))
    clipper.check_skips()
    _, clipper, _ = fit("AdamW", clip, poison=(3, 4, 5, 6))
    with pytest.raises(NonFiniteError, match=r"4 steps in a row were skipped \(max_consecutive_skips=3\)"):
        clipper.check_skips()
    clipper.check_skips()


def one_weight(**settings: Any) -> tuple[torch.nn.Parameter, Clipper, Any]:
    model = torch.nn.Linear(5, 5, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    return model.weight, Clipper.for_model(model, optimizer=optimizer, skip_sync=False, **settings), optimizer


def test_too_many_unread_skips_stop_a_loop_that_never_asks() -> None:
    weight, clipper, optimizer = one_weight(spec="none", max_consecutive_skips=5)
    weight.grad = torch.full((5, 5), float("nan"))
    for _ in range(49):
        clipper.step()
        optimizer.step()
    with pytest.raises(NonFiniteError, match=r"50 steps in a row were skipped \(max_consecutive_skips=5\)"):
        clipper.step()


def test_an_unread_skip_is_read_by_who_asks() -> None:
    weight, clipper, optimizer = one_weight(spec="none")
    found = []
    for number in (1.0, float("nan"), 1.0):
        weight.grad = torch.full((5, 5), number)
        clipper.step()
        optimizer.step()
        found.append(clipper.step_was_skipped)
    assert found == [False, True, False]


def test_a_checkpoint_keeps_how_many_were_skipped_unread() -> None:
    weight, clipper, _ = one_weight(spec="none", max_consecutive_skips=5)
    weight.grad = torch.full((5, 5), float("nan"))
    for _ in range(3):
        clipper.step()
    saved = clipper.state_dict()
    weight, other, _ = one_weight(spec="none", max_consecutive_skips=5)
    other.load_state_dict(saved)
    weight.grad = torch.full((5, 5), float("nan"))
    other.step()
    other.check_skips()
    other.step()
    with pytest.raises(NonFiniteError, match="5 steps in a row were skipped"):
        other.check_skips()


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", ["C", "torch"])
def test_a_large_finite_gradient_is_clipped_and_not_skipped(name, fold) -> None:
    with serving(name):
        weight, clipper, optimizer = one_weight(spec="global_norm:max_norm=1", fold=fold)
        for number in (1e25, -1e30, 3.0):
            weight.grad = torch.full((5, 5), number)
            before = weight.detach().clone()
            assert clipper.step().item() == pytest.approx(5 * abs(number))
            optimizer.step()
            torch.testing.assert_close(before - weight.detach(), torch.full((5, 5), 0.2 if number > 0 else -0.2))
        assert clipper.report.summary()["skipped"] == 0


def test_the_trainer_folds_and_its_scheduler_goes_on() -> None:
    def poisoned(cls: type) -> type:
        class Poisoned(cls):
            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                return loss * float("nan") if self.state.global_step == 8 else loss

        return Poisoned

    runs = {}
    for word, more in {"written": {}, "folded": {"fold": True}, "unread": {"fold": True, "skip_sync": False}}.items():
        clip = {"gradient": "zclip:warmup_steps=5,z_threshold=0.5,max_norm=0.5", **more}
        settings = {"max_steps": 20, "lr_scheduler_type": "constant"}
        runs[word] = train(poisoned(GradClipTrainer), clip=clip, **settings)
    weights = {word: weights_of(run.model) for word, run in runs.items()}
    assert (weights["written"] - weights["folded"]).abs().max() < 1e-6
    assert (weights["written"] - weights["unread"]).abs().max() < 1e-6
    assert 0 < sum(logged(runs["folded"], "clip/rate")) < 20
    assert [run.lr_scheduler.last_epoch for run in runs.values()] == [19, 19, 20]


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        ("adagc", "fold=True with adagc: .*one number for all.*Use a strategy of the whole gradient"),
        ("zclip+value:max_value=1", "fold=True with value"),
        ("param_norm:max_norm=1", "fold=True with param_norm"),
    ],
)
def test_strategies_of_more_than_one_number_are_refused(clip, words) -> None:
    model = tiny_llama()
    with pytest.raises(SpecError, match=words):
        Clipper.for_model(model, clip, optimizer=FUSED["AdamW"](model.parameters()), fold=True)


def test_optimizers_that_cannot_are_refused() -> None:
    model = tiny_llama()
    for optimizer in (torch.optim.AdamW(model.parameters()), torch.optim.RMSprop(model.parameters())):
        with pytest.raises(UnsupportedBackendError, match=r"fold=True with .*must be .*fused=True.*Use fold=False"):
            Clipper.for_model(model, "zclip", optimizer=optimizer, fold=True)
    with pytest.raises(SpecError, match=r"fold=True: needs the optimizer.*model, spec, optimizer=optimizer\)"):
        Clipper.for_model(model, "zclip", fold=True)
    with pytest.raises(UnsupportedBackendError, match=r"skip_sync=False with .*Use skip_sync=True"):
        Clipper.for_model(model, "zclip", optimizer=torch.optim.AdamW(model.parameters()), skip_sync=False)
    some = FUSED["AdamW"](list(model.parameters())[:3])
    with pytest.raises(UnsupportedBackendError, match="steps 3 parameters and the gradient is of 21"):
        Clipper.for_model(model, "zclip", optimizer=some, fold=True)
    damped = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    with pytest.raises(UnsupportedBackendError, match=r"with SGD\(momentum=\.\.\., dampening=.*Set dampening=0"):
        Clipper.for_model(model, "zclip", optimizer=damped, skip_sync=False)
    guarded = Clipper(ClipConfig.parse("zclip", fold=True), view_of(model, guarded=True))
    with pytest.raises(UnsupportedBackendError, match="fold=True under a GradScaler"):
        guarded.fold_into(FUSED["AdamW"](model.parameters()))


def test_raising_needs_the_flag() -> None:
    with pytest.raises(SpecError, match=r"nonfinite='raise', skip_sync=False"):
        ClipConfig.parse("zclip", nonfinite="raise", skip_sync=False)
    with pytest.raises(SpecError, match=r"ClipConfig\(fold='yes'\): must be true or false"):
        ClipConfig.parse({"gradient": "zclip", "fold": "yes"})


def test_an_update_needs_the_optimizer() -> None:
    with pytest.raises(SpecError, match=r"an update is known to the optimizer only.*update_clip"):
        Clipper.for_model(tiny_llama(), {"gradient": "zclip", "update": "block_rms"})

"""The clipper in a plain torch loop: exact skips, policies, chains, checkpoints, and what is logged."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_gradclip import ClipConfig, Clipper, Strategy
from hf_gradclip.clipper import NonFiniteError
from hf_gradclip.report import ClipReport
from hf_gradclip.state import flatten
from hf_gradclip.strategy import Needs, SpecError, Stateless, Units
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views import view_of
from hf_gradclip.views.view import UnsupportedBackendError


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def batch(step: int) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(batch(step)).square().mean() * 10


def backward(model: nn.Module, step: int, poison: float | None = None) -> None:
    """A real backward pass; `poison` is put into one element of the last weight's gradient."""
    loss_of(model, step).backward()
    if poison is not None:
        model[2].weight.grad[1, 3] = poison


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of every weight and of everything the optimizer keeps, step counters too."""
    tensors = list(model.parameters())
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def vector(*values: float) -> nn.Module:
    """A model with one parameter `w` whose gradient is given."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(len(values)))
    model.w.grad = torch.tensor(values)
    return model


def pair(a: list[float], b: list[float]) -> nn.Module:
    """A model with the parameters `a` and `b` whose gradients are given."""
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(len(a))), nn.Parameter(torch.zeros(len(b)))
    model.a.grad, model.b.grad = torch.tensor(a), torch.tensor(b)
    return model


class TestSkip:
    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(
        "spec",
        ["zclip", "none", "global_norm:max_norm=1+value:max_value=0.01", "adaptive", "adaptive_tensors"],
    )
    def test_a_non_finite_step_moves_nothing(self, spec, poison):
        """No weight, no moment, no decay, no step counter; the run goes on as if the batch had not been."""
        model, twin = mlp(), mlp()
        optimizer, other = (torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1) for m in (model, twin))
        clipper, clipper_of_twin = Clipper.for_model(model, spec), Clipper.for_model(twin, spec)
        for step in range(6):
            if step in (2, 4):
                before = snapshot(model, optimizer)
                assert len(before) == 4 + 3 * 4
                backward(model, step, poison)
                clipper.step()
                assert clipper.step_was_skipped
                optimizer.step()
                optimizer.zero_grad()
                assert equal(before, snapshot(model, optimizer))
                continue
            for m, o, c in ((model, optimizer, clipper), (twin, other, clipper_of_twin)):
                before = snapshot(m, o)
                backward(m, step)
                c.step()
                assert not c.step_was_skipped
                o.step()
                o.zero_grad()
                assert not equal(before, snapshot(m, o))
        assert equal(snapshot(model, optimizer), snapshot(twin, other))
        a, b = flatten(clipper.state), flatten(clipper_of_twin.state)
        assert all(torch.equal(a[key], b[key]) for key in a)

    def test_a_zeroed_gradient_would_not_be_a_skip(self):
        """What the exact skip is for: AdamW moves on a gradient of zeros."""
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        backward(model, 0)
        optimizer.step()
        before = snapshot(model, optimizer)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        assert not equal(before, snapshot(model, optimizer))

    def test_max_consecutive_skips(self):
        model = mlp()
        clipper = Clipper.for_model(model, "zclip", max_consecutive_skips=3)
        for step in range(2):
            backward(model, step, math.nan)
            clipper.step()
        backward(model, 2, math.nan)
        with pytest.raises(NonFiniteError) as error:
            clipper.step()
        assert str(error.value) == (
            "Step 3: 3 steps in a row were skipped (max_consecutive_skips=3), the last because of a NaN or inf norm. "
            "Not finite: 2.weight. No weight has moved since. Lower the learning rate, look at the data of these "
            "steps, or raise it."
        )

    def test_a_good_step_starts_the_count_anew(self):
        model = mlp()
        clipper = Clipper.for_model(model, "none", max_consecutive_skips=3)
        for step in range(20):
            backward(model, step, math.nan if step % 3 else None)
            clipper.step()
            model.zero_grad()

    def test_the_limit_is_20(self):
        model = vector(math.nan)
        clipper = Clipper.for_model(model, "none")
        for _ in range(19):
            model.w.grad = torch.tensor([math.nan])
            clipper.step()
        model.w.grad = torch.tensor([math.nan])
        with pytest.raises(NonFiniteError, match=r"20 steps in a row .* Not finite: w\."):
            clipper.step()

    def test_a_strategys_own_skip(self):
        """It drops the gradients, commits its state, counts against the limit and says who asked."""
        model = vector(3.0)
        clipper = Clipper.for_model(model, Picky(), max_consecutive_skips=2)
        clipper.step()
        assert clipper.step_was_skipped
        assert model.w.grad is None
        model.w.grad = torch.tensor([1.0])
        clipper.step()
        assert not clipper.step_was_skipped
        assert model.w.grad.item() == 1
        model.w.grad = torch.tensor([3.0])
        clipper.step()
        model.w.grad = torch.tensor([3.0])
        with pytest.raises(NonFiniteError, match=r"2 steps in a row .* because of .*Picky asked for it"):
            clipper.step()
        scalars = clipper.report.scalars()
        assert (scalars["clip/skipped"], scalars["clip/nonfinite"]) == (3, 0)

    @pytest.mark.parametrize("read", [True, False])
    def test_an_unfrozen_layer_does_not_end_a_row(self, read):
        """Three skipped steps, a layer that is unfrozen, a fourth."""
        model = mlp()
        model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        clipper = Clipper.for_model(
            model, "adaptive_norm", optimizer=optimizer, max_consecutive_skips=4, skip_sync=read
        )
        for step in range(3):
            backward(model, step, math.nan)
            clipper.step()
            clipper.check_skips()
        model[0].requires_grad_(True)
        backward(model, 3, math.nan)
        with pytest.raises(NonFiniteError, match="4 steps in a row were skipped"):  # noqa: PT012
            clipper.step()
            clipper.check_skips()


@dataclass(frozen=True)
class Picky(Strategy):
    """Skips every step whose norm is above 2."""

    needs = Needs()

    def init(self, layout):
        return Stateless()

    def update(self, stats, state):
        return ClipPlan(stats.sumsq_S.new_ones(()), skip=stats.total > 2), state


@dataclass(frozen=True)
class Odd(Strategy):
    """With a state or a scale that is no tensor."""

    state: str

    needs = Needs()

    def init(self, layout):
        return {"float": (layout.numel_S, 1.0), "dict": {"last": layout.numel_S}, "scale": Stateless()}[self.state]

    def update(self, stats, state):
        return ClipPlan(0.5), state


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("float", r"Odd\.init\(\): a state is of tensors in \(named\) tuples, and this one has a float at '1'"),
        ("dict", r"Odd\.init\(\): .* this one has a dict\."),
        ("scale", r"ClipPlan\(scale_S=0\.5\): must be a tensor"),
    ],
)
def test_a_strategy_of_ones_own_whose_numbers_are_no_tensors(kind, words):
    model = mlp()
    backward(model, 0)
    with pytest.raises(TypeError, match=words):
        Clipper.for_model(model, Odd(kind)).step()


def test_a_strategy_of_ones_own_that_names_no_fields_is_refused_before_it_trains():
    class Misnamed(Picky):
        remembers_by = "log_norm"

    with pytest.raises(TypeError, match=r"Misnamed\.remembers_by='log_norm': must be names of its fields"):
        Clipper.for_model(mlp(), Misnamed())


class TestRaiseAndPass:
    def test_raise_names_the_norm_and_the_parameters(self):
        model = mlp()
        clipper = Clipper.for_model(model, "zclip", nonfinite="raise")
        backward(model, 0)
        clipper.step()
        model.zero_grad()
        backward(model, 1, math.inf)
        model[0].bias.grad[0] = math.nan
        with pytest.raises(NonFiniteError) as error:
            clipper.step()
        text = str(error.value)
        assert text.startswith("The gradient norm is nan in step 2, and nonfinite='raise'. Not finite: ")
        assert "2.weight" in text
        assert "0.bias" in text
        assert "0.weight" not in text
        assert "nonfinite='skip'" in text

    def test_raise_names_five_at_most(self):
        model = nn.Module()
        for i in range(8):
            model.register_parameter(f"p{i}", nn.Parameter(torch.zeros(1)))
            model.get_parameter(f"p{i}").grad = torch.tensor([math.nan])
        with pytest.raises(NonFiniteError, match=r"p0, p1, p2, p3, p4 and 3 more\."):
            Clipper.for_model(model, "none", nonfinite="raise").step()

    def test_pass_leaves_the_gradients_as_they_are(self):
        model = vector(3.0, math.nan, 4.0)
        clipper = Clipper.for_model(model, "global_norm:max_norm=1", nonfinite="pass", max_consecutive_skips=1)
        for _ in range(3):
            assert clipper.step().isnan()
            assert not clipper.step_was_skipped
        assert model.w.grad[[0, 2]].tolist() == [3.0, 4.0]
        assert model.w.grad[1].isnan()
        scalars = clipper.report.scalars()
        assert (scalars["clip/nonfinite"], scalars["clip/skipped"]) == (3, 0)

    def test_max_grad_norm_passes_like_the_stock_trainer(self):
        model = vector(math.inf)
        clipper = Clipper(ClipConfig.parse(None, max_grad_norm=1.0), view_of(model))
        clipper.step()
        assert model.w.grad.item() == math.inf


class TestGradScaler:
    def test_an_overflow_is_the_scalers_business(self):
        """It skips and lowers its scale; nothing is decided, dropped or counted against a limit."""
        model, twin = mlp(), mlp()
        optimizer, other = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
        view = view_of(model, unscale=lambda: scaler.unscale_(optimizer), guarded=True)
        spec = "zclip:warmup_steps=3,max_norm=0.5"
        clipper = Clipper(ClipConfig.parse(spec, max_consecutive_skips=1), view)
        plain = Clipper.for_model(twin, spec)
        clipped = 0
        for step in range(12):
            overflow = step in (4, 8, 9)
            before, scale = snapshot(model, optimizer), scaler.get_scale()
            scaler.scale(loss_of(model, step)).backward()
            if overflow:
                model[2].weight.grad[1, 3] = math.inf
            norm = clipper.step()
            assert clipper.step_was_skipped == overflow
            assert norm.isfinite() != overflow
            if overflow:
                assert all(p.grad is not None for p in model.parameters())
            else:
                backward(twin, step)
                assert plain.step().item() == pytest.approx(norm.item(), rel=1e-5)
                for a, b in zip(model.parameters(), twin.parameters(), strict=True):
                    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)
                clipped += norm.item() > 0.5
                other.step()
                other.zero_grad()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert equal(before, snapshot(model, optimizer)) == overflow
            assert (scaler.get_scale() == scale / 2) == overflow
        assert clipped > 0
        a, b = flatten(clipper.state), flatten(plain.state)
        for key, value in a.items():
            torch.testing.assert_close(value, b[key], rtol=1e-4, atol=1e-4 if "logs" in key else 0)
        scalars = clipper.report.scalars()
        assert (scalars["clip/skipped"], scalars["clip/nonfinite"]) == (3, 3)


class TestStep:
    def test_sgd_moves_no_further_than_the_limit(self):
        model = mlp()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        clipper = Clipper.for_model(model, "global_norm:max_norm=1e-12")
        for step in range(5):
            before = [p.detach().double().clone() for p in model.parameters()]
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            clipper.step()
            optimizer.step()
            moved = [p.detach().double() - b for p, b in zip(model.parameters(), before, strict=True)]
            length = math.sqrt(sum(float(m.square().sum()) for m in moved))
            assert 0.4e-12 < length <= 0.5e-12 * (1 + 1e-5)

    def test_decide_writes_nothing_and_step_returns_the_norm_before(self):
        model = vector(3.0, 4.0)
        clipper = Clipper.for_model(model, "global_norm:max_norm=1")
        decision = clipper.decide()
        assert model.w.grad.tolist() == [3.0, 4.0]
        assert decision.stats.total.item() == 5
        norm = clipper.step()
        assert norm.shape == ()
        assert norm.item() == 5
        assert model.w.grad.norm().item() == pytest.approx(1, rel=1e-5)

    def test_reset_forgets(self):
        model = vector(3.0, 4.0)
        clipper = Clipper.for_model(model, "zclip")
        fresh = {key: value.clone() for key, value in flatten(clipper.state).items()}
        clipper.step()
        assert not torch.equal(flatten(clipper.state)["seen"], fresh["seen"])
        clipper.reset()
        assert all(torch.equal(flatten(clipper.state)[key], fresh[key]) for key in fresh)
        assert clipper.report.scalars() == {}

    def test_repr_says_what_is_in_force(self):
        text = repr(Clipper.for_model(mlp(), "global_norm:max_norm=2"))
        assert "global_norm:max_norm=2,norm_type=2" in text
        assert "4 segments" in text
        assert "cpu" in text


class TestChain:
    """`a+b`: b sees the statistics as a leaves them, and the scales multiply. a = [3, 4], b = [0, 12], n = 13."""

    def grads(self, spec: str) -> tuple[np.ndarray, np.ndarray]:
        model = pair([3.0, 4.0], [0.0, 12.0])
        assert Clipper.for_model(model, spec).step().item() == pytest.approx(13)
        return model.a.grad.double().numpy(), model.b.grad.double().numpy()

    def test_global_norm_then_param_norm(self):
        """6.5 / 13 halves all: norms 2.5 and 6, the second is brought to 5."""
        a, b = self.grads("global_norm:max_norm=6.5+param_norm:max_norm=5")
        np.testing.assert_allclose(a, [1.5, 2], rtol=1e-6)
        np.testing.assert_allclose(b, [0, 5], rtol=1e-6)

    def test_param_norm_then_global_norm(self):
        """Norms 5 and 5, 7.07 together, brought to 6.5."""
        a, b = self.grads("param_norm:max_norm=5+global_norm:max_norm=6.5")
        scale = 6.5 / math.hypot(5, 5)
        np.testing.assert_allclose(a, np.array([3, 4]) * scale, rtol=1e-6)
        np.testing.assert_allclose(b, np.array([0, 5]) * scale, rtol=1e-6)

    def test_global_norm_of_the_largest_element_then_value(self):
        """3 / 12 quarters all; then elements of 0.75, 1, 3 are bounded at 2."""
        a, b = self.grads("global_norm:max_norm=3,norm_type=inf+value:max_value=2")
        np.testing.assert_allclose(a, [0.75, 1], rtol=1e-6)
        np.testing.assert_allclose(b, [0, 2], rtol=1e-6)

    def test_value_alone_at_the_end_is_not_needed_when_the_first_brings_the_elements_below(self):
        model = pair([3.0, 4.0], [0.0, 12.0])
        clipper = Clipper.for_model(model, "global_norm:max_norm=1.3+value:max_value=2")
        clipper.step()
        np.testing.assert_allclose(model.b.grad.numpy(), [0, 1.2], rtol=1e-6)
        assert clipper.report.scalars()["clip/norm_post"] == pytest.approx(1.3, rel=1e-6)

    def test_the_second_ones_state_is_of_the_norms_after_the_first(self):
        """zclip collects what global_norm leaves: never more than 2; alone it collects the raw norms."""
        norms = [1.0, 8.0, 1.5, 4.0, 1.2]
        expected = {"global_norm:max_norm=2+zclip:max_norm=inf": np.minimum(norms, 2), "zclip:max_norm=inf": norms}
        for spec, collected in expected.items():
            model = vector(0.0)
            clipper = Clipper.for_model(model, spec)
            for norm in norms:
                model.w.grad = torch.tensor([norm])
                clipper.step()
            flat = flatten(clipper.state)
            prefix = "1." if "+" in spec else ""
            assert flat[f"{prefix}mean"].item() == pytest.approx(np.mean(collected), rel=1e-5)
            assert flat[f"{prefix}var"].item() == pytest.approx(np.var(collected), rel=1e-5)

    def test_threshold_is_logged_only_where_one_part_has_one(self):
        for spec, threshold in (
            ("global_norm:max_norm=6.5+adagc", 6.5),
            ("none+param_norm:max_norm=5", 5),
            ("global_norm:max_norm=6.5+param_norm:max_norm=5", None),
            ("adagc+none", None),
        ):
            clipper = Clipper.for_model(pair([3.0, 4.0], [0.0, 12.0]), spec)
            clipper.step()
            assert clipper.report.scalars().get("clip/threshold") == threshold


class TestCheckpoint:
    def trained(self, spec: str, model: nn.Module | None = None) -> Clipper:
        model = model or mlp()
        clipper = Clipper.for_model(model, spec)
        for step in range(5):
            backward(model, step)
            clipper.step()
            model.zero_grad()
        return clipper

    def test_the_same_strategy(self):
        saved = self.trained("zclip").state_dict()
        clipper = Clipper.for_model(mlp(), "zclip")
        assert clipper.load_state_dict(saved) == ""
        assert clipper.state.seen.item() == 5
        assert clipper.state.mean.item() > 0

    @pytest.mark.parametrize(
        ("spec", "later", "needed"),
        [
            ("zclip", {"past.seen", "past.logs"}, "mean"),
            ("adagc", {"past.seen", "past.logs"}, "gamma_S"),
            ("autoclip", {"past.seen", "past.logs"}, "norms"),
            ("skip_step", {"past.seen", "past.logs", "row"}, "norms"),
            ("none+zclip", {"1.past.seen", "1.past.logs"}, "1.mean"),
        ],
    )
    def test_a_state_of_before_the_past_was_kept_goes_on(self, spec, later, needed):
        """With a past in which nothing was seen; without a number that there always was it starts anew."""
        saved = self.trained(spec).state_dict()
        kept = {key: value for key, value in saved["state"].items() if key not in later}
        assert saved["state"].keys() - kept.keys() == later
        clipper = Clipper.for_model(mlp(), spec)
        fresh = {key: value.clone() for key, value in flatten(clipper.state).items()}
        assert clipper.load_state_dict({**saved, "state": kept}) == ""
        for key, value in flatten(clipper.state).items():
            assert torch.equal(value, fresh[key] if key in later else saved["state"][key]), key
        del kept[needed]
        assert clipper.load_state_dict({**saved, "state": kept}).endswith("starts anew.")
        assert all(torch.equal(value, fresh[key]) for key, value in flatten(clipper.state).items())

    def test_another_strategy_starts_anew(self):
        saved = self.trained("adagc:beta=0.5").state_dict()
        clipper = Clipper.for_model(mlp(), "zclip:alpha=0.5")
        message = clipper.load_state_dict(saved)
        assert message.startswith("The checkpoint's clip state is of adagc:lambda_rel=1.04,beta=0.5,")
        assert "so zclip:z_threshold=2.5,alpha=0.5," in message
        assert message.endswith("starts anew.")
        assert clipper.state.seen.item() == 0

    def test_other_parameters_start_anew(self):
        saved = self.trained("adagc").state_dict()
        other = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2), nn.Linear(2, 2))
        clipper = Clipper.for_model(other, "adagc")
        message = clipper.load_state_dict(saved)
        assert message.startswith("The checkpoint's clip state is of other trainable parameters, so adagc:")
        assert message.endswith("starts anew.")
        assert clipper.state.seen.item() == 0
        assert clipper.state.gamma_S.shape == (6,)

    def test_changed_fields_go_on(self):
        saved = self.trained("zclip:z_threshold=3").state_dict()
        clipper = Clipper.for_model(mlp(), "zclip")
        message = clipper.load_state_dict(saved)
        assert message.startswith("The checkpoint was made with zclip:z_threshold=3,")
        assert "its statistics go on under zclip:z_threshold=2.5," in message
        assert clipper.state.seen.item() == 5

    def test_a_state_of_another_size_starts_anew(self):
        saved = self.trained("autoclip:window=7").state_dict()
        clipper = Clipper.for_model(mlp(), "autoclip:window=9")
        message = clipper.load_state_dict(saved)
        assert "autoclip:percentile=10,window=7, of another size" in message
        assert message.endswith("starts anew.")
        assert clipper.state.norms.shape == (9,)
        assert clipper.state.seen.item() == 0

    def test_another_chain_of_the_same_shape_starts_anew(self):
        saved = self.trained("zclip+none").state_dict()
        clipper = Clipper.for_model(mlp(), "zclip+none")
        assert clipper.load_state_dict(saved) == ""
        assert clipper.state[0].seen.item() == 5
        clipper = Clipper.for_model(mlp(), "adagc+none")
        assert clipper.load_state_dict(saved).endswith("starts anew.")
        assert clipper.state[0].seen.item() == 0

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("autoclip:window=4+soft", "mean_sigma:window=4,min_values=3+soft"),
            ("*=autoclip:window=4", "*=mean_sigma:window=4,min_values=3"),
            ("skip_step", "skip_step:log_norm=true"),
            ("skip_step:log_norm=true+none", "skip_step+none"),
        ],
    )
    def test_numbers_that_mean_something_else_are_not_taken(self, before, after):
        """Though names and sizes are the same."""
        saved, clipper = self.trained(before).state_dict(), Clipper.for_model(mlp(), after)
        assert {key: value.shape for key, value in saved["state"].items()} == {
            key: value.shape for key, value in flatten(clipper.state).items()
        }
        fresh = {key: value.clone() for key, value in flatten(clipper.state).items()}
        assert clipper.load_state_dict(saved).endswith("starts anew.")
        assert all(torch.equal(value, fresh[key]) for key, value in flatten(clipper.state).items())
        del saved["parts"]
        assert clipper.load_state_dict(saved).endswith("starts anew."), "by the spec that it was made with"

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("adaptive_norm+agc", "adaptive_norm+value:max_value=1"),
            ("zclip+soft", "zclip:alpha=0.5+none"),
            ("*weight=zclip;*=none", "*weight=zclip;*=1.0"),
            ("skip_step:log_norm=true", "skip_step:log_norm=true,sigmas=3"),
        ],
    )
    def test_another_part_that_remembers_nothing_is_no_reason_to_forget(self, before, after):
        saved, clipper = self.trained(before).state_dict(), Clipper.for_model(mlp(), after)
        for part in saved["parts"].values():
            part.pop("log_norm", None)  # as of a version that did not know that the field decides
        assert "its statistics go on under" in clipper.load_state_dict(saved)
        for key, value in flatten(clipper.state).items():
            assert torch.equal(value, saved["state"][key]), key

    @pytest.mark.parametrize("saved", [{}, {"spec": "zclip"}, {"state": {}}])
    def test_what_cannot_be_read_starts_anew(self, saved):
        clipper = Clipper.for_model(mlp(), "zclip")
        assert clipper.load_state_dict(saved) == "The saved clip state cannot be read, so zclip starts anew."
        assert clipper.state.seen.item() == 0

    def test_skips_in_a_row_are_kept(self):
        model = vector(math.nan)
        clipper = Clipper.for_model(model, "none", max_consecutive_skips=2)
        clipper.step()
        resumed_model = vector(math.nan)
        resumed = Clipper.for_model(resumed_model, "none", max_consecutive_skips=2)
        resumed.load_state_dict(clipper.state_dict())
        with pytest.raises(NonFiniteError, match="2 steps in a row"):
            resumed.step()

    def test_a_wrapped_model_reads_the_state_of_a_plain_one(self):
        saved = self.trained("adagc").state_dict()
        clipper = Clipper.for_model(torch.compile(nn.DataParallel(mlp())), "adagc")
        assert clipper.load_state_dict(saved) == ""
        assert clipper.state.seen.item() == 5


class TestReport:
    def run(self, clipper: Clipper, model: nn.Module, steps: list[tuple[list[float], list[float]]]) -> None:
        for a, b in steps:
            model.a.grad, model.b.grad = torch.tensor(a, dtype=torch.float), torch.tensor(b, dtype=torch.float)
            clipper.step()

    def test_by_hand(self):
        """Norms 13, 5, NaN, 10 against a limit of 5 per tensor."""
        model = pair([0.0, 0.0], [0.0, 0.0])
        clipper = Clipper.for_model(model, "param_norm:max_norm=5.5")
        nan = math.nan
        self.run(clipper, model, [([3, 4], [0, 12]), ([3, 0], [0, 4]), ([3, nan], [1, 1]), ([6, 0], [0, 8])])
        assert clipper.report.scalars() == pytest.approx(
            {
                "clip/norm_mean": (13 + 5 + 10) / 3,
                "clip/norm_max": 13,
                "clip/norm_post": math.hypot(5.5, 5.5),
                "clip/scale": math.hypot(5.5, 5.5) / 10,
                "clip/threshold": 5.5,
                "clip/rate": 2 / 4,
                "clip/tensor_rate": 3 / 8,
                "clip/skipped": 1,
                "clip/nonfinite": 1,
            },
            rel=1e-6,
        )

    def test_counts_are_since_the_last_read(self):
        model = pair([0.0, 0.0], [0.0, 0.0])
        clipper = Clipper.for_model(model, "global_norm:max_norm=6.5")
        assert clipper.report.scalars() == {}
        self.run(clipper, model, [([3, 4], [0, 12]), ([3, math.inf], [0, 4])])
        first = clipper.report.scalars()
        assert (first["clip/rate"], first["clip/nonfinite"], first["clip/norm_max"]) == (0.5, 1, 13)
        self.run(clipper, model, [([3, 0], [0, 4]), ([0, 0], [0, 1])])
        assert clipper.report.scalars() == pytest.approx(
            {
                "clip/norm_mean": 3,
                "clip/norm_max": 5,
                "clip/norm_post": 1,
                "clip/scale": 1,
                "clip/threshold": 6.5,
                "clip/rate": 0,
                "clip/tensor_rate": 0,
                "clip/skipped": 0,
                "clip/nonfinite": 0,
            },
            rel=1e-6,
        )
        assert clipper.report.scalars() == {}

    def test_where_elements_were_bounded_the_norm_after_is_not_known(self):
        model = pair([0.0, 0.0], [0.0, 0.0])
        clipper = Clipper.for_model(model, "value:max_value=3.5")
        self.run(clipper, model, [([3, 4], [0, 3])])
        bounded = clipper.report.scalars()
        assert "clip/norm_post" not in bounded
        assert "clip/scale" not in bounded
        assert (bounded["clip/rate"], bounded["clip/tensor_rate"], bounded["clip/threshold"]) == (1, 0.5, 3.5)
        self.run(clipper, model, [([3, 0], [0, 0])])
        free = clipper.report.scalars()
        assert (free["clip/norm_post"], free["clip/scale"], free["clip/rate"]) == (3, 1, 0)

    def test_only_non_finite_steps(self):
        model = pair([0.0, 0.0], [0.0, 0.0])
        clipper = Clipper.for_model(model, "global_norm:max_norm=6.5")
        self.run(clipper, model, [([3, math.nan], [0, 12])] * 2)
        assert clipper.report.scalars() == {
            "clip/rate": 0,
            "clip/tensor_rate": 0,
            "clip/skipped": 2,
            "clip/nonfinite": 2,
        }

    def test_the_norm_after_is_that_of_the_gradients(self):
        model = mlp()
        clipper = Clipper.for_model(model, "global_norm:max_norm=2+param_norm:max_norm=0.7")
        backward(model, 0)
        norm = clipper.step().item()
        after = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
        assert after < norm
        scalars = clipper.report.scalars()
        assert scalars["clip/norm_post"] == pytest.approx(after, rel=1e-6)
        assert scalars["clip/scale"] == pytest.approx(after / norm, rel=1e-6)

    def test_many_steps_between_two_reads(self):
        model = pair([0.0, 0.0], [0.0, 0.0])
        clipper = Clipper.for_model(model, "global_norm:max_norm=600.5")
        norms = [float(step) for step in range(1, 1201)]
        self.run(clipper, model, [([norm, 0], [0, 0]) for norm in norms])
        scalars = clipper.report.scalars()
        assert scalars["clip/norm_mean"] == pytest.approx(np.mean(norms))
        assert scalars["clip/norm_max"] == 1200
        assert scalars["clip/rate"] == 0.5
        summary = clipper.report.summary()
        assert (summary["steps"], summary["clipped"], summary["rate"]) == (1200, 600, 0.5)
        assert summary["norm_median"] == pytest.approx(np.median(norms))
        assert summary["norm_max"] == 1200

    def test_summary_is_of_the_whole_run(self):
        model = pair([0.0, 0.0], [0.0, 0.0])
        clipper = Clipper.for_model(model, "global_norm:max_norm=6.5")
        self.run(clipper, model, [([3, 4], [0, 12]), ([3, math.inf], [0, 4])])
        clipper.report.scalars()
        self.run(clipper, model, [([3, 0], [0, 4])])
        summary = clipper.report.summary()
        assert summary == {
            "steps": 3,
            "clipped": 1,
            "skipped": 1,
            "nonfinite": 1,
            "rate": pytest.approx(1 / 3),
            "norm_median": pytest.approx(9),
            "norm_max": pytest.approx(13),
            "threshold": 6.5,
        }

    def test_other_parameters_go_on_with_the_run(self, caplog):
        """Eight steps, a layer that is unfrozen, three more: the strategy is new, the run is not."""
        model = mlp()
        model[0].requires_grad_(False)
        clipper = Clipper.for_model(model, "zclip:max_norm=0.01")
        for step in range(11):
            if step == 8:
                model[0].requires_grad_(True)
            model.zero_grad()
            backward(model, step)
            clipper.step()
        assert clipper.state.seen.item() == 3
        assert clipper.report.scalars()["clip/rate"] == 1
        summary = clipper.report.summary()
        assert (summary["steps"], summary["clipped"]) == (11, 11)
        words = "The trainable parameters changed, from 2 to 4 (2 new): the statistics of zclip start anew."
        assert caplog.text.count(words) == 1

    @pytest.mark.parametrize("bounded", [False, True])
    def test_numbers_that_nobody_read_are_counted_alike(self, bounded):
        """On a device the flags stay there; on the host they are known. The logs are the same."""
        layout = Layout.of_parameters(("a", "b"), [2, 3], torch.device("cpu"))
        reports = [ClipReport(layout.device, layout.dtype) for _ in range(2)]
        for i, (sizes, scales) in enumerate(
            [
                ((3.0, 4.0), (1.0, 0.5)),
                ((1.0, 1.0), (1.0, 1.0)),
                ((9.0, 1.0), (0.1, 0.2)),
                ((math.nan, 1.0), (1.0, 1.0)),
            ]
        ):
            stats = NormStats(torch.tensor(sizes, dtype=torch.float64).square(), layout)
            scale_S = torch.tensor(scales, dtype=torch.float64)
            bound_S = torch.tensor([math.inf, 0.1 if bounded and i < 2 else math.inf], dtype=torch.float64)
            plan = ClipPlan(scale_S, bound_S if bounded else None, threshold=torch.tensor(2.0 + i, dtype=torch.float64))
            finite, skipped = not math.isnan(sizes[0]), i in (2, 3)
            clipped = finite and not skipped and bool(plan.clipped_S.any())
            reports[0].add(stats, plan, finite, skipped, clipped)
            reports[1].add(stats, plan, torch.tensor(finite), torch.tensor(skipped))
        host, device = (report.scalars() for report in reports)
        assert host == pytest.approx(device)
        assert host["clip/rate"] == (0.75 if bounded else 0.5), "with the one that the strategy skipped, not the NaN"
        assert (host["clip/skipped"], host["clip/nonfinite"], host["clip/threshold"]) == (2, 1, 4)
        assert ("clip/norm_post" in host) != bounded
        assert reports[0].summary() == reports[1].summary()


class TestZeroNorm:
    def messages(self, caplog, norms: list[float], reads: set[int]) -> list[str]:
        model = vector(0.0)
        clipper = Clipper.for_model(model, "none")
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hf_gradclip"):
            for step, norm in enumerate(norms):
                model.w.grad = torch.tensor([norm])
                clipper.step()
                if step in reads:
                    clipper.report.scalars()
            clipper.report.scalars()
        return caplog.messages

    @pytest.mark.parametrize("reads", [set(), {4}, {0, 3, 5}, set(range(30))])
    def test_ten_in_a_row_warn_once(self, caplog, reads):
        messages = self.messages(caplog, [1.0, *[0.0] * 25], reads)
        assert len(messages) == 1
        assert "exactly 0 for 10 steps in a row" in messages[0]

    @pytest.mark.parametrize("reads", [set(), {4}, {0, 3, 5}, set(range(30))])
    def test_nine_in_a_row_do_not(self, caplog, reads):
        assert self.messages(caplog, [*[0.0] * 9, 1e-3, *[0.0] * 9], reads) == []


@pytest.mark.parametrize(
    "spec",
    [
        "global_norm:max_norm=1e-9",
        "global_norm:max_norm=1e-9,norm_type=inf",
        "param_norm:max_norm=1e-9",
        "soft:max_norm=1e-9",
        "zclip_paper:max_norm=1e-9",
        "zclip:warmup_steps=2",
        "adagc_paper:max_norm=1e-9",
        "adagc:warmup_steps=1",
        "adaptive",
    ],
)
def test_nothing_of_a_zero_is_clipped(spec) -> None:
    """Four steps of 3e-8, of which a limit of 1e-9 clips each, and four of 0, of which no limit clips one."""
    model = vector(0.0)
    clipper = Clipper.for_model(model, spec)
    counts = []
    for value in 4 * [3e-8] + 4 * [0.0]:
        model.w.grad = torch.full((1,), value)
        clipper.step()
        counts.append(clipper.report.summary()["clipped"])
        assert (model.w.grad.item() < torch.tensor(value).item()) == (counts[-1] > sum(counts[-2:-1]))
    assert counts[3:] == 5 * [counts[3]]
    assert counts[3] == 4 or "1e-9" not in spec
    assert clipper.report.scalars()["clip/rate"] == counts[7] / 8


def test_replicas_that_nobody_compares_are_not_asked_for() -> None:
    for check_every in (0, 100):
        Clipper.for_model(nn.Linear(2, 2), "zclip", check_every=check_every)
    with pytest.raises(SpecError, match=r"Clipper.for_model\(..., check_every=5\): nobody compares"):
        Clipper.for_model(nn.Linear(2, 2), "zclip", check_every=5)


@pytest.mark.parametrize("word", ["record", "histogram_every"])
def test_what_a_plain_loop_cannot_write_is_refused(word) -> None:
    with pytest.raises(SpecError, match=f"{word}=.*no run here that could write it.*clipper.report.scalars"):
        Clipper.for_model(nn.Linear(2, 2), {"gradient": "zclip", word: 5 if word == "histogram_every" else True})


class Seen(NamedTuple):
    count_S: Tensor


@dataclass(frozen=True)
class ByUnit(Strategy):
    """Remembers a number for each row."""

    needs: ClassVar[Needs] = Needs(units=Units())

    def init(self, layout):
        return Seen(torch.zeros(len(layout)))

    def update(self, stats, state):
        return ClipPlan(torch.ones(())), Seen(state.count_S + 1)


def test_numbers_by_unit_are_not_taken_in_another_order() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 4)})
    saved = Clipper.for_model(model, ByUnit()).state_dict()
    assert len(saved["state"]["count_S"]) > len(saved["names"])
    assert Clipper.for_model(model, ByUnit()).load_state_dict(saved) == ""
    other = nn.ModuleDict({"b": nn.Linear(3, 4), "a": nn.Linear(2, 3)})
    assert "the same parameters in another order" in Clipper.for_model(other, ByUnit()).load_state_dict(saved)


@pytest.mark.parametrize(
    "spec", ["value:max_value=1", "global_norm:max_norm=1,norm_type=inf", "adaptive_norm+value:max_value=1"]
)
def test_what_goes_by_elements_is_refused_for_complex_ones(spec) -> None:
    """3 + 4j is one element of 5, and not two of 3 and 4."""
    model = nn.Module()
    model.wave = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UnsupportedBackendError, match=r"of complex gradients \(wave\)"):
        Clipper.for_model(model, spec)
    model.wave.grad = torch.tensor([3 + 4j, 0j], dtype=torch.complex64)
    assert Clipper.for_model(model, "global_norm:max_norm=1").step() == pytest.approx(5)
    assert model.wave.grad.abs().max() == pytest.approx(1)


def test_a_skipped_step_is_said_now_and_then(caplog) -> None:
    """With its number, its norm and the tensors; at the first, second, fourth, eighth ... skip."""
    model = nn.Linear(2, 2)
    clipper = Clipper.for_model(model, "global_norm:max_norm=1")
    for step in range(1, 13):
        model(torch.ones(1, 2)).sum().backward()
        if step > 2:
            model.bias.grad[0] = math.nan
        clipper.step()
        model.zero_grad()
    said = [record.message for record in caplog.records if "is skipped" in record.message]
    assert [int(words.split()[2]) for words in said] == [3, 4, 6, 10]
    assert all("its norm is nan. Not finite: bias." in words for words in said)

"""Events of a clipper in a plain loop: when they come, what they say, what is obeyed, what a checkpoint keeps."""

from __future__ import annotations

import gc
import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_gradclip import ClipConfig, Clipper, optim
from hf_gradclip.clipper import NonFiniteError
from hf_gradclip.decision import judge_on_device
from hf_gradclip.events import Event, SpikeLimitError
from hf_gradclip.strategy import SpecError
from tests.tiny import SkipThird

LOUD = {20: 100.0, 27: 60.0, 40: 80.0}


def model_of(sizes: tuple[int, ...] = (12, 4)) -> nn.ParameterDict:
    return nn.ParameterDict({f"p{i}": torch.ones(size) for i, size in enumerate(sizes)})


def set_grads(model: nn.Module, step: int, factor: float = 1.0) -> float:
    """Gradients of a norm near 1, or so many times it; the norm, in float64."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) / 4 * factor
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))


def run(clipper: Clipper, model: nn.Module, steps: range, **events: Any) -> list[Event]:
    found: list[Event] = []
    clipper.events.hear(dict.fromkeys(events or ("on_spike", "on_skip", "on_nonfinite"), found.append))
    for step in steps:
        set_grads(model, step, LOUD.get(step, 1.0))
        clipper.step()
    return found


def stands_out(norms: list[float]) -> list[tuple[float, float]]:
    """The rule of docs/choosing.md in NumPy: of each norm z, and where standing out begins."""
    said = []
    for i, norm in enumerate(norms):
        logs = np.sort(np.log(np.array(norms[max(0, i - 64) : i])))
        if len(logs) < 2:
            said.append((0.0, math.inf))
            continue
        median = np.median(logs)
        spread = 1.4826 * np.median(np.abs(logs - median))
        often = logs[-4] - median if len(logs) >= 4 else logs[0] - median
        least = math.log(8) if i < 16 else min(max(1.5 * often, math.log(3)), math.log(8))
        reach = max(min(5 * spread, math.log(30)), least)
        said.append((5 * (math.log(norm) - median) / reach, math.exp(median + reach)))
    return said


class TestSpike:
    @pytest.mark.parametrize("spec", ["adaptive_norm", "none", "global_norm:max_norm=0.5", "adagc:warmup_steps=5"])
    def test_comes_in_its_step_by_the_rule_whatever_clips(self, spec) -> None:
        model = model_of()
        clipper = Clipper.for_model(model, spec)
        found = run(clipper, model, range(60))
        norms = [set_grads(model, step, LOUD.get(step, 1.0)) for step in range(60)]
        rule = stands_out(norms)
        assert [event.step for event in found] == [step + 1 for step in range(60) if rule[step][0] > 5] == [21, 28, 41]
        for event in found:
            z, begin = rule[event.step - 1]
            assert event.kind == "on_spike"
            assert not event.late
            assert event.norm == pytest.approx(norms[event.step - 1], rel=1e-6)
            assert event.z == pytest.approx(z, rel=1e-6)
            assert event.threshold == pytest.approx(begin, rel=1e-6)

    def test_names_the_largest_tensors(self) -> None:
        model = model_of((3, 4, 5))
        clipper = Clipper.for_model(model, "adaptive_norm")
        found: list[Event] = []
        clipper.events.hear({"on_spike": found.append})
        for step in range(30):
            set_grads(model, step)
            if step == 25:
                model.p1.grad, model.p2.grad = torch.full((4,), 30.0), torch.full((5,), 10.0)
                model.p0.grad = torch.zeros(3)
            clipper.step()
        (event,) = found
        assert [name for name, _ in event.tensors] == ["p1", "p2", "p0"]
        assert [share for _, share in event.tensors] == pytest.approx([3600 / 4100, 500 / 4100, 0])
        assert str(event).startswith("step 26 stands out: norm 64.03, largest p1 88%, p2 12%")
        assert event.examples == "unknown"

    def test_comes_before_anything_is_clipped(self) -> None:
        model = model_of()
        norms = []
        clipper = Clipper.for_model(
            model, "adaptive_norm", on_spike=lambda event: norms.append((event.norm, float(norm_of(model))))
        )
        run(clipper, model, range(30), on_skip=None)
        assert norms
        assert all(a == pytest.approx(b, rel=1e-5) for a, b in norms)

    def test_a_step_that_a_handler_skips_moves_nothing_and_is_counted(self, caplog) -> None:
        model = model_of()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        clipper = Clipper.for_model(model, "none", on_spike=lambda event: event.skip_step())
        for step in range(50):
            set_grads(model, step, LOUD.get(step, 1.0))
            before = [p.detach().clone() for p in model.parameters()]
            clipper.step()
            optimizer.step()
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            assert moved == (step not in LOUD)
            assert clipper.step_was_skipped == (step in LOUD)
        assert clipper.report.scalars()["clip/skipped"] == 3
        assert optimizer.state[model.p0]["step"] == 47
        assert "a handler asked for it" in caplog.text

    def test_handlers_that_always_skip_are_stopped_by_the_limit(self) -> None:
        model = model_of()
        clipper = Clipper.for_model(
            model, "none", max_consecutive_skips=2, on_spike=lambda event: event.skip_step(), nonfinite="skip"
        )
        for step in range(20):
            set_grads(model, step)
            clipper.step()
        set_grads(model, 20, 100.0)
        clipper.step()
        set_grads(model, 21, 10_000.0)
        with pytest.raises(NonFiniteError, match="2 steps in a row were skipped"):
            clipper.step()

    def test_a_nan_is_not_remembered(self) -> None:
        model = model_of()
        clipper = Clipper.for_model(model, "none")
        found: list[Event] = []
        clipper.events.hear({"on_spike": found.append})
        for step in range(60):
            set_grads(model, step, LOUD.get(step, 1.0))
            if step in (5, 22, 23):
                model.p0.grad[0] = math.nan if step != 23 else math.inf
            clipper.step()
        assert [event.step for event in found] == [21, 28, 41]

    def test_norms_of_zero_are_no_event(self) -> None:
        model = model_of()
        clipper = Clipper.for_model(model, "none")
        found = run(clipper, model, range(20))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        clipper.step()
        assert not found


def norm_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad for p in model.parameters()]).norm()


class TestRows:
    @pytest.mark.parametrize("sparse", [False, True])
    def test_which_tokens_made_a_spike(self, sparse) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(40, 3, sparse=sparse), nn.Linear(3, 2))
        found: list[Any] = []
        clipper = Clipper.for_model(
            model,
            "global_norm:max_norm=1",
            on_spike=lambda event: found.append((event.rows("0.weight"), event.rows("1.weight", 1))),
        )
        for step in range(20):
            tokens = torch.randint(40, (64,), generator=torch.Generator().manual_seed(step))
            out = model(torch.cat([tokens, torch.full((200,), 17)]) if step == 18 else tokens)
            (out.square().sum() * (50 if step == 18 else 1)).backward()
            grad = model[0].weight.grad.to_dense().double().clone()
            head = model[1].weight.grad.double().clone()
            clipper.step()
            model.zero_grad()
            if step == 18:
                break
        ((rows, of_head),) = found
        norms = grad.norm(dim=1)
        right = norms.argsort(descending=True)[:5].tolist()
        assert [row for row, _ in rows] == right
        assert rows[0][0] == 17
        assert [norm for _, norm in rows] == pytest.approx(norms[right].tolist(), rel=1e-9)
        assert of_head == [(int(head.norm(dim=1).argmax()), pytest.approx(float(head.norm(dim=1).max())))]

    def test_where_they_are_not_known(self) -> None:
        model = model_of()
        clipper = Clipper.for_model(model, "none")
        found: list[Event] = []
        clipper.events.hear({"on_spike": found.append})
        run(clipper, model, range(21))
        with pytest.raises(ValueError, match="must name a trained matrix"):
            found[0].rows()
        stats = clipper.view.measure(clipper.config.gradient.needs)
        for norm in (1.0, 500.0):
            set_grads(model, 3, norm)
            stats = clipper.view.measure(clipper.config.gradient.needs)
            clipper.events.keep(stats, stats.total.isfinite(), torch.tensor(False), guarded=False)
        clipper.report.scalars()
        with pytest.raises(ValueError, match="are gone"):
            found[-1].rows()


class TestSkipAndNonfinite:
    def test_a_nan_is_told_as_both(self) -> None:
        model = model_of()
        clipper = Clipper.for_model(model, "adaptive_norm")
        found: list[Event] = []
        clipper.events.hear(dict.fromkeys(("on_spike", "on_skip", "on_nonfinite"), found.append))
        for step in range(6):
            set_grads(model, step)
            if step == 4:
                model.p1.grad[2] = math.inf
            clipper.step()
        assert [(event.kind, event.step) for event in found] == [("on_nonfinite", 5), ("on_skip", 5)]
        assert found[0].tensors == (("p1", 1.0),)
        assert math.isinf(found[0].norm)

    def test_policies(self) -> None:
        for policy, kinds in (("raise", ["on_nonfinite"]), ("pass", ["on_nonfinite"])):
            model = model_of()
            found: list[Event] = []
            clipper = Clipper.for_model(
                model, "none", nonfinite=policy, on_nonfinite=found.append, on_skip=found.append
            )
            set_grads(model, 0)
            model.p0.grad[0] = math.nan
            if policy == "raise":
                with pytest.raises(NonFiniteError):
                    clipper.step()
            else:
                clipper.step()
                assert math.isnan(float(model.p0.grad[0])), "passed on"
            assert [event.kind for event in found] == kinds

    def test_a_handler_keeps_a_nan_from_the_weights_under_policy_pass(self) -> None:
        model = model_of()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        clipper = Clipper.for_model(model, "none", nonfinite="pass", on_nonfinite=lambda event: event.skip_step())
        for step in range(6):
            set_grads(model, step)
            before = [p.detach().clone() for p in model.parameters()]
            if step == 4:
                model.p0.grad[0] = math.nan
            clipper.step()
            optimizer.step()
            moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
            assert moved == [step != 4] * 2
            assert clipper.step_was_skipped == (step == 4)
        shown = clipper.report.scalars()
        assert (shown["clip/skipped"], shown["clip/nonfinite"], shown["clip/rate"]) == (1.0, 1.0, 0.0)
        assert all(bool(p.isfinite().all()) for p in model.parameters())

    def test_what_a_strategy_skips(self) -> None:
        model = model_of()
        found: list[Event] = []
        clipper = Clipper.for_model(model, SkipThird(), on_skip=found.append)
        for step in range(6):
            set_grads(model, step)
            clipper.step()
        assert [event.step for event in found] == [3]

    def test_what_a_loss_scaler_drops_is_its_own(self) -> None:
        model = model_of()
        found: list[Event] = []
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        clipper = Clipper.for_model(model, "none", scaler=scaler, on_skip=found.append, on_nonfinite=found.append)
        set_grads(model, 0)
        model.p0.grad[0] = math.nan
        clipper.step()
        assert not found


class TestUnread:
    def test_what_nobody_reads_is_told_with_the_report(self) -> None:
        """As on a device under policy "pass": the same steps, later, and they can no longer be skipped."""
        model = model_of()
        clipper = Clipper.for_model(model, "none")
        found: list[Event] = []
        clipper.events.hear(dict.fromkeys(("on_spike", "on_skip", "on_nonfinite"), found.append))
        for step in range(60):
            set_grads(model, step, LOUD.get(step, 1.0))
            if step == 30:
                model.p0.grad[0] = math.nan
            stats = clipper.view.measure(clipper.config.gradient.needs)
            clipper.events.keep(stats, stats.total.isfinite(), torch.tensor(step == 30), guarded=False)
        assert not found
        clipper.report.scalars()
        told = [(event.kind, event.step) for event in found]
        assert told == [("on_spike", 21), ("on_spike", 28), ("on_nonfinite", 31), ("on_skip", 31), ("on_spike", 41)]
        assert all(event.late for event in found)
        clipper.report.scalars()
        assert len(found) == 5

    def test_what_a_loss_scaler_drops_is_its_own_on_a_device_too(self, monkeypatch) -> None:
        """Judged as on a device, where nobody reads under a scaler: a spike is told late, an overflow is not."""
        monkeypatch.setattr("hf_gradclip.clipper.judge", lambda *given: judge_on_device(*given[:3]))
        model = model_of()
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        clipper = Clipper.for_model(model, "none", scaler=scaler)
        found: list[Event] = []
        clipper.events.hear(dict.fromkeys(("on_spike", "on_skip", "on_nonfinite"), found.append))
        for step in range(30):
            set_grads(model, step, LOUD.get(step, 1.0))
            if step == 10:
                model.p0.grad[0] = math.nan
            clipper.step()
        assert not found
        assert clipper.report.scalars()["clip/nonfinite"] == 1
        assert [(event.kind, event.step, event.late) for event in found] == [
            ("on_spike", 21, True),
            ("on_spike", 28, True),
        ]

    def test_a_step_that_was_dropped_unmeasured_is_one_of_the_run(self) -> None:
        """As an overflow under DeepSpeed."""
        model = model_of()
        clipper = Clipper.for_model(model, "none")
        found: list[Event] = []
        clipper.events.hear({"on_spike": found.append})
        for step in range(21):
            set_grads(model, step, LOUD.get(step, 1.0))
            clipper.count_overflow() if step in (3, 4) else clipper.step()
        assert [event.step for event in found] == [21]

    def test_on_one_rank_of_several_nobody_waits_for_the_others(self) -> None:
        """A report that rank 0 alone reads: what is asked for holds there, and nothing is sent."""
        model = model_of()
        clipper = Clipper.for_model(model, "none", on_spike=lambda event: None)
        sent: list[bool] = []
        clipper.events.agree = lambda asked, failed: bool(sent.append(failed))
        for together, count in ((False, 0), (True, 1)):
            clipper.events.agree_late = together
            for step in range(21):
                set_grads(model, step, LOUD.get(step, 1.0))
                stats = clipper.view.measure(clipper.config.gradient.needs)
                clipper.events.keep(stats, stats.total.isfinite(), False, guarded=False)
            clipper.report.scalars()
            assert len(sent) == count

    def test_no_more_steps_wait_than_a_thousand(self) -> None:
        model = model_of()
        found: list[Event] = []
        clipper = Clipper.for_model(model, "none", on_spike=found.append)
        set_grads(model, 0)
        stats = clipper.view.measure(clipper.config.gradient.needs)
        set_grads(model, 0, 100.0)
        loud = clipper.view.measure(clipper.config.gradient.needs)
        for step in range(1000):
            assert not found
            clipper.events.keep(loud if step == 30 else stats, torch.tensor(True), False, guarded=False)
        assert [event.step for event in found] == [31]

    def test_counts_on_from_a_step_of_the_run(self) -> None:
        model = model_of()
        clipper = Clipper.for_model(model, "none")
        clipper.events.start_after(20)
        assert [event.step for event in run(clipper, model, range(21))] == [41]
        clipper.events.start_after(0)  # a second train() begins at 0
        assert [event.step for event in run(clipper, model, range(21))] == [21]


class TestLowerRate:
    def losses(
        self, clip: Any, rule: bool, steps: int = 50, stop: int | None = None
    ) -> tuple[list[float], list[float]]:
        """Weights moved per unit of gradient in each step, and the rate that the schedule shows."""
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
        clipper = Clipper.for_model(model, clip, optimizer=optimizer)
        moved, shown = [], []
        for step in range(steps):
            set_grads(model, step, LOUD.get(step, 1.0))
            clipper.step()
            before, grad = model.p0.detach().double(), model.p0.grad.double()
            optimizer.step()
            moved.append(float((before - model.p0.detach().double()).norm() / grad.norm()))
            schedule.step()
            shown.append(optimizer.param_groups[0]["lr"])
        return moved, shown

    def test_the_factor_is_in_force_for_so_many_steps_and_schedules_do_not_see_it(self) -> None:
        spec = {"gradient": "adaptive_norm", "after_spike": "lower_rate:factor=0.25,steps=5"}
        moved, shown = self.losses(spec, True)
        plain, same = self.losses("adaptive_norm", False)
        assert shown == same
        lowered = {step for first in LOUD for step in range(first, first + 5)}
        for step in range(50):
            right = 0.5 ** (step // 10) * (0.25 if step in lowered else 1)
            assert moved[step] == pytest.approx(right, rel=1e-4), step
            assert plain[step] == pytest.approx(0.5 ** (step // 10), rel=1e-4)

    def test_a_step_that_raises_leaves_the_rate_as_it_was(self) -> None:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        clipper = Clipper.for_model(model, "adaptive_norm", optimizer=optimizer, after_spike="lower_rate")
        for step in range(21):
            set_grads(model, step, LOUD.get(step, 1.0))
            clipper.step()
            if step < 20:
                optimizer.step()

        def broken() -> None:
            raise OSError("broken")

        with pytest.raises(OSError, match="broken"):
            optimizer.step(broken)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 1.0

    def test_a_spike_that_is_told_late_lowers_no_longer_than_one_that_is_not(self) -> None:
        """The log of step 24 tells of step 21: of five steps one is left, though the next log is far away."""
        model = model_of()
        optimizer = optim.SGD(model.parameters(), lr=1.0)
        spec = {"gradient": "none", "skip_sync": False, "after_spike": "lower_rate:factor=0.25,steps=5"}
        clipper = Clipper.for_model(model, spec, optimizer=optimizer)
        rates: list[float] = []
        optimizer.register_step_pre_hook(lambda stepped, *_: rates.append(stepped.param_groups[0]["lr"]))
        for step in range(40):
            set_grads(model, step, 100.0 if step == 20 else 1.0)
            clipper.step()
            optimizer.step()
            if step == 23:
                clipper.report.scalars()
        assert rates == [1.0] * 24 + [0.25] + [1.0] * 15

    def test_several_clippers_of_one_optimizer_lower_it_once_and_leave_it_as_it_was(self) -> None:
        models = [model_of(), model_of()]
        optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=1.0)
        factors = (0.25, 0.5)
        clippers = [
            Clipper.for_model(model, "none", optimizer=optimizer, after_spike=f"lower_rate:factor={factor},steps=5")
            for model, factor in zip(models, factors, strict=True)
        ]
        rates: list[float] = []
        optimizer.register_step_pre_hook(lambda stepped, *_: rates.append(stepped.param_groups[0]["lr"]))
        for step in range(30):
            for model, clipper, loud in zip(models, clippers, (20, 22), strict=True):
                set_grads(model, step, 100.0 if step == loud else 1.0)
                clipper.step()
            optimizer.step()
            assert optimizer.param_groups[0]["lr"] == 1.0, step
        assert rates == [1.0] * 20 + [0.25] * 5 + [0.5] * 2 + [1.0] * 3

    def test_a_clipper_that_is_gone_lowers_nothing(self) -> None:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        clipper = Clipper.for_model(model, "none", optimizer=optimizer, after_spike="lower_rate")
        rates: list[float] = []
        optimizer.register_step_pre_hook(lambda stepped, *_: rates.append(stepped.param_groups[0]["lr"]))
        for step in range(21):
            set_grads(model, step, LOUD.get(step, 1.0))
            clipper.step()
        optimizer.step()
        del clipper
        gc.collect()
        optimizer.step()
        assert rates == [pytest.approx(0.1), 1.0]

    def test_a_clipper_is_pickled_with_its_past_and_without_the_optimizer(self) -> None:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        clipper = Clipper.for_model(model, "none", optimizer=optimizer, after_spike="lower_rate:steps=7")
        for step in range(23):
            set_grads(model, step, LOUD.get(step, 1.0))
            clipper.step()
        again = pickle.loads(pickle.dumps(clipper))
        assert again.state_dict()["events"]["left"] == clipper.state_dict()["events"]["left"] == 5

    def test_needs_an_optimizer(self) -> None:
        with pytest.raises(SpecError, match="Add optimizer=optimizer"):
            Clipper.for_model(model_of(), "adaptive", after_spike="lower_rate")
        with pytest.raises(SpecError, match=r"AdamW\(clip=..., after_spike=...\)"):
            optim.AdamW(model_of().parameters(), clip={"gradient": "none", "after_spike": "stop"})


class TestStop:
    def test_ends_a_loop_at_the_wanted_spike(self) -> None:
        model = model_of()
        clipper = Clipper.for_model(model, "adaptive_norm", after_spike="stop:spikes=2,steps=10")
        with pytest.raises(SpikeLimitError, match="step 28 stands out"):
            run(clipper, model, range(60))

    def test_goes_on_where_they_are_far_apart(self) -> None:
        model = model_of()
        clipper = Clipper.for_model(model, "adaptive_norm", after_spike="stop:spikes=2,steps=7")
        assert [event.step for event in run(clipper, model, range(60))] == [21, 28, 41]


class TestState:
    SPEC = {"gradient": "adaptive_norm", "after_spike": "lower_rate:steps=9+stop:spikes=3,steps=25"}  # noqa: RUF012

    def test_a_resumed_run_meets_the_same_events_and_goes_on_with_the_lowered_rate(self) -> None:
        def begin() -> tuple[nn.Module, torch.optim.Optimizer, Clipper]:
            model = model_of()
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            return model, optimizer, Clipper.for_model(model, self.SPEC, optimizer=optimizer)

        model, optimizer, clipper = begin()
        weights, file = [], io.BytesIO()

        def train(model: nn.Module, optimizer: Any, clipper: Clipper, steps: range) -> None:
            for step in steps:
                if step == 24 and not file.tell():
                    torch.save([model.state_dict(), clipper.state_dict()], file)
                set_grads(model, step, LOUD.get(step, 1.0))
                clipper.step()
                optimizer.step()
                weights.append(model.p0.detach().clone())

        with pytest.raises(SpikeLimitError, match="step 41"):
            train(model, optimizer, clipper, range(60))
        whole, weights = weights, []
        file.seek(0)
        saved, clip = torch.load(file, weights_only=True)
        again, optimizer, resumed = begin()
        again.load_state_dict(saved)
        assert resumed.load_state_dict(clip) == ""
        with pytest.raises(SpikeLimitError, match="step 41"):
            train(again, optimizer, resumed, range(24, 60))
        assert len(weights) == 16
        assert all(map(torch.equal, weights, whole[24:]))

    @pytest.mark.parametrize(
        "damage", [{}, {"events": 3}, {"events": {"seen": 1}}, {"events": {"left": -1}}, {"events": {"spikes": ["x"]}}]
    )
    def test_a_state_without_events_or_a_damaged_one_starts_them_anew(self, damage) -> None:
        model = model_of()
        clipper = Clipper.for_model(model, "adaptive_norm", after_spike="stop")
        run(clipper, model, range(25))
        saved = clipper.state_dict()
        events = saved.pop("events")
        if isinstance(damage.get("events"), dict):
            damage = {"events": {**events, **damage["events"]}}
        again = Clipper.for_model(model_of(), "adaptive_norm", after_spike="stop")
        assert again.load_state_dict({**saved, **damage}) == ""
        assert again.state_dict()["events"]["step"] == 0

    def test_nothing_is_kept_where_nobody_asks(self) -> None:
        assert "events" not in Clipper.for_model(model_of(), "adaptive").state_dict()


class TestSpec:
    def test_is_read_and_written(self) -> None:
        config = ClipConfig.parse({"gradient": "adaptive", "after_spike": "lower_rate:factor=0.5+stop:spikes=4"})
        assert [vars(reaction) for reaction in config.after_spike] == [
            {"factor": 0.5, "steps": 50},
            {"spikes": 4, "steps": 100},
        ]
        assert "after_spike=lower_rate:factor=0.5,steps=50+stop:spikes=4,steps=100" in str(config)
        assert config.of_update is not None
        assert (
            ClipConfig.parse({"gradient": "none", "update": "block_rms", "after_spike": "stop"}).of_update().after_spike
            == ()
        )

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            ("lower_rat", "must be lower_rate or stop"),
            ("lower_rate:factr=1", "has no field 'factr'"),
            ("lower_rate:factor=2", "must be between 0 and 1"),
            ("lower_rate:steps=0", "must be >= 1"),
            ("lower_rate:steps=1.5", "must be a whole number"),
            ("stop:spikes=x", "must be a number"),
            ("stop:spikes=5,steps=2", "'stop:spikes=5,steps=2'.* must be >= spikes, which is 5"),
            ("stop+stop:spikes=2", "one of a kind"),
            (3, "must be lower_rate or stop"),
        ],
    )
    def test_a_wrong_one_is_named(self, spec, words) -> None:
        with pytest.raises(SpecError, match=words):
            ClipConfig.parse({"gradient": "adaptive", "after_spike": spec})

    def test_a_handler_must_be_a_function(self) -> None:
        with pytest.raises(TypeError, match="on_spike=3: must be a function"):
            Clipper.for_model(model_of(), "adaptive", on_spike=3)

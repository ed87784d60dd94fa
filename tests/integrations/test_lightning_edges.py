"""What GradClip keeps, says and gives back where a Lightning run changes on its way, is resumed, or ends."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric

from hf_gradclip import attach
from hf_gradclip.clipper import Clipper, NonFiniteError
from hf_gradclip.integrations.lightning import GradClip
from hf_gradclip.optim import SGD
from hf_gradclip.strategy import SpecError
from hf_gradclip.views.view import UnsupportedBackendError
from tests.integrations.lightning_runs import LOUD, STEPS, Module, Watch, fit
from tests.test_events import stands_out
from tests.tiny import weights_of

THAWED = 5
"""The batch, from 0, before which the optimizer of `head` gets the other parameters."""


class Thaw(pl.Callback):
    """Gives the optimizer parameters on the way, as Lightning's BaseFinetuning does."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, number: int) -> None:
        if number == THAWED:
            trainer.optimizers[0].add_param_group({"params": [*pl_module.net[0].parameters()]})


def head(factors: dict[int, float | None]) -> Module:
    """A module whose optimizer begins with its last layer alone."""
    module = Module(factors=factors)
    module.configure_optimizers = lambda: torch.optim.AdamW(module.net[4].parameters(), lr=1e-2)
    return module


class TestParametersThatCome:
    def test_skips_before_and_after_are_in_a_row(self, tmp_path):
        clip = GradClip({"gradient": "adaptive_norm", "max_consecutive_skips": 4})
        module = head(dict.fromkeys(range(3, 8), math.nan))
        with pytest.raises(NonFiniteError, match="Step 7: 4 steps in a row were skipped"):
            fit(tmp_path, clip, module, callbacks=[Thaw()])

    def test_events_and_report_go_on(self, tmp_path):
        """A norm of 1000 times the others in the ninth step, four after the exchange, stands out among nine."""
        told: list[tuple[int, float]] = []
        clip = GradClip("adaptive_norm", on_spike=lambda event: told.append((event.step, event.threshold)))
        trainer = fit(tmp_path, clip, head({8: 1000.0}), callbacks=[Thaw()])
        assert [step for step, _ in told] == [9]
        assert told[0][1] == pytest.approx(stands_out(trainer.watch.norms)[8][1], rel=1e-5), (
            "judged by all eight before"
        )
        summary = clip.clipper.report.summary()
        assert (summary["steps"], summary["clipped"]) == (STEPS, 1)
        assert summary["norm_max"] == pytest.approx(max(trainer.watch.norms), rel=1e-5)
        assert len(clip.clipper.view.watched()) == 4


class Exchange(pl.Callback):
    """Puts in another optimizer on the way."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, number: int) -> None:
        if number == THAWED:
            trainer.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=1e-2)]


class TestStepsOfEvents:
    """An event's step is that of the run, from 1: the batch counts them too."""

    @pytest.mark.parametrize("made_with", [None, "adaptive_norm"])
    def test_they_go_on_from_a_checkpoint_without_events(self, tmp_path, made_with):
        fit(tmp_path, made_with, max_steps=-1, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
        steps: list[int] = []
        module = Module()
        module.loss_of = lambda batch, number: (
            Module.loss_of(module, batch, number) * (1e3 if (module.current_epoch, number) == (1, LOUD - 1) else 1.0)
        )
        clip = GradClip("adaptive_norm", on_spike=lambda event: steps.append(event.step))
        fit(tmp_path, clip, module, max_steps=-1, max_epochs=2, resume=tmp_path / "half.ckpt")
        assert steps == [STEPS + LOUD]

    def test_they_go_on_under_another_optimizer(self, tmp_path):
        steps: list[int] = []
        clip = GradClip("none", on_spike=lambda event: steps.append(event.step))
        module = Module(factors={STEPS - 1: 1e4})
        fit(tmp_path, None, module, callbacks=[Exchange(), clip])
        assert steps == [STEPS]


class Clips(Module):
    """Clips by itself in manual optimization, as Lightning's documentation shows it."""

    def __init__(self, limit: float, how: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.limit, self.how = limit, how

    def training_step(self, batch: Any, number: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss_of(batch, number))
        self.clip_gradients(optimizer, gradient_clip_val=self.limit, gradient_clip_algorithm=self.how)
        optimizer.step()


class TestAModuleThatClips:
    @pytest.mark.parametrize(
        ("how", "instead"), [("norm", r"GradClip\(0.1\)"), ("value", r"GradClip\('value:max_value=0.1'\)")]
    )
    def test_it_is_refused_where_it_does(self, tmp_path, how, instead):
        module = Clips(0.1, how)
        before = weights_of(module)
        words = rf"self.clip_gradients\(AdamW, gradient_clip_val=0.1\) beside GradClip: .* {instead} does the same"
        with pytest.raises(UnsupportedBackendError, match=words):
            fit(tmp_path, "adaptive_norm", module)
        assert torch.equal(weights_of(module), before)

    def test_no_limit_is_no_clip_and_after_the_run_it_may(self, tmp_path):
        trainer = fit(tmp_path, "adaptive_norm", Clips(0.0, "norm"))
        assert trainer.clip.clipper.report.summary()["steps"] == STEPS
        (w, *_) = trainer.optimizers[0].param_groups[0]["params"]
        w.grad = torch.full_like(w, 3.0)
        trainer.precision_plugin.clip_gradients(trainer.optimizers[0], 1.0)
        assert w.grad.norm() < 1.001


def step_of(optimizer: Any) -> float:
    """How far a step moves the weights under gradients of 1, by the learning rate: for plain SGD sqrt(weights)."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = torch.cat([p.detach().flatten() for p in params])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = torch.cat([p.detach().flatten() for p in params]) - before
    return float(moved.norm() / optimizer.param_groups[0]["lr"] / len(before) ** 0.5)


def stock(ps: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(ps, lr=1e-2)


def ours(ps: Any) -> torch.optim.Optimizer:
    return SGD(ps, lr=1e-2)


class TestAfterTheRun:
    """The optimizer is as it would be: a step of SGD is the gradient times the learning rate again."""

    @pytest.mark.parametrize("make", [stock, ours])
    def test_updates_are_not_clipped(self, tmp_path, make):
        trainer = fit(tmp_path, {"gradient": "none", "update": "global_norm:max_norm=0.001"}, Module(make))
        assert step_of(trainer.optimizers[0]) == pytest.approx(1, rel=1e-4)
        (update,) = trainer.clip.state_dict()["update"]
        assert update["spec"].startswith("global_norm"), "a checkpoint that is saved now has its state"

    @pytest.mark.parametrize("fails", [False, True])
    def test_no_rate_is_lowered(self, tmp_path, fails):
        """A spike in the step before the last, after which the rate is a thousandth for 50 steps."""

        class Fails(pl.Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, number: int) -> None:
                if fails and number == STEPS - 1:
                    raise KeyError("a file")

        clip = GradClip({"gradient": "none", "after_spike": "lower_rate:factor=0.001,steps=50"})
        module, watch = Module(stock, {STEPS - 2: 1e4}), Watch()
        try:
            fit(tmp_path, clip, module, callbacks=[watch, Fails()])
        except KeyError:
            assert fails
        moved = [float((b[0] - a[0]).norm()) for a, b in pairwise(watch.kept)]
        assert moved[-1] < 0.01 * moved[0], "it was lowered"
        optimizer = module.trainer.optimizers[0]
        assert step_of(optimizer) == pytest.approx(1, rel=1e-4)
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        assert clip.state_dict()["gradient"][0]["events"]["left"] == 49, (
            "a checkpoint that is saved now goes on with it"
        )

    def test_a_grad_scaler_may_use_it(self, tmp_path):
        """torch's scaler sets the two attributes that `fold` sets, and takes them away itself."""
        spec = {"gradient": 1.0, "fold": True, "skip_sync": False}
        trainer = fit(tmp_path, spec, Module(lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True)))
        optimizer, scaler = trainer.optimizers[0], torch.amp.GradScaler("cpu")
        scaler.scale(trainer.lightning_module.net(torch.ones(2, 8)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()


LEARNS = "zclip:warmup_steps=2"
BOTH = {"gradient": LEARNS, "update": "adagc:warmup_steps=3"}


class Two(Module):
    """Steps one optimizer for each of its first and last layer, or the first one alone."""

    def __init__(self, both: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.both = both

    def training_step(self, batch: Any, number: int) -> None:
        optimizers: Any = self.optimizers() if self.both else [self.optimizers()]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss_of(batch, number))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = self.net[0].parameters(), self.net[4].parameters()
        return [torch.optim.AdamW(part, lr=1e-2) for part in (parts if self.both else parts[:1])]


class TestWhatACheckpointLacks:
    """A warning says, once, what a resumed run does without."""

    @pytest.mark.parametrize(
        ("made_with", "spec", "modules", "said"),
        [
            (None, LEARNS, (Module, Module), "it was made without GradClip. zclip starts anew."),
            (None, 1.0, (Module, Module), ""),
            (LEARNS, LEARNS, (Module, Module), ""),
            (
                LEARNS,
                BOTH,
                (Module, Module),
                "a clip state of the update for no optimizers. adagc of optimizer 0 starts",
            ),
            (BOTH, BOTH, (Module, Module), ""),
            (LEARNS, LEARNS, (Two, Two), ""),
            (LEARNS, LEARNS, (lambda: Two(False), Two), "of the gradient for 1 optimizer. zclip of optimizer 1 starts"),
            (LEARNS, LEARNS, (Two, lambda: Two(False)), "of the gradient for 2 optimizers, and the run has 1 now."),
        ],
    )
    def test_it_is_said(self, tmp_path, caplog, made_with, spec, modules, said):
        first, second = (make() for make in modules)
        fit(tmp_path, made_with, first, max_steps=-1, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
        saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
        if type(first) is Two and first.both != second.both:  # Lightning itself insists on as many optimizers
            saved["optimizer_states"] = [optimizer.state_dict() for optimizer in second.configure_optimizers()]
            torch.save(saved, tmp_path / "half.ckpt")
        caplog.clear()
        fit(tmp_path, spec, second, max_steps=-1, max_epochs=2, resume=tmp_path / "half.ckpt")
        warnings = [words for words in caplog.messages if words.startswith("the checkpoint: ")]
        assert len(warnings) == bool(said)
        assert said in "".join(warnings)

    def test_a_run_of_its_own_says_nothing(self, tmp_path, caplog):
        fit(tmp_path, BOTH)
        assert "the checkpoint" not in caplog.text


def prepared(optimizer: Any) -> Any:
    return Accelerator(cpu=True).prepare(optimizer)


class TestFabric:
    """A loop of Fabric: what GradClip cannot see of it, the clipper says and does."""

    def test_a_state_of_another_strategy_is_said_once(self, tmp_path, caplog):
        fabric = Fabric(accelerator="cpu", devices=1)
        net = torch.nn.Linear(4, 1)
        saved = Clipper.for_model(net, LEARNS)
        fabric.save(tmp_path / "fabric.ckpt", {"clipper": saved})
        fabric.load(tmp_path / "fabric.ckpt", {"clipper": Clipper.for_model(net, LEARNS)})
        assert "starts anew" not in caplog.text
        fabric.load(tmp_path / "fabric.ckpt", {"clipper": Clipper.for_model(net, "adagc:warmup_steps=2")})
        said = [words for words in caplog.messages if "starts anew" in words]
        assert len(said) == 1
        assert said[0].startswith("clip: The checkpoint's clip state is of zclip:")

    @pytest.mark.parametrize("wrapped", [lambda o: Fabric(accelerator="cpu", devices=1).setup_optimizers(o), prepared])
    def test_a_rate_is_lowered_inside_wrappers(self, wrapped):
        """Of SGD without momentum: in the loud step and four more a step is a thousandth of rate times gradient."""
        net = torch.nn.Linear(4, 1)
        optimizer = wrapped(torch.optim.SGD(net.parameters(), lr=1.0))
        clipper = Clipper.for_model(net, "none", optimizer=optimizer, after_spike="lower_rate:factor=0.001,steps=5")
        shares = []
        for step in range(30):
            gradient = 1000.0 if step == 20 else 1.0
            before = net.weight.detach().clone()
            for p in net.parameters():
                p.grad = torch.full_like(p, gradient)
            clipper.step()
            optimizer.step()
            shares.append(float((before - net.weight.detach()).mean() / gradient))
        assert shares == pytest.approx([1.0] * 20 + [0.001] * 5 + [1.0] * 5, rel=0.05)

    def test_what_is_no_optimizer_is_refused_by_name(self):
        with pytest.raises(SpecError, match=r"optimizer='adamw'\): .* torch.optim.Optimizer, and this is none"):
            Clipper.for_model(torch.nn.Linear(4, 1), "none", optimizer="adamw", after_spike="lower_rate")


class TestLateEvents:
    """With skip_sync=False events are told late: before a checkpoint, which has every step."""

    def test_in_a_checkpoint_of_lightning(self, tmp_path):
        """A spike in step 11, which the next log would tell, is told with a checkpoint after step 12."""
        told: list[tuple[int, bool]] = []

        class Save(pl.Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, number: int) -> None:
                if number == STEPS - 1:
                    assert told == []
                    trainer.save_checkpoint(tmp_path / "twelve.ckpt")
                    assert told == [(STEPS - 1, True)]

        module = Module(lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True), {STEPS - 2: 1e4})
        spec = {"gradient": "none", "skip_sync": False}
        clip = GradClip(spec, on_spike=lambda event: told.append((event.step, event.late)))
        fit(tmp_path, clip, module, callbacks=[Save()], log_every_n_steps=1000)
        assert told == [(STEPS - 1, True)]
        (saved,) = torch.load(tmp_path / "twelve.ckpt", weights_only=True)["callbacks"]["GradClip"]["gradient"]
        assert (int(saved["events"]["seen"]), saved["events"]["step"]) == (STEPS, STEPS)

    def test_in_the_state_of_a_plain_loop(self):
        """A run that goes on from the state tells of a spike as one that was never interrupted."""
        told: list[list[tuple[int, float]]] = [[], []]
        for cuts, found in zip((False, True), told, strict=True):

            def hear(event: Any, found: list[tuple[int, float]] = found) -> None:
                found.append((event.step, event.z))

            net = torch.nn.Linear(4, 1)
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, fused=True)
            make = partial(Clipper.for_model, net, "none", optimizer=optimizer, skip_sync=False, on_spike=hear)
            clipper = make()
            for step in range(1, 31):
                if cuts and step == 20:
                    saved, clipper = clipper.state_dict(), make()
                    clipper.load_state_dict(saved)
                for p in net.parameters():
                    p.grad = torch.full_like(p, 1e3 if step == 22 else 1 + step % 3)
                clipper.step()
                optimizer.step()
            clipper.report.scalars()
        assert [step for step, _ in told[0]] == [22]
        assert told[1] == told[0]


def body_and_head() -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"body": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 1)})


class TestGroupsOfSeveralOptimizers:
    """A pattern may find its parameters in the one optimizer or in the other."""

    def test_gradients_under_lightning(self, tmp_path):
        """The first layer moves by its limit in a step of SGD at most, the last one as without a clip."""
        limit, moved = 0.01, []
        for spec in (f"net.0*=global_norm:max_norm={limit};net.4*=none", None):
            module = Two()
            module.configure_optimizers = lambda module=module: [
                torch.optim.SGD(module.net[i].parameters(), lr=1.0) for i in (0, 4)
            ]
            before = [module.net[i].weight.detach().clone() for i in (0, 4)]
            fit(tmp_path, spec, module, max_steps=2)
            moved.append([float((module.net[i].weight - w).norm()) for i, w in zip((0, 4), before, strict=True)])
        (first, last), (free, stays) = moved
        assert first <= limit < free
        assert last == stays > limit

    def test_updates_under_attach(self):
        limits = {"body": 0.01, "head": 0.02}
        update = ";".join(f"{name}*=global_norm:max_norm={limit}" for name, limit in limits.items())
        accelerator, model = Accelerator(cpu=True), body_and_head()
        attach(accelerator, {"gradient": "none", "update": update}, auto=True)
        model, *optimizers = accelerator.prepare(
            model, *(torch.optim.SGD(model[name].parameters(), lr=1.0) for name in limits)
        )
        before = {name: torch.cat([p.detach().flatten() for p in model[name].parameters()]) for name in limits}
        accelerator.backward(model["head"](model["body"](torch.ones(2, 4))).sum() * 100)
        for optimizer in optimizers:
            optimizer.step()
        for name, limit in limits.items():
            after = torch.cat([p.detach().flatten() for p in model[name].parameters()])
            assert float((after - before[name]).norm()) == pytest.approx(limit, rel=1e-3)

    def test_a_pattern_that_finds_nothing_in_the_model_is_an_error(self, tmp_path):
        with pytest.raises(SpecError, match=r"the pattern 'net.7\*' finds no parameter"):
            fit(tmp_path, "net.7*=global_norm:max_norm=1;*=none", Two())

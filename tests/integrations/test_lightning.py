"""GradClip in a Lightning Trainer: it clips as Lightning does, skips exactly, logs, resumes, says what it cannot."""

from __future__ import annotations

import copy
import csv
import logging
import math
import pickle
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from transformers import GPT2Config, GPT2LMHeadModel

from hf_gradclip import Clipper
from hf_gradclip.integrations.lightning import GradClip
from hf_gradclip.integrations.lightning_refusals import refuse_run
from hf_gradclip.record.files import read_record
from hf_gradclip.strategy import SpecError
from hf_gradclip.views.view import UnsupportedBackendError
from tests.integrations.lightning_runs import LOUD, STEPS, Module, all_of, data, fit, same
from tests.integrations.ranks import launch
from tests.tiny import weights_of

LIMIT = 2.0
"""Between the norms of the run."""
DOCS = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text("utf-8")
ZCLIP = "zclip:warmup_steps=2,z_threshold=0.5"


def by_hand(module: Module, spec: Any) -> Clipper:
    """A plain torch loop over the same batches."""
    clipper, (optimizer,) = Clipper.for_model(module, spec), [module.configure_optimizers()]
    for number, batch in enumerate(data()):
        optimizer.zero_grad()
        module.loss_of(batch, number).backward()
        clipper.step()
        optimizer.step()
    return clipper


def sgd(ps: Any) -> Any:
    return torch.optim.SGD(ps, lr=1e-2, momentum=0.9)


class Eager(torch.optim.Optimizer):
    """Decays and counts whether or not there is a gradient, as some optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                self.state[p]["step"] = self.state[p].get("step", torch.zeros(())) + 1
                p.mul_(0.99)
                if p.grad is not None:
                    p.sub_(p.grad, alpha=1e-2)
        return loss


class Gpt2(Module):
    """Its head is tied to the embedding, and its `Conv1D` keeps an output per column: names tell neither."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"vocab_size": 16, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
        none: dict[str, Any] = {f"{place}_pdrop": 0.0 for place in ("resid", "embd", "attn")}
        self.net: Any = GPT2LMHeadModel(GPT2Config(**sizes, **none, bos_token_id=0, eos_token_id=0))

    def loss_of(self, batch: Any, number: int) -> torch.Tensor:
        ids = (batch[0] * 10).long() % 16
        return self.net(input_ids=ids, labels=ids).loss


class TestClips:
    @pytest.mark.parametrize(
        "settings", [{}, {"accumulate_grad_batches": 2, "max_steps": 6}, {"precision": "bf16-mixed"}], ids=str
    )
    @pytest.mark.parametrize("make", [None, sgd])
    def test_a_number_is_what_lightning_clips_at(self, tmp_path, settings, make):
        runs = [
            fit(tmp_path, None, Module(make), gradient_clip_val=LIMIT, **settings),
            fit(tmp_path, LIMIT, Module(make), **settings),
            fit(tmp_path, None, Module(make), **settings),
        ]
        stock, ours, free = (weights_of(trainer.lightning_module) for trainer in runs)
        norms = runs[1].watch.norms
        assert min(norms) < 0.9 * LIMIT < 1.1 * LIMIT < max(norms), "some steps clip and some do not"
        assert (ours - stock).abs().max() < 2e-6
        assert (free - stock).abs().max() > 1e-4

    @pytest.mark.parametrize("spec", [ZCLIP, "adaptive"])
    def test_a_strategy_is_that_of_a_plain_loop_to_the_bit(self, tmp_path, spec):
        module = Module()
        clipper = by_hand(module, spec)
        trainer = fit(tmp_path, spec)
        assert torch.equal(weights_of(trainer.lightning_module), weights_of(module))
        assert trainer.clip.clipper.report.summary() == clipper.report.summary()
        assert clipper.report.summary()["clipped"] > 0

    def test_the_module_tells_what_is_a_head_and_what_a_unit(self, tmp_path):
        """In a step of SGD each column of a `Conv1D` moves by its limit at most, and a tied head as without a clip."""
        columns, head, limit = "net.transformer.h.0.mlp.c_fc.weight", "net.transformer.wte.weight", 1e-3
        moved = []
        for spec in (f"agc:clip_factor={limit}", None):
            module = Gpt2()
            module.make = lambda ps: torch.optim.SGD(ps, lr=1.0)
            before = {name: p.detach().double() for name, p in module.named_parameters()}
            fit(tmp_path, spec, module, max_steps=1)
            moved.append({name: before[name] - p.detach().double() for name, p in module.named_parameters()})
        most = limit * before[columns].norm(dim=0).clamp(min=1e-3)
        ours, free = (m[columns].norm(dim=0) for m in moved)
        assert (free > most).any()
        torch.testing.assert_close(ours, torch.minimum(free, most), rtol=1e-3, atol=1e-8)
        assert torch.equal(moved[0][head], moved[1][head])
        assert moved[0][head].norm() > limit * before[head].norm()

    def test_a_tiny_limit_moves_nothing(self, tmp_path):
        make = lambda ps: torch.optim.SGD(ps, lr=1.0)  # noqa: E731
        before = weights_of(Module())
        assert (weights_of(fit(tmp_path, 1e-12, Module(make)).lightning_module) - before).abs().max() < 1e-10
        assert (weights_of(fit(tmp_path, None, Module(make)).lightning_module) - before).abs().max() > 1e-2

    def test_updates(self, tmp_path):
        """With SGD the update is the gradient, so that no step is longer than lr times its limit."""
        spec = {"gradient": "none", "update": "global_norm:max_norm=1.5"}
        trainer = fit(tmp_path, spec, Module(lambda ps: torch.optim.SGD(ps, lr=1e-2)))
        weights = [weights_of(Module()), *(kept[0] for kept in trainer.watch.kept)]
        moves = [float((b - a).double().norm()) / 1e-2 for a, b in pairwise(weights)]
        assert moves == pytest.approx([min(norm, 1.5) for norm in trainer.watch.norms], rel=1e-3)
        assert min(moves) < 1.4 < 1.49 < max(moves)

    def test_fused_with_fold_and_without_a_read(self, tmp_path):
        make = lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True)  # noqa: E731
        plain = fit(tmp_path, LIMIT, Module(make, {LOUD - 1: math.nan}))
        spec = {"gradient": LIMIT, "fold": True, "skip_sync": False}
        ours = fit(tmp_path, spec, Module(make, {LOUD - 1: math.nan}))
        assert (weights_of(ours.lightning_module) - weights_of(plain.lightning_module)).abs().max() < 1e-6
        assert ours.clip.clipper.report.summary()["skipped"] == 1

    def test_a_batch_that_is_left_out_is_no_step(self, tmp_path):
        trainer = fit(tmp_path, "none", Module(factors={3: None}), max_steps=-1, max_epochs=1)
        assert trainer.clip.clipper.report.summary()["steps"] == STEPS - 1

    def test_parameters_that_are_unfrozen_are_clipped(self, tmp_path, caplog):
        class Unfreeze(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, number):
                if number == 5:
                    late = [*pl_module.net[2].parameters()]
                    for p in late:
                        p.requires_grad = True
                    trainer.optimizers[0].add_param_group({"params": late})

        module = Module(lambda ps: torch.optim.SGD([p for p in ps if p.requires_grad], lr=1.0))
        module.net[2].requires_grad_(False)
        before = weights_of(module)
        clip = GradClip(1e-12)
        with caplog.at_level(logging.WARNING):
            trainer = fit(tmp_path, clip, module, callbacks=[Unfreeze()])
        assert "SGD has other parameters now" in caplog.text
        assert len(trainer.clip.clipper.view.watched()) == 6
        assert (weights_of(module) - before).abs().max() < 1e-10

    @pytest.mark.parametrize("first", [True, False])
    def test_an_optimizer_that_is_put_in_later(self, tmp_path, first):
        """It is clipped, or an error where GradClip cannot have seen it."""

        class Other(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, number):
                if number == 5:
                    trainer.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=1.0)]

        module = Module(lambda ps: torch.optim.SGD(ps, lr=1.0))
        before, clip = weights_of(module), GradClip(1e-12)
        if first:
            fit(tmp_path, None, module, callbacks=[Other(), clip])
            assert clip.clipper.report.summary()["steps"] == STEPS - 5
        else:
            with pytest.raises(RuntimeError, match=r"SGD\.step\(\): this optimizer is not one of"):
                fit(tmp_path, clip, module, callbacks=[Other()])
        assert (weights_of(module) - before).abs().max() < 1e-10

    def test_manual_optimization_of_two_optimizers(self, tmp_path):
        """Each of them at its own norm, as by Lightning's `clip_gradients`."""

        class Two(Module):
            def __init__(self, limit: float | None) -> None:
                super().__init__()
                self.automatic_optimization = False
                self.limit = limit

            def training_step(self, batch, number):
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                self.manual_backward(self.loss_of(batch, number))
                for optimizer in self.optimizers():
                    if self.limit is not None:
                        self.clip_gradients(optimizer, self.limit, "norm")
                    optimizer.step()

            def configure_optimizers(self):
                parts = self.net[0].parameters(), self.net[2:].parameters()
                return [torch.optim.AdamW(part, lr=1e-2) for part in parts]

        limit = 0.8
        cases = ((None, limit), (limit, None), (None, None))
        runs = [fit(tmp_path, c, Two(own), max_steps=2 * STEPS) for c, own in cases]
        stock, ours, free = (weights_of(trainer.lightning_module) for trainer in runs)
        assert (ours - stock).abs().max() < 2e-6
        assert (free - stock).abs().max() > 1e-4
        for clipper in runs[1].clip.clippers:
            assert 0 < clipper.report.summary()["clipped"] < clipper.report.summary()["steps"] == STEPS
        assert {"clip/rate", "clip_1/rate"} <= {*runs[1].callback_metrics}


class TestSkips:
    @pytest.mark.parametrize("make", [None, sgd, Eager])
    @pytest.mark.parametrize(
        ("spec", "factor"),
        [("none", math.nan), ("skip_step:min_values=3", 1000.0), ("skip_step:min_values=3,on=loss", 1e3)],
    )
    def test_nothing_moves(self, tmp_path, make, spec, factor):
        module = Module(make, {LOUD - 1: factor})
        if make is None:  # a scheduler wraps the step too
            one = module.configure_optimizers()
            schedule = {"scheduler": torch.optim.lr_scheduler.StepLR(one, 3), "interval": "step"}
            module.configure_optimizers = lambda: {"optimizer": one, "lr_scheduler": schedule}
        trainer = fit(tmp_path, spec, module)
        kept = trainer.watch.kept
        moved = [not same(before, after) for before, after in pairwise(kept)]
        assert moved == [number != LOUD for number in range(2, STEPS + 1)]
        assert all(t.isfinite().all() for t in kept[-1])
        assert trainer.clip.clipper.report.summary()["skipped"] == 1
        assert trainer.global_step == STEPS

    def test_many_in_a_row_are_an_error(self, tmp_path):
        module = Module(factors=dict.fromkeys(range(4, STEPS), math.nan))
        with pytest.raises(RuntimeError, match="3 steps in a row were skipped"):
            fit(tmp_path, {"gradient": "none", "max_consecutive_skips": 3}, module)
        assert "_step" not in str(vars(module.trainer.optimizers[0]).get("step"))

    def test_a_loss_scaler_drops_its_own_overflows(self, tmp_path):
        """In true units, as Lightning clips; the dropped step is counted, and nothing is learnt from it."""

        def scaled() -> MixedPrecision:
            return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**7))

        factors = {LOUD - 1: math.inf}
        stock = fit(tmp_path, None, Module(factors=factors), plugins=scaled(), gradient_clip_val=LIMIT)
        ours = fit(tmp_path, LIMIT, Module(factors=factors), plugins=scaled())
        assert (weights_of(ours.lightning_module) - weights_of(stock.lightning_module)).abs().max() < 2e-6
        summary = ours.clip.clipper.report.summary()
        assert (summary["steps"], summary["skipped"], summary["nonfinite"]) == (STEPS, 1, 1)
        assert 0 < summary["clipped"] < STEPS - 1
        finite = [norm for norm in ours.watch.norms if math.isfinite(norm)]
        assert summary["norm_max"] == pytest.approx(max(finite), rel=1e-4)


class TestLogs:
    def test_every_n_steps(self, tmp_path):
        """What is logged is of the steps since the last log, with accumulation too."""
        board = CSVLogger(tmp_path)
        trainer = fit(
            tmp_path,
            LIMIT,
            logger=board,
            log_every_n_steps=3,
            accumulate_grad_batches=2,
            max_steps=6,
        )
        with open(f"{board.log_dir}/metrics.csv", newline="") as file:
            rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
        assert [row["step"] for row in rows] == [2, 5]
        for row, norms in zip(rows, (trainer.watch.norms[:3], trainer.watch.norms[3:]), strict=True):
            assert row["clip/norm_mean"] == pytest.approx(sum(norms) / 3, rel=1e-5)
            assert row["clip/norm_max"] == pytest.approx(max(norms), rel=1e-5)
            assert row["clip/rate"] == pytest.approx(sum(norm > LIMIT for norm in norms) / 3)
        assert len({row["clip/norm_mean"] for row in rows}) == 2
        assert trainer.callback_metrics["clip/rate"].item() == pytest.approx(rows[-1]["clip/rate"])

    def test_chosen_keys(self, tmp_path):
        trainer = fit(tmp_path, {"gradient": LIMIT, "log": "rate,norm_max"})
        assert {*trainer.callback_metrics} == {"clip/rate", "clip/norm_max"}

    def test_the_start_and_the_end_are_said(self, tmp_path, caplog):
        with caplog.at_level(logging.INFO):
            fit(tmp_path, LIMIT)
        lines = [record.getMessage() for record in caplog.records if record.name == "hf_gradclip"]
        assert "clip: global_norm:max_norm=2" in lines[0]
        assert f"steps {STEPS}, clipped" in lines[-1]

    def test_a_record(self, tmp_path):
        trainer = fit(tmp_path, {"gradient": LIMIT, "record": True})
        record = read_record(tmp_path / "gradclip")
        norms = trainer.watch.norms
        assert record.step_T.tolist() == [*range(1, STEPS + 1)]
        assert (record.norm_TP**2).sum(axis=1) ** 0.5 == pytest.approx(norms, rel=1e-5)
        assert record.scale_TP[:, 0] == pytest.approx([min(1.0, LIMIT / norm) for norm in norms], rel=1e-5)

    def test_the_loss_of_a_step_is_the_mean_of_its_batches_though_the_last_are_fewer(self, tmp_path):
        losses = []

        class Heard(Module):
            def training_step(self, batch, number):
                loss = super().training_step(batch, number)
                losses.append(loss.item())
                return loss

        fit(tmp_path, {"gradient": LIMIT, "record": True}, Heard(), accumulate_grad_batches=5, max_steps=3)
        assert len(losses) == STEPS
        means = [sum(part) / len(part) for part in (losses[:5], losses[5:10], losses[10:])]
        assert read_record(tmp_path / "gradclip").loss_T == pytest.approx(means, rel=1e-5)

    def test_the_lines_of_a_lightning_module_are_not_touched(self, tmp_path):
        class Logs(Module):
            def training_step(self, batch, number):
                loss = super().training_step(batch, number)
                self.log("loss", loss)
                return loss

        assert {"loss", "clip/rate"} <= {*fit(tmp_path, LIMIT, Logs()).callback_metrics}


BOTH = {"gradient": ZCLIP, "update": "adagc:warmup_steps=3"}


class TestState:
    def test_a_resumed_run_goes_on_to_the_bit(self, tmp_path):
        whole = fit(tmp_path, BOTH, max_steps=-1, max_epochs=3)
        half = fit(tmp_path, BOTH, max_steps=-1, max_epochs=1)
        half.save_checkpoint(tmp_path / "half.ckpt")
        assert torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["GradClip"].keys() == {
            "gradient",
            "update",
        }
        rest = fit(tmp_path, BOTH, max_steps=-1, max_epochs=3, resume=tmp_path / "half.ckpt")
        assert len(rest.watch.kept) == 2 * STEPS
        assert same(all_of(whole), all_of(rest))
        state = whole.clip.state_dict()
        assert str(state) == str(rest.clip.state_dict())
        assert str(state) != str(half.clip.state_dict())
        assert 0 < whole.clip.clipper.report.summary()["clipped"] < 3 * STEPS

        torch.save({**torch.load(tmp_path / "half.ckpt"), "callbacks": {}}, tmp_path / "without.ckpt")
        forgot = fit(tmp_path, BOTH, max_steps=-1, max_epochs=3, resume=tmp_path / "without.ckpt")
        assert not same(all_of(whole), all_of(forgot)), "the state matters"

    def test_a_record_goes_on(self, tmp_path):
        spec = {"gradient": ZCLIP, "record": True}
        half = fit(tmp_path, spec, max_steps=-1, max_epochs=1)
        half.save_checkpoint(tmp_path / "half.ckpt")
        fit(tmp_path, spec, max_steps=-1, max_epochs=2, resume=tmp_path / "half.ckpt")
        assert read_record(tmp_path / "gradclip").step_T.tolist() == [*range(1, 2 * STEPS + 1)]

    def test_a_state_of_another_strategy_starts_anew_and_is_said(self, tmp_path, caplog):
        half = fit(tmp_path, ZCLIP, max_steps=-1, max_epochs=1)
        half.save_checkpoint(tmp_path / "half.ckpt")
        with caplog.at_level(logging.WARNING):
            fit(tmp_path, "adagc:warmup_steps=2", max_steps=-1, max_epochs=2, resume=tmp_path / "half.ckpt")
        assert "the checkpoint: " in caplog.text

    def test_a_validation_leaves_no_state_for_the_next_fit(self, tmp_path):
        """`validate(ckpt_path=...)` reads the state too; a fit that begins anew must not take it."""
        half = fit(tmp_path, ZCLIP, max_steps=-1, max_epochs=1)
        half.save_checkpoint(tmp_path / "half.ckpt")
        clip = GradClip(ZCLIP)
        clip.load_state_dict(half.clip.state_dict())
        assert str(fit(tmp_path, clip).clip.state_dict()) == str(half.clip.state_dict()), "both began at nothing"

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda clip: pickle.loads(pickle.dumps(clip))])
    def test_a_copy_is_of_no_run(self, tmp_path, copied):
        clip = GradClip(ZCLIP)
        fit(tmp_path, copied(clip))
        fit(tmp_path, clip)
        again = copied(clip)
        assert again.clippers == []
        assert str(again.state_dict()) == str(clip.state_dict())


class TestEvents:
    def test_a_spike_is_told_and_may_be_left_out(self, tmp_path):
        told: list[Any] = []

        def handler(event: Any) -> None:
            told.append(event)
            event.skip_step()

        module = Module(factors={LOUD + STEPS - 1: 1000.0})
        module.loss_of = lambda batch, number: Module.loss_of(module, batch, number + STEPS * module.current_epoch)
        trainer = fit(tmp_path, GradClip("none", on_spike=handler), module, max_steps=-1, max_epochs=2)
        loud = LOUD + STEPS
        assert [event.step for event in told] == [loud]
        assert told[0].norm == pytest.approx(trainer.watch.norms[loud - 1], rel=1e-5)
        kept = trainer.watch.kept
        assert same(kept[loud - 2], kept[loud - 1])
        assert not same(kept[loud - 1], kept[loud])

    def test_a_stop_ends_the_run(self, tmp_path):
        spec = {"gradient": "none", "after_spike": "stop:spikes=1,steps=5"}
        module = Module(factors={LOUD + STEPS - 1: 1000.0})
        module.loss_of = lambda batch, number: Module.loss_of(module, batch, number + STEPS * module.current_epoch)
        trainer = fit(tmp_path, spec, module, max_steps=-1, max_epochs=5)
        assert trainer.global_step == LOUD + STEPS

    def test_what_is_no_function_is_refused(self):
        with pytest.raises(TypeError, match="on_spike=3: must be a function"):
            GradClip("none", on_spike=3)


class TestRefused:
    def test_a_limit_of_lightning_beside_it(self, tmp_path):
        with pytest.raises(UnsupportedBackendError, match=r"Trainer\(gradient_clip_val=1.0\) beside GradClip"):
            fit(tmp_path, "adaptive", gradient_clip_val=1.0)
        fit(tmp_path, "adaptive", gradient_clip_val=0, max_steps=1)

    def test_a_module_that_clips(self, tmp_path):
        class Own(Module):
            def configure_gradient_clipping(self, *args, **kwargs):
                pass

        with pytest.raises(UnsupportedBackendError, match=r"Own.configure_gradient_clipping beside GradClip"):
            fit(tmp_path, "adaptive", Own())

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("DeepSpeedStrategy", "steps inside its engine.* Use GradClipTrainer"),
            ("FSDPStrategy", "FSDP1 shards flat parameters.* Use DDP"),
            ("ModelParallelStrategy", "not tested here. Use DDP"),
            ("XLAStrategy", "XLA traces the step.* Use a GPU"),
            ("HivemindStrategy", "not tested here. Use a single device or DDP"),
        ],
    )
    def test_a_strategy(self, name, words):
        trainer = SimpleNamespace(strategy=type(name, (), {})(), gradient_clip_val=None, callbacks=[])
        with pytest.raises(UnsupportedBackendError, match=f"GradClip with {name}: .*{words}"):
            refuse_run(trainer, Module())

    def test_an_optimizer_with_several_gradients_for_a_step(self, tmp_path):
        with pytest.raises(UnsupportedBackendError, match="LBFGS: it asks for several gradients"):
            fit(tmp_path, "adaptive", Module(torch.optim.LBFGS))

    def test_a_fused_optimizer_with_a_loss_scaler(self, tmp_path):
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        make = lambda ps: torch.optim.AdamW(ps, fused=True)  # noqa: E731
        with pytest.raises(UnsupportedBackendError, match=r"AdamW\(fused=True\) with precision='16-mixed'"):
            fit(tmp_path, "adaptive", Module(make), plugins=precision)

    def test_an_optimizer_of_ours_that_clips(self, tmp_path):
        from hf_gradclip.optim import AdamW

        with pytest.raises(UnsupportedBackendError, match="both would clip"):
            fit(tmp_path, "adaptive", Module(lambda ps: AdamW(ps, lr=1e-2, clip="adaptive")))

    def test_two_of_them(self, tmp_path):
        with pytest.raises(RuntimeError, match="more than one stateful callback of type `GradClip`"):
            fit(tmp_path, "adaptive", callbacks=[GradClip("adaptive")])

    @pytest.mark.parametrize(
        ("more", "words"),
        [({"console": 2}, "'console': 2.*prints nothing"), ({"record": "text"}, "'text'.*Write record: true")],
    )
    def test_what_only_a_trainer_of_transformers_does(self, more, words):
        with pytest.raises(SpecError, match=words):
            GradClip({"gradient": "adaptive", **more})

    def test_a_wrong_spec(self):
        with pytest.raises(SpecError, match="Did you mean adaptive"):
            GradClip("adaptiv")


class TestDocs:
    TRAINER, FABRIC = re.findall(r"^```python\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)

    def test_the_trainer(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        module = Module(sgd)
        names = {"module": module, "dataloader": data()}
        exec(
            compile(self.TRAINER.replace('"adaptive"', "1e-12").replace("100", "3"), "docs/lightning.md", "exec"), names
        )
        assert (weights_of(module) - weights_of(Module())).abs().max() < 1e-10
        (clip,) = [callback for callback in names["trainer"].callbacks if isinstance(callback, GradClip)]
        assert clip.clipper.report.summary()["clipped"] == 3

    def test_fabric(self, tmp_path, monkeypatch):
        """Weights as by a plain loop with the same clipper; its state is in the checkpoint."""
        monkeypatch.chdir(tmp_path)
        spec, module, twin = ZCLIP, Module(), Module()
        loss_of = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])  # noqa: E731
        block = self.FABRIC.replace("adaptive", spec).replace("bf16-mixed", "32-true")
        names = {"model": module.net, "optimizer": module.configure_optimizers(), "dataloader": data()}
        exec(compile(block, "docs/lightning.md", "exec"), names | {"loss_of": loss_of})
        clipper = by_hand(twin, spec)
        assert torch.equal(weights_of(module), weights_of(twin))
        saved = torch.load("fabric.ckpt", weights_only=True)["clipper"]
        names = [name.removeprefix("net.") for name in clipper.view.layout.names]
        state = Clipper.for_model(twin.net, spec)
        assert state.load_state_dict(saved) == ""
        assert state.view.layout.names == tuple(names)
        assert str(state.state_dict()) == str(saved)


OTHER = """
import sys
import pytorch_lightning as pl
import torch
from hf_gradclip.integrations.lightning import GradClip
assert issubclass(GradClip, pl.Callback)
assert "lightning.pytorch" not in sys.modules
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
    def training_step(self, batch, number):
        return self.net(batch[0]).pow(2).mean() * 100
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)
module = Module()
before = module.net.weight.detach().clone()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 2)))
clip = GradClip(1e-12)
trainer = pl.Trainer(max_steps=4, callbacks=clip, logger=False, enable_checkpointing=False, accelerator="cpu")
trainer.fit(module, loader)
print("moved", float((module.net.weight - before).abs().max()), clip.clipper.report.summary()["clipped"])
"""


@pytest.mark.dist
class TestRanks:
    """DDP on two ranks, each with half of every batch, equals one process."""

    @pytest.fixture(scope="class")
    def ranks(self, tmp_path_factory):
        names = "number", "accumulated", "zclip", "nan", "resumed", "asked", "apart"
        return launch(2, "lightning_main", tmp_path_factory.mktemp("ranks"), *names)

    @pytest.mark.parametrize(
        ("name", "spec", "settings"),
        [
            ("number", LIMIT, {}),
            ("accumulated", LIMIT, {"accumulate_grad_batches": 2, "max_steps": 6}),
            ("zclip", ZCLIP, {}),
        ],
    )
    def test_as_in_one_process(self, tmp_path, ranks, name, spec, settings):
        alone = fit(tmp_path, spec, **settings)
        summary = alone.clip.clipper.report.summary()
        assert 0 < summary["clipped"] < summary["steps"]
        for rank in ranks:
            assert (rank[name]["kept"][0] - weights_of(alone.lightning_module)).abs().max() < 2e-6
            assert rank[name]["summary"]["clipped"] == summary["clipped"]
            assert rank[name]["logged"]["clip/norm_mean"] == pytest.approx(alone.watch.norms[-1], rel=1e-4)
        assert same(ranks[0][name]["kept"], ranks[1][name]["kept"])
        assert ranks[0][name]["state"] == ranks[1][name]["state"]

    @pytest.mark.parametrize("name", ["nan", "asked"])
    def test_what_one_rank_asks_for_is_left_out_on_both(self, ranks, name):
        """A NaN in the batch of rank 1, and a handler that only rank 1 has."""
        for rank in ranks:
            assert rank[name]["moved"] == [number != LOUD for number in range(2, STEPS + 1)]
        assert same(ranks[0][name]["kept"], ranks[1][name]["kept"])

    def test_a_resumed_run_goes_on_to_the_bit(self, ranks):
        for rank in ranks:
            whole, rest = rank["resumed"]["whole"], rank["resumed"]["rest"]
            assert same(whole["kept"], rest["kept"])
            assert whole["state"] == rest["state"]
            assert 0 < whole["summary"]["clipped"] < whole["summary"]["steps"]

    def test_replicas_that_come_apart_stop_the_run(self, ranks):
        for rank in ranks:
            assert "The ranks measured gradient norms that differ" in rank["apart"]


def test_pytorch_lightning_by_its_own_name():
    done = subprocess.run([sys.executable, "-c", OTHER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    moved, clipped = next(line for line in done.stdout.splitlines() if line.startswith("moved")).split()[1:]
    assert float(moved) < 1e-10
    assert int(clipped) == 4

"""The Trainer seam against the stock Trainer, and what the seam adds: skips, limits, words at start-up."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_gradclip import GradClipMixin, GradClipTrainer
from hf_gradclip.clipper import NonFiniteError
from hf_gradclip.config import SpecError
from hf_gradclip.views.view import UnsupportedBackendError
from tests.tiny import VOCAB, SkipThird, counting_data, logged, tiny_llama, train, training_args, weights_of

OPTIMIZERS = {
    "adamw_torch_fused": {"learning_rate": 3e-3},
    "adamw_torch": {"learning_rate": 3e-3},
    "sgd": {"learning_rate": 0.3},
    "rmsprop": {"learning_rate": 1e-3},
}
LIMIT = 0.5


def assert_same_run(ours: Trainer, stock: Trainer, tolerance: float = 1e-5) -> None:
    theirs = torch.tensor(logged(stock))
    assert len(theirs) == stock.state.max_steps
    torch.testing.assert_close(torch.tensor(logged(ours)), theirs, rtol=tolerance, atol=0)
    torch.testing.assert_close(weights_of(ours.model), weights_of(stock.model), rtol=0, atol=tolerance)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def stock_run(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Trainer]:
    settings = {"optim": request.param, **OPTIMIZERS[request.param]}
    return settings, train(Trainer, max_grad_norm=LIMIT, **settings)


@pytest.mark.parametrize("clip", [f"global_norm:max_norm={LIMIT}", None])
def test_trains_like_the_stock_trainer(stock_run, clip) -> None:
    settings, stock = stock_run
    limit = LIMIT if clip is None else 1.0
    ours = train(GradClipTrainer, clip=clip, max_grad_norm=limit, **settings)
    assert_same_run(ours, stock)

    clipped = sum(norm > LIMIT for norm in logged(stock))
    assert 5 <= clipped <= 45, f"some steps clip and some do not, got {clipped} of 50"
    unclipped = train(Trainer, max_grad_norm=0, **settings)
    assert (weights_of(unclipped.model) - weights_of(stock.model)).abs().max() > 1e-4, "clipping matters in this run"


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.42},  # twice the batch, so smaller norms
        {"max_grad_norm": 0},
        {"bf16": True},
        {"logging_steps": 7, "lr_scheduler_type": "cosine", "warmup_steps": 10},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_of_the_trainer_keep_their_meaning(changes) -> None:
    events: list[list[str]] = []

    class Order(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[str] = []
            events.append(self.seen)

        def on_pre_optimizer_step(self, *a, **k):
            self.seen.append("pre")

        def on_optimizer_step(self, *a, **k):
            self.seen.append("step")

        def on_substep_end(self, *a, **k):
            self.seen.append("substep")

        def on_log(self, args, state, control, logs, **k):
            self.seen.append(f"log{state.global_step}")

    settings = {"max_grad_norm": LIMIT, "max_steps": 30, **changes}
    stock = train(Trainer, callbacks=[Order()], **settings)
    ours = train(GradClipTrainer, callbacks=[Order()], **settings)
    assert events[0] == events[1]
    limit = settings["max_grad_norm"]
    assert limit == 0 or min(logged(stock)) < limit < max(logged(stock)), "some steps clip and some do not"
    torch.testing.assert_close(torch.tensor(logged(ours)), torch.tensor(logged(stock)), rtol=2e-3, atol=0)
    tolerance = 1e-3 if "bf16" in changes else 1e-5  # torch rounds nothing to bf16 here, but autocast amplifies 1e-7
    torch.testing.assert_close(weights_of(ours.model), weights_of(stock.model), rtol=0, atol=tolerance)


def test_an_explicit_clip_wins_over_max_grad_norm() -> None:
    tight = train(GradClipTrainer, clip="none", max_grad_norm=1e-3, max_steps=10)
    free = train(Trainer, max_grad_norm=0, max_steps=10)
    torch.testing.assert_close(weights_of(tight.model), weights_of(free.model), rtol=0, atol=1e-7)


def test_clipping_is_engaged() -> None:
    before = weights_of(tiny_llama())
    trainer = train(GradClipTrainer, clip="global_norm:max_norm=1e-12", optim="sgd", learning_rate=0.5, max_steps=5)
    moved = (weights_of(trainer.model).double() - before.double()).abs().max()
    assert moved <= 5 * 1e-12 * 0.5


def test_what_is_logged_counts_since_the_last_log() -> None:
    every = train(GradClipTrainer, clip=f"global_norm:max_norm={LIMIT}", max_steps=30)
    norms = logged(every)
    tenth = train(GradClipTrainer, clip=f"global_norm:max_norm={LIMIT}", max_steps=30, logging_steps=10)
    entries = [entry for entry in tenth.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for i, entry in enumerate(entries):
        part = norms[10 * i : 10 * i + 10]
        assert entry["grad_norm"] == pytest.approx(part[-1], rel=1e-6)
        assert entry["clip/norm_mean"] == pytest.approx(sum(part) / 10, rel=1e-6)
        assert entry["clip/norm_max"] == pytest.approx(max(part), rel=1e-6)
        assert entry["clip/rate"] == pytest.approx(sum(norm > LIMIT for norm in part) / 10)
        assert entry["clip/tensor_rate"] == entry["clip/rate"]
        assert entry["clip/norm_post"] == pytest.approx(min(part[-1], LIMIT), rel=1e-5)
        assert entry["clip/scale"] == pytest.approx(min(1, LIMIT / part[-1]), rel=1e-5)
        assert entry["clip/threshold"] == LIMIT
        assert entry["clip/skipped"] == entry["clip/nonfinite"] == 0
    assert 0 < sum(entry["clip/rate"] for entry in entries) < 3


class Poisoned(Trainer):
    """A Trainer whose loss is NaN at chosen steps."""

    nan_at: tuple[int, ...] = ()

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * float("nan") if self.state.global_step in self.nan_at else loss


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("late", [0.25, 0, 1e-6])
def test_max_grad_norm_may_change_as_in_the_stock_trainer(when, late) -> None:
    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if when == "during" and state.global_step == 25:
                args.max_grad_norm = late

    def run(cls):
        with tempfile.TemporaryDirectory() as folder:
            args = training_args(folder, max_grad_norm=LIMIT, optim="sgd", learning_rate=0.3)
            trainer = cls(model=tiny_llama(), args=args, train_dataset=counting_data(), callbacks=[Change()])
            if when == "before":
                trainer.args.max_grad_norm = late
            trainer.train()
        return trainer

    ours, stock = run(GradClipTrainer), run(Trainer)
    assert_same_run(ours, stock)
    unchanged = train(Trainer, max_grad_norm=LIMIT, optim="sgd", learning_rate=0.3)
    assert (weights_of(unchanged.model) - weights_of(stock.model)).abs().max() > 1e-4, "the change matters"


class ClipsItself(Trainer):
    def _clip_grad_norm(self, model):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)


def test_a_subclass_that_clips_by_itself() -> None:
    class Ours(ClipsItself, GradClipTrainer):
        pass

    assert_same_run(train(Ours), train(ClipsItself))
    with pytest.raises(RuntimeError, match=r"Ours\(clip='zclip'\): .*Put the mixin first"):
        train(Ours, clip="zclip")


class Watch(TrainerCallback):
    """Weights, moments, learning rate and the skip flag after each optimizer step."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.moments: list[torch.Tensor] = []
        self.rates: list[float] = []
        self.skipped: list[bool] = []

    def on_optimizer_step(self, args, state, control, model, optimizer, **k):
        self.weights.append(weights_of(model))
        states = [value for entry in optimizer.state.values() for value in entry.values()]
        self.moments.append(torch.cat([torch.zeros(0), *(value.detach().double().flatten() for value in states)]))
        self.skipped.append(optimizer.step_was_skipped)

    def on_step_end(self, args, state, control, lr_scheduler, **k):
        self.rates.append(lr_scheduler.get_last_lr()[0])


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_a_nan_step_is_skipped_exactly(optim) -> None:
    class Ours(GradClipMixin, Poisoned):
        nan_at = (4, 5, 9)

    watch = Watch()
    settings = {"optim": optim, "optim_args": "momentum=0.9"} if optim == "sgd" else {"optim": optim}
    trainer = train(Ours, clip="zclip:warmup_steps=3", max_steps=15, callbacks=[watch], weight_decay=0.1, **settings)
    for step in range(1, 15):
        same = torch.equal(watch.weights[step], watch.weights[step - 1])
        assert same == (step in Ours.nan_at), step
        assert torch.equal(watch.moments[step], watch.moments[step - 1]) == same
        assert watch.skipped[step] == same
        assert (watch.rates[step] == watch.rates[step - 1]) == same
    assert sum(logged(trainer, "clip/skipped")) == sum(logged(trainer, "clip/nonfinite")) == 3
    assert weights_of(trainer.model).isfinite().all()
    assert torch.isnan(torch.tensor(logged(trainer)[4])), "the logged norm is the true one"
    assert trainer.clipper.state.mean.isfinite()
    assert int(trainer.clipper.state.seen) == 12


def test_policies_at_a_nan_step() -> None:
    class Ours(GradClipMixin, Poisoned):
        nan_at = (3,)

    with pytest.raises(NonFiniteError, match=r"norm is nan in step 4, and.*Not finite: model\.embed_tokens\.weight"):
        train(Ours, clip={"gradient": "zclip", "nonfinite": "raise"}, max_steps=6)
    passed = train(Ours, clip=None, max_steps=6)
    assert weights_of(passed.model).isnan().any(), "clip=None is the stock Trainer, which trains on"

    class Broken(GradClipMixin, Poisoned):
        nan_at = tuple(range(2, 100))

    with pytest.raises(NonFiniteError, match=r"3 steps in a row were skipped \(max_consecutive_skips=3\)"):
        train(Broken, clip={"gradient": "none", "nonfinite": "skip", "max_consecutive_skips": 3}, max_steps=20)


class Half(Trainer):
    """fp16 training on the CPU with a real GradScaler, which Accelerate only makes for accelerators."""

    scale = 2.0**10

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=8)
        self.accelerator.native_amp = True


@pytest.mark.parametrize("scale", [2.0**10, 2.0**24], ids=["clean", "overflowing"])
def test_fp16_with_a_grad_scaler(scale) -> None:
    """Unscaled once, clipped in true units; overflows are left to the scaler and do not count as our skips."""

    class Stock(Half):
        pass

    class Ours(GradClipMixin, Half):
        pass

    Stock.scale = Ours.scale = scale
    watches = Watch(), Watch()
    settings = {"fp16": True, "max_steps": 40, "lr_scheduler_type": "cosine", "optim": "adamw_torch"}
    stock = train(Stock, max_grad_norm=LIMIT, callbacks=[watches[0]], **settings)
    clip = {"gradient": f"global_norm:max_norm={LIMIT}", "max_consecutive_skips": 2}  # fewer than overflow
    ours = train(Ours, clip=clip, callbacks=[watches[1]], **settings)
    assert watches[0].skipped == watches[1].skipped
    assert watches[0].rates == watches[1].rates
    assert stock.accelerator.scaler.get_scale() == ours.accelerator.scaler.get_scale()
    finite = [norm for norm in logged(stock) if norm < float("inf")]
    assert min(finite) < LIMIT < max(finite)
    # A last-bit difference of a coefficient may flip an fp16 rounding in a later forward: 1e-3 of lr * steps.
    torch.testing.assert_close(weights_of(ours.model), weights_of(stock.model), rtol=0, atol=2e-4)
    skips = sum(watches[1].skipped)
    assert sum(logged(ours, "clip/skipped")) == sum(logged(ours, "clip/nonfinite")) == skips
    assert skips >= 4 if scale > 2.0**20 else skips == 0


def test_fp16_overflow_under_a_fused_optimizer_holds_the_schedule() -> None:
    """torch's fused optimizers hide the overflow from Accelerate, so the stock schedule runs on; ours waits."""

    class Ours(GradClipMixin, Half):
        scale = 2.0**24

    watch = Watch()
    settings = {"fp16": True, "max_steps": 12, "lr_scheduler_type": "cosine", "optim": "adamw_torch_fused"}
    train(Ours, clip="adaptive", callbacks=[watch], **settings)
    assert sum(watch.skipped) >= 4
    for step in range(1, 12):
        assert torch.equal(watch.weights[step], watch.weights[step - 1]) == watch.skipped[step]
        assert (watch.rates[step] == watch.rates[step - 1]) == watch.skipped[step]


def test_our_skip_under_a_grad_scaler_is_exact_too() -> None:
    """A strategy that skips a finite step: nothing moves, and the scale is left alone."""

    class Ours(GradClipMixin, Half):
        scale = 2.0**10

    watch = Watch()
    settings = {"fp16": True, "max_steps": 6, "optim": "adamw_torch", "weight_decay": 0.1}
    trainer = train(Ours, clip=SkipThird(), callbacks=[watch], **settings)
    assert watch.skipped == [False, False, True, False, False, False]
    assert torch.equal(watch.weights[2], watch.weights[1])
    assert torch.equal(watch.moments[2], watch.moments[1])
    assert watch.rates[2] == watch.rates[1]
    assert trainer.accelerator.scaler.get_scale() == 2.0**10


def test_mixin_in_a_trl_trainer(tmp_path) -> None:
    class ClipSFTTrainer(GradClipMixin, SFTTrainer):
        pass

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", eos_token="1")
    from datasets import Dataset

    texts = [" ".join(map(str, row["input_ids"].tolist())) for row in counting_data(64)]
    trainer = ClipSFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=6,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            optim="sgd",
            learning_rate=0.5,
            per_device_train_batch_size=4,
        ),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        clip="param_norm:max_norm=1e-12",
    )
    before = weights_of(trainer.model)
    trainer.train()
    assert (weights_of(trainer.model) - before).abs().max() <= 6 * 0.5e-12
    assert logged(trainer, "clip/rate") == [1.0] * 6
    assert "mean_token_accuracy" in trainer.state.log_history[0]


@pytest.mark.parametrize("off", [-1.0, 0])
def test_a_clip_goes_by_no_max_grad_norm_whatever_that_is(off) -> None:
    """The stock Trainer does not clip by these numbers; with the limit of the clip it trains as this one does."""
    stock = train(Trainer, max_steps=20, max_grad_norm=LIMIT)
    ours = train(GradClipTrainer, clip=f"global_norm:max_norm={LIMIT}", max_steps=20, max_grad_norm=off)
    assert (weights_of(stock.model) - weights_of(ours.model)).abs().max() < 1e-6
    assert {0.0, 1.0} <= {*logged(ours, "clip/rate")}


def test_start_up_says_what_is_in_force_and_warns(caplog) -> None:
    caplog.set_level(logging.INFO, logger="hf_gradclip")
    train(GradClipTrainer, clip="zclip", max_grad_norm=0.25, max_steps=2)
    assert "zclip:z_threshold=2.5,alpha=0.97,warmup_steps=25" in caplog.text
    assert "21 segments" in caplog.text
    assert caplog.text.count("clip: zclip") == 1
    assert "The run has 2 steps and zclip warms up for 25 of them" in caplog.text
    assert "max_grad_norm=0.25 is set and overruled by clip='zclip'" in caplog.text

    caplog.clear()
    train(GradClipTrainer, clip="none", max_steps=1, model=tiny_llama().half(), optim="sgd")
    assert "21 trainable parameters are float16" in caplog.text


def test_ten_zero_norms_are_said(caplog) -> None:
    data = counting_data()
    for row in data:
        row["labels"] = torch.full_like(row["labels"], -100)

    class Zero(GradClipTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs).nan_to_num() * 0.0

    train(Zero, clip="adaptive", max_steps=12, data=counting_data())
    assert "exactly 0 for 10 steps in a row" in caplog.text


@pytest.mark.parametrize("limit", [None, -1.0])
def test_bad_max_grad_norm(tmp_path, limit) -> None:
    with pytest.raises(ValueError, match=r"max_grad_norm=.*must be a number >= 0\. 0 switches clipping off"):
        GradClipTrainer(model=tiny_llama(), args=training_args(str(tmp_path), max_grad_norm=limit))


def test_a_wrong_spec_stops_the_constructor(tmp_path) -> None:
    with pytest.raises(SpecError, match="Did you mean zclip"):
        GradClipTrainer(model=tiny_llama(), args=training_args(str(tmp_path)), clip="zclop")


def test_optimizers_that_step_in_backward_are_refused(tmp_path) -> None:
    args = training_args(str(tmp_path), optim="lomo")
    with pytest.raises(UnsupportedBackendError, match=r"optim='lomo'.*inside backward.*Use another optim"):
        GradClipTrainer(model=tiny_llama(), args=args, clip="adaptive")
    GradClipTrainer(model=tiny_llama(), args=args, clip=None)

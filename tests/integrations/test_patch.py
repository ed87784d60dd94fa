"""Trainers that somebody else has made: patched, they train as GradClipTrainer does, to the bit."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

import hf_gradclip
from hf_gradclip import GradClipMixin, GradClipTrainer, patch, patch_all
from hf_gradclip.config import SpecError
from hf_gradclip.integrations.patch import is_in_force
from hf_gradclip.record.files import read_record
from hf_gradclip.state import flatten
from hf_gradclip.views.view import UnsupportedBackendError
from tests.tiny import VOCAB, counting_data, logged, tiny_llama, train, training_args, weights_of

CLIP = "zclip:warmup_steps=5,z_threshold=0.5"
TIGHT = "global_norm:max_norm=1e-12"
SGD = {"optim": "sgd", "learning_rate": 0.3}


class Before(Trainer):
    """A subclass that is older than any patch, with a word of its own in the logs."""

    def __init__(self, *args, word=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.word = word

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "word": self.word}, *args, **kwargs)


class ClipsItself(Trainer):
    def _clip_grad_norm(self, model):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)


class MeasuresItself(Trainer):
    def _get_grad_norm(self, model, grad_norm=None):
        return torch.zeros(())


@pytest.fixture(autouse=True)
def _nothing_stays() -> Any:
    init = vars(Trainer)["__init__"]
    yield
    assert not is_in_force()
    assert vars(Trainer)["__init__"] is init


def number_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", eos_token="1")


def make(cls: type[Trainer], folder: Path, seed: int = 0, clip: Any = "unset", **changes: Any) -> Trainer:
    extra = {} if clip == "unset" else {"clip": clip}
    args = training_args(str(folder), **changes)
    trainer = cls(model=tiny_llama(seed), args=args, train_dataset=counting_data(), **extra)
    trainer.remove_callback(PrinterCallback)
    return trainer


def assert_equal_runs(ours: Trainer, theirs: Trainer) -> None:
    """To the bit: weights, state and everything that was logged, but for the clock."""
    assert torch.equal(weights_of(ours.model), weights_of(theirs.model))
    mine, other = flatten(ours.clipper.state), flatten(theirs.clipper.state)
    assert {key: value.tolist() for key, value in mine.items()} == {key: v.tolist() for key, v in other.items()}
    keys = {key for entry in theirs.state.log_history for key in entry if key == "loss" or "norm" in key or "/" in key}
    assert {"clip/rate", "clip/threshold", "grad_norm", "loss"} <= keys
    for key in keys:
        assert logged(ours, key) == logged(theirs, key), key


class TestPatch:
    def test_it_trains_as_gradcliptrainer_to_the_bit(self, tmp_path):
        theirs = train(GradClipTrainer, clip=CLIP)
        trainer = make(Trainer, tmp_path)
        patch(trainer, clip=CLIP)
        trainer.train()
        assert_equal_runs(trainer, theirs)
        assert 5 <= sum(logged(theirs, "clip/rate")) <= 45, "some steps clip and some do not"
        stock = train(Trainer)
        assert (weights_of(stock.model) - weights_of(trainer.model)).abs().max() > 1e-4, "clipping matters"

    @pytest.mark.parametrize("classes", [(GradClipTrainer, Trainer), (Trainer, GradClipTrainer)], ids=["to", "back"])
    def test_a_checkpoint_goes_on_in_the_other_kind(self, classes, tmp_path):
        def run(cls: type[Trainer], seed: int = 0, resume: str | None = None, **changes: Any) -> Trainer:
            trainer = make(cls, tmp_path, seed, clip=CLIP if cls is GradClipTrainer else "unset", **changes)
            if cls is Trainer:
                patch(trainer, clip=CLIP)
            trainer.train(resume_from_checkpoint=resume)
            return trainer

        whole = run(classes[0], max_steps=20, save_strategy="steps", save_steps=12)
        checkpoint = tmp_path / "checkpoint-12"
        assert (checkpoint / "gradclip.pt").exists()
        again = run(classes[1], seed=1, resume=str(checkpoint), max_steps=20)
        assert_equal_runs(again, whole)
        assert 0 < sum(logged(whole, "clip/rate")[12:]) < 8

    def test_a_subclass_keeps_what_is_its_own(self, tmp_path):
        args = training_args(str(tmp_path), max_steps=3, **SGD)
        trainer = Before(model=tiny_llama(), args=args, train_dataset=counting_data(), word=7.0)
        before = weights_of(trainer.model)
        patch(trainer, clip=TIGHT)
        cls = type(trainer)
        assert (cls.__name__, cls.__qualname__, cls.__module__) == ("Before", "Before", Before.__module__)
        assert inspect.signature(cls.__init__) == inspect.signature(Before.__init__)
        assert isinstance(trainer, Before)
        trainer.train()
        assert (weights_of(trainer.model) - before).abs().max() <= 3 * 0.3e-12
        assert logged(trainer, "word") == [7.0] * 3
        assert logged(trainer, "clip/rate") == [1.0] * 3

    def test_the_record(self, tmp_path):
        trainer = make(Trainer, tmp_path, max_steps=12)
        patch(trainer, clip={"gradient": CLIP, "record": True})
        trainer.train()
        assert read_record(tmp_path).norm_T.tolist() == pytest.approx(logged(trainer), rel=1e-6)

    def test_in_every_copy(self, tmp_path):
        """By pickle, as Ray does it, and by `copy`: the copy clips, and its class can be imported."""
        GradientState._reset_state()  # which holds on to dataloaders of earlier runs, which no pickle takes
        trainer = make(Before, tmp_path, max_steps=2, **SGD)
        patch(trainer, clip=TIGHT)
        for again in (pickle.loads(pickle.dumps(trainer)), copy.deepcopy(trainer)):
            assert type(again) is type(trainer)
            assert again.word == 1.0
            before = weights_of(again.model)
            again.train()
            assert (weights_of(again.model) - before).abs().max() <= 2 * 0.3e-12
            assert again.clipper.report.summary()["clipped"] == 2
        assert trainer.clipper is None, "the one that was copied has not trained"
        torch.load(_saved(trainer, tmp_path), weights_only=False)

    def test_a_clip_of_none_is_max_grad_norm(self, tmp_path):
        trainer = make(Trainer, tmp_path, max_grad_norm=0.5)
        patch(trainer, clip=None)
        trainer.train()
        theirs = train(GradClipTrainer, max_grad_norm=0.5)
        assert torch.equal(weights_of(trainer.model), weights_of(theirs.model))
        assert 5 <= sum(norm > 0.5 for norm in logged(trainer)) <= 45

    def test_a_gradcliptrainer_without_clip(self, tmp_path):
        trainer = make(GradClipTrainer, tmp_path, max_steps=3, **SGD)
        before = weights_of(trainer.model)
        handle = patch(trainer, clip=TIGHT)
        assert type(trainer) is GradClipTrainer
        trainer.train()
        assert (weights_of(trainer.model) - before).abs().max() <= 3 * 0.3e-12
        handle.undo()
        trainer.train()
        assert (weights_of(trainer.model) - before).abs().max() > 1e-4

    def test_after_a_training_of_its_own(self, tmp_path):
        """What was prepared and trained without us is clipped in the next `train()`."""
        trainer = make(Trainer, tmp_path, max_steps=3, **SGD)
        trainer.train()
        patch(trainer, clip=TIGHT)
        before = weights_of(trainer.model)
        trainer.train()
        assert (weights_of(trainer.model) - before).abs().max() <= 3 * 0.3e-12
        assert trainer.clipper.report.summary()["clipped"] == 3


def _saved(trainer: Trainer, folder: Path) -> Path:
    trainer.save_model(str(folder / "model"))
    return folder / "model" / "training_args.bin"


class TestUndo:
    def test_before_training(self, tmp_path):
        trainer = make(Before, tmp_path, max_steps=2)
        attributes = {*vars(trainer)}
        handle = patch(trainer, clip=TIGHT)
        handle.undo()
        handle.undo()
        assert type(trainer) is Before
        assert {*vars(trainer)} == attributes
        trainer.train()
        assert logged(trainer, "clip/rate") == []

    def test_after_training_it_goes_on_as_the_stock_trainer(self, tmp_path, caplog):
        """Two trainings at one limit, the first of them ours: weights and norms as if it had never been patched."""
        limit, settings = 0.5, {"max_steps": 15, "max_grad_norm": 0.5, **SGD}
        trainer, stock = make(Trainer, tmp_path, **settings), make(Trainer, tmp_path, **settings)
        with patch(trainer, clip={"gradient": f"global_norm:max_norm={limit}", "update": "param_norm:max_norm=1e6"}):
            trainer.train()
            ours = logged(trainer)
            assert len(logged(trainer, "clip_update/rate")) == 15
        assert type(trainer) is Trainer
        caplog.clear()
        caplog.set_level(logging.INFO, logger="hf_gradclip")
        trainer.train()
        assert logged(trainer, "clip/rate") == []
        assert caplog.records == [], "nobody looks at its steps any more"
        stock.train()
        first = logged(stock)
        stock.train()
        assert 0 < sum(norm > limit for norm in first) < 15
        assert 0 < sum(norm > limit for norm in logged(stock)) < 15
        assert ours == pytest.approx(first, rel=1e-5)
        assert logged(trainer) == pytest.approx(logged(stock), rel=1e-5)
        torch.testing.assert_close(weights_of(trainer.model), weights_of(stock.model), rtol=0, atol=1e-5)

    def test_and_again(self, tmp_path):
        trainer = make(Trainer, tmp_path, max_steps=2, **SGD)
        with patch(trainer, clip="none"):
            trainer.train()
        before = weights_of(trainer.model)
        with patch(trainer, clip=TIGHT):
            trainer.train()
        assert (weights_of(trainer.model) - before).abs().max() <= 2 * 0.3e-12

    def test_not_while_it_trains(self, tmp_path):
        class Undo(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                with pytest.raises(RuntimeError, match=r"undo\(\): it is training\. Undo after train"):
                    handle.undo()

        trainer = make(Trainer, tmp_path, max_steps=1)
        trainer.add_callback(Undo())
        handle = patch(trainer, clip=TIGHT)
        trainer.train()
        assert isinstance(trainer, GradClipMixin)


class TestRefused:
    @pytest.mark.parametrize("cls", [ClipsItself, MeasuresItself])
    def test_a_seam_of_its_own(self, cls, tmp_path):
        trainer = make(cls, tmp_path)
        seam = "_clip_grad_norm" if cls is ClipsItself else "_get_grad_norm"
        with pytest.raises(UnsupportedBackendError, match=rf"\.{cls.__name__}\.{seam}: .* Remove that method"):
            patch(trainer, clip=CLIP)
        assert type(trainer) is cls

    def test_a_seam_of_one_object(self, tmp_path):
        trainer = make(Trainer, tmp_path)
        trainer._clip_grad_norm = lambda model: None
        with pytest.raises(UnsupportedBackendError, match=r"transformers\.trainer\.Trainer\._clip_grad_norm: "):
            patch(trainer, clip=CLIP)

    def test_twice(self, tmp_path):
        trainer = make(Trainer, tmp_path)
        handle = patch(trainer, clip="zclip")
        with pytest.raises(RuntimeError, match=r"patch\(Trainer\): it clips by clip='zclip' already\. Undo that patch"):
            patch(trainer, clip=TIGHT)
        handle.undo()
        patch(trainer, clip=TIGHT)
        with pytest.raises(RuntimeError, match=r"patch\(GradClipTrainer\): it clips by clip='agc' already"):
            patch(make(GradClipTrainer, tmp_path, clip="agc"), clip="zclip")

    def test_while_it_trains(self, tmp_path):
        class Late(TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                with pytest.raises(RuntimeError, match=r"training has begun, .* Patch before train\(\)"):
                    patch(trainer, clip=TIGHT)

        trainer = make(Trainer, tmp_path, max_steps=1)
        trainer.add_callback(Late())
        trainer.train()
        assert type(trainer) is Trainer

    @pytest.mark.parametrize(
        ("clip", "changes", "error", "words"),
        [
            ("zclop", {}, SpecError, "Did you mean zclip"),
            ("adaptive", {"optim": "lomo"}, UnsupportedBackendError, "optim='lomo'"),
            (None, {"max_grad_norm": -1.0}, ValueError, r"max_grad_norm=-1\.0"),
        ],
    )
    def test_what_the_constructor_would_refuse(self, clip, changes, error, words, tmp_path):
        trainer = make(Trainer, tmp_path, **changes)
        attributes = {*vars(trainer)}
        with pytest.raises(error, match=words):
            patch(trainer, clip=clip)
        assert type(trainer) is Trainer
        assert {*vars(trainer)} == attributes

    def test_something_else(self):
        with pytest.raises(TypeError, match=r"Make the Trainer first, or use patch_all\(\)"):
            patch(Trainer, clip="adaptive")
        with pytest.raises(TypeError, match=r"must be a transformers\.Trainer\. Pass a Trainer"):
            patch(tiny_llama(), clip="adaptive")


class TestPatchAll:
    def test_subclasses_from_before_and_after(self, tmp_path):
        signature = inspect.signature(Trainer.__init__)
        with patch_all(clip=TIGHT):
            assert inspect.signature(Trainer.__init__) == signature

            class After(Trainer):
                pass

            made = [make(cls, tmp_path, max_steps=2, **SGD) for cls in (Trainer, Before, After)]
        free = make(Before, tmp_path, max_steps=2, **SGD)
        for trainer in (*made, free):
            before = weights_of(trainer.model)
            trainer.train()
            moved = (weights_of(trainer.model) - before).abs().max()
            assert moved > 1e-4 if trainer is free else moved <= 2 * 0.3e-12
        assert type(made[1]).__name__ == "Before"
        assert made[1].word == 1.0

    def test_a_trainer_of_trl(self, tmp_path):
        """Its class changes while its own constructor goes on."""
        args = SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
            per_device_train_batch_size=4,
            **SGD,
        )
        data = Dataset.from_list([{key: row[key].tolist() for key in row} for row in counting_data(64)])
        with patch_all(clip=TIGHT):
            trainer = SFTTrainer(model=tiny_llama(), args=args, train_dataset=data, processing_class=number_tokenizer())
        before = weights_of(trainer.model)
        trainer.train()
        assert (weights_of(trainer.model) - before).abs().max() <= 3 * 0.3e-12
        assert logged(trainer, "clip/rate") == [1.0] * 3
        assert type(trainer).__name__ == "SFTTrainer"
        assert "mean_token_accuracy" in trainer.state.log_history[0]

    def test_it_trains_as_gradcliptrainer_to_the_bit(self):
        with patch_all(clip=CLIP):
            ours = train(Trainer)
        assert_equal_runs(ours, train(GradClipTrainer, clip=CLIP))

    def test_a_clip_of_its_own_stays(self, tmp_path):
        with patch_all(clip=TIGHT):
            own, without = make(GradClipTrainer, tmp_path, clip="zclip"), make(GradClipTrainer, tmp_path)
        assert (own._clip_spec, without._clip_spec) == ("zclip", TIGHT)

    def test_one_that_clips_itself_is_named_and_left_alone(self, tmp_path, caplog):
        caplog.set_level(logging.WARNING, logger="hf_gradclip")
        with patch_all(clip=TIGHT):
            trainer = make(ClipsItself, tmp_path, max_steps=3)
        assert type(trainer) is ClipsItself
        assert f"patch_all(clip={TIGHT!r}) leaves one Trainer alone. " in caplog.text
        assert f"{ClipsItself.__module__}.ClipsItself._clip_grad_norm: " in caplog.text
        trainer.train()
        assert torch.equal(weights_of(trainer.model), weights_of(train(ClipsItself, max_steps=3).model))

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["oldest first", "newest first"])
    def test_several_in_force(self, order, tmp_path):
        """The last one counts, whatever the order in which they are undone."""
        specs = ["zclip", "agc"]
        handles = [patch_all(clip=spec) for spec in specs]
        assert make(Trainer, tmp_path)._clip_spec == "agc"
        handles[order[0]].undo()
        handles[order[0]].undo()
        assert make(Trainer, tmp_path)._clip_spec == specs[order[1]]
        handles[order[1]].undo()
        assert type(make(Trainer, tmp_path)) is Trainer

    def test_undone_below_another_patch_it_is_still(self, tmp_path, monkeypatch):
        """Somebody else has wrapped the constructor since, and takes his wrapper away later."""
        init = vars(Trainer)["__init__"]
        handle = patch_all(clip=TIGHT)
        ours = vars(Trainer)["__init__"]
        Trainer.__init__ = lambda self, *args, **kwargs: ours(self, *args, **kwargs)
        try:
            handle.undo()
            assert type(make(Trainer, tmp_path)) is Trainer
        finally:
            Trainer.__init__ = init

    def test_a_wrong_spec_is_refused_at_once(self):
        with pytest.raises(SpecError, match="Did you mean zclip"):
            patch_all(clip="zclop")

    def test_what_a_trainer_is_refused_for_rises_where_it_is_made(self, tmp_path):
        with patch_all(clip="adaptive"), pytest.raises(UnsupportedBackendError, match="optim='lomo'"):
            make(Trainer, tmp_path, optim="lomo")


def test_the_names_are_public():
    assert {"patch", "patch_all"} <= {*hf_gradclip.__all__}

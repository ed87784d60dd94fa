"""Clip state in the Trainer's checkpoints: bit for bit on resume, and one clear sentence wherever it cannot be."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from transformers import Trainer

from hf_gradclip import Clipper, GradClipTrainer
from hf_gradclip.run.state import load_state, save_state
from hf_gradclip.state import flatten
from tests.integrations.loops import StopAt
from tests.tiny import logged, tiny_llama, train, weights_of


@pytest.fixture(autouse=True)
def _hear(caplog):
    caplog.set_level(logging.INFO, logger="hf_gradclip")


SPECS = [
    "zclip:warmup_steps=10,z_threshold=1,alpha=0.9",
    "adagc:warmup_steps=10",
    "autoclip:percentile=60,window=15",
    "mean_sigma:window=10,min_values=5,sigmas=0.3",
    "normalize",
    "percentile:percentile=60,window=15",
    "ada_clip:gamma=0.9",
]
BY_TENSOR = ("adagc", "normalize", "percentile", "ada_clip")


@pytest.mark.parametrize("clip", SPECS)
def test_resume_is_bitwise(tmp_path, clip, caplog) -> None:
    whole = train(GradClipTrainer, clip=clip, max_steps=40)
    train(GradClipTrainer, clip=clip, max_steps=40, callbacks=[StopAt(20)], output_dir=str(tmp_path))
    checkpoint = str(tmp_path / "checkpoint-20")
    resumed = train(GradClipTrainer, clip=clip, max_steps=40, resume=checkpoint, model=tiny_llama(seed=99))

    assert "starts anew" not in caplog.text
    assert torch.equal(weights_of(whole.model), weights_of(resumed.model))
    theirs, ours = flatten(whole.clipper.state), flatten(resumed.clipper.state)
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        assert torch.equal(value, ours[key]), key
    assert logged(whole, "clip/scale") == logged(resumed, "clip/scale"), "the resumed log history goes on"
    scales = logged(whole, "clip/rate")
    assert sum(scales[10:20]) > 0, "steps were clipped past the warm-up before the stop"
    assert sum(scales[20:]) > 0, "and after it"
    if not clip.startswith(BY_TENSOR):
        assert sum(scales[20:]) < 20

    fresh = tmp_path / "checkpoint-20" / "gradclip.pt"
    os.remove(fresh)
    lost = train(GradClipTrainer, clip=clip, max_steps=40, resume=checkpoint, model=tiny_llama(seed=99))
    assert not torch.equal(weights_of(whole.model), weights_of(lost.model)), "without the state the run differs"


def test_words_for_a_checkpoint_made_by_the_stock_trainer(tmp_path, caplog) -> None:
    train(Trainer, max_steps=20, callbacks=[StopAt(10)], output_dir=str(tmp_path))
    resumed = train(GradClipTrainer, clip="zclip:warmup_steps=5", max_steps=20, resume=str(tmp_path / "checkpoint-10"))
    assert "gradclip.pt is missing: the checkpoint was made without hf_gradclip" in caplog.text
    assert int(resumed.clipper.state.seen) == 10

    caplog.clear()
    train(GradClipTrainer, clip="global_norm", max_steps=20, resume=str(tmp_path / "checkpoint-10"))
    assert "missing" not in caplog.text, "a strategy without state has nothing to miss"


def test_words_for_a_checkpoint_of_another_strategy(tmp_path, caplog) -> None:
    train(GradClipTrainer, clip="adagc", max_steps=20, callbacks=[StopAt(10)], output_dir=str(tmp_path))
    checkpoint = str(tmp_path / "checkpoint-10")
    resumed = train(GradClipTrainer, clip="zclip", max_steps=20, resume=checkpoint)
    assert "clip state is of adagc:lambda_rel=1.04" in caplog.text
    assert "so zclip:z_threshold=2.5" in caplog.text
    assert int(resumed.clipper.state.seen) == 10

    caplog.clear()
    resumed = train(GradClipTrainer, clip="adagc:lambda_rel=1.1", max_steps=20, resume=checkpoint)
    assert "its statistics go on under adagc:lambda_rel=1.1" in caplog.text
    assert int(resumed.clipper.state.seen) == 20


def test_words_for_other_parameters(tmp_path, caplog) -> None:
    train(GradClipTrainer, clip="adagc", max_steps=20, callbacks=[StopAt(10)], output_dir=str(tmp_path))
    frozen = tiny_llama()
    frozen.model.norm.weight.requires_grad_(False)
    os.remove(tmp_path / "checkpoint-10" / "optimizer.pt")  # its groups would not fit the frozen model either
    resumed = train(GradClipTrainer, clip="adagc", max_steps=20, resume=str(tmp_path / "checkpoint-10"), model=frozen)
    assert "of other trainable parameters, so adagc:lambda_rel=1.04" in caplog.text
    assert int(resumed.clipper.state.seen) == 10


@pytest.mark.parametrize("content", [b"", b"some text", torch.ones(2), {"a": 1}, {"spec": "x", "state": {}}], ids=str)
def test_words_for_a_file_that_is_none_of_ours(tmp_path, caplog, content) -> None:
    settings = {"clip": "zclip:warmup_steps=5", "max_steps": 20}
    train(GradClipTrainer, callbacks=[StopAt(10)], output_dir=str(tmp_path), **settings)
    path = tmp_path / "checkpoint-10" / "gradclip.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    resumed = train(GradClipTrainer, resume=str(path.parent), **settings)
    assert "gradclip.pt: The saved clip state cannot be read, so zclip starts anew." in caplog.text
    assert int(resumed.clipper.state.seen) == 10


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("kind", ["code in it", "half of it"])
def test_a_state_that_is_hostile_or_cut_short_is_said_and_not_executed(tmp_path, caplog, kind) -> None:
    clipper = Clipper.for_model(tiny_llama(), "zclip")
    state, made = tmp_path / "gradclip.pt", tmp_path / "made"
    save_state(clipper, str(state))
    if kind == "code in it":
        torch.save({**clipper.state_dict(), "spec": Bomb(made)}, state)
        torch.load(state, weights_only=False)["spec"].close()
        assert made.exists(), "it goes off where a file is trusted"
        made.unlink()
    else:
        state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    load_state(clipper, str(state))
    assert not made.exists()
    assert "gradclip.pt: The saved clip state cannot be read, so zclip starts anew." in caplog.text


def test_save_only_model_keeps_no_state_and_says_so_on_resume(tmp_path, caplog) -> None:
    settings = {"clip": "zclip:warmup_steps=5", "max_steps": 20, "save_only_model": True}
    train(GradClipTrainer, callbacks=[StopAt(10)], output_dir=str(tmp_path), **settings)
    checkpoint = tmp_path / "checkpoint-10"
    assert not (checkpoint / "gradclip.pt").exists()
    train(GradClipTrainer, resume=str(checkpoint), **settings)
    assert "made without hf_gradclip or optimizer state. zclip starts anew" in caplog.text


def test_the_best_model_at_the_end_leaves_the_state_of_the_run(tmp_path) -> None:
    class WithEval(GradClipTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, eval_dataset=kwargs["train_dataset"][:16], **kwargs)

    trainer = train(
        WithEval,
        clip="zclip:warmup_steps=5",
        max_steps=20,
        output_dir=str(tmp_path),
        save_strategy="steps",
        save_steps=5,
        eval_strategy="steps",
        eval_steps=5,
        load_best_model_at_end=True,
        learning_rate=0.3,
        optim="sgd",
    )
    assert int(trainer.clipper.state.seen) == 20
    assert (tmp_path / "checkpoint-20" / "gradclip.pt").exists()


def test_a_second_train_goes_on_and_a_new_optimizer_starts_anew(tmp_path, caplog) -> None:
    trainer = train(GradClipTrainer, clip="zclip:warmup_steps=5", max_steps=10)
    trainer.args.output_dir = str(tmp_path)
    trainer.train()
    assert int(trainer.clipper.state.seen) == 20
    trainer.optimizer = None
    trainer.train()
    assert "The optimizer or the batch size is a new one" in caplog.text
    assert int(trainer.clipper.state.seen) == 10


def test_auto_find_batch_size_starts_anew(caplog) -> None:
    class Small(GradClipTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.state.global_step == 3 and len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = train(Small, clip="zclip:warmup_steps=5", max_steps=8, auto_find_batch_size=True)
    assert "The optimizer or the batch size is a new one" in caplog.text
    assert int(trainer.clipper.state.seen) == 8

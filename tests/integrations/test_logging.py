"""What of clipping reaches log history, trackers and console."""

from __future__ import annotations

import ast
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from hf_gradclip import ClipConfig, GradClipTrainer, attach, patch
from hf_gradclip.config import SpecError
from tests.tiny import counting_data, tiny_llama, train, training_args

WORDS = ["norm_mean", "norm_max", "norm_post", "scale", "threshold", "rate", "tensor_rate", "skipped", "nonfinite"]


def made(folder: Any, clip: Any, callbacks: Any = (), cls: type[Trainer] = GradClipTrainer, **changes: Any) -> Trainer:
    args = training_args(str(folder), max_steps=2, **changes)
    given = {"clip": clip} if cls is GradClipTrainer else {}
    return cls(model=tiny_llama(), args=args, train_dataset=counting_data(), callbacks=[*callbacks], **given)


def ours(entry: Any) -> list[str]:
    return [key for key in entry if key.startswith("clip")]


def printed(text: str) -> list[list[str]]:
    """The keys of clipping in each line that is a log of training."""
    lines = [ast.literal_eval(line) for line in text.splitlines() if line.startswith("{") and "'loss'" in line]
    return [ours(line) for line in lines]


@pytest.mark.parametrize(
    ("log", "words"), [("all", WORDS), ("rate,norm_mean", ["rate", "norm_mean"]), ("none", []), (["scale"], ["scale"])]
)
def test_the_chosen_keys_are_logged(log, words, caplog):
    clip = {"gradient": "global_norm:max_norm=0.1", "update": "param_norm:max_norm=0.1", "log": log}
    trainer = train(GradClipTrainer, clip=clip, max_steps=3)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert ours(entry) == [f"{prefix}/{word}" for prefix in ("clip", "clip_update") for word in words]


def test_what_is_not_logged_is_still_looked_at(caplog):
    """A gradient below the eps of Adam is told by norms that nobody asked to be logged."""
    clip = {"gradient": "global_norm:max_norm=1e-12", "log": "none"}
    train(GradClipTrainer, clip=clip, max_steps=3)
    assert "below its eps" in caplog.text


@pytest.mark.parametrize("quiet", [True, False], ids=["printer", "progress"])
@pytest.mark.parametrize(("console", "words"), [(None, ["rate", "scale"]), (1, ["rate"]), (0, [])])
def test_the_first_ones_are_printed(console, words, quiet, tmp_path, capsys):
    clip = {"gradient": "global_norm:max_norm=0.1", "log": "rate,scale", "console": console}
    trainer = made(tmp_path, clip, disable_tqdm=quiet)
    trainer.train()
    said = capsys.readouterr().out
    assert printed(said) == [[f"clip/{word}" for word in words]] * 2
    assert "grad_norm" in said
    assert all(ours(e) == ["clip/rate", "clip/scale"] for e in trainer.state.log_history if "loss" in e)


def test_undone_everything_is_printed_again(tmp_path, capsys):
    trainer = made(tmp_path, None, cls=Trainer)
    with patch(trainer, clip={"gradient": "zclip", "console": 0}):
        trainer.train()
    printers = [c for c in trainer.callback_handler.callbacks if isinstance(c, (PrinterCallback, ProgressCallback))]
    assert printers
    assert not any("on_log" in vars(callback) for callback in printers)


class Late(TrainerCallback):
    """Comes after the printer, which takes `total_flos` out of the logs."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen += logs


@pytest.mark.parametrize("console", [None, 0])
def test_whoever_comes_after_the_printer_sees_the_same(console, tmp_path):
    late = Late()
    trainer = made(tmp_path, {"gradient": "zclip", "console": console})
    trainer.add_callback(late)
    trainer.train()
    assert "total_flos" not in late.seen
    assert "clip/rate" in late.seen


def test_tensorboard_keeps_the_configuration(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    clip = {"gradient": "zclip:warmup_steps=3", "check_every": 7, "log": "rate"}
    trainer = made(tmp_path, clip, report_to="tensorboard")
    trainer.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out*")}
    events = EventAccumulator(str(folder)).Reload()
    (text,) = events.Tensors("gradclip/text_summary")
    assert ClipConfig.parse(json.loads(text.tensor_proto.string_val[0])) == ClipConfig.parse(clip)
    assert [tag for tag in events.Tags()["scalars"] if "clip" in tag] == ["train/clip/rate"], "as the docs name it"


class Tracked(TrainerCallback):
    """As the callbacks for Weights & Biases, Trackio and SwanLab keep their module."""

    def __init__(self, attribute: str) -> None:
        self.kept: dict[str, Any] = {"gradclip": "of the run that is resumed"}
        self.changes: list[Any] = []
        setattr(self, attribute, SimpleNamespace(config=self, log=lambda *args, **kwargs: None))

    def update(self, values: Any, **more: Any) -> None:
        self.kept |= values
        self.changes.append(more)


@pytest.mark.parametrize(
    ("attribute", "more"),
    [("_wandb", {"allow_val_change": True}), ("_trackio", {"allow_val_change": True}), ("_swanlab", {})],
)
def test_other_trackers_keep_it_too(attribute, more, tmp_path):
    tracked = Tracked(attribute)
    made(tmp_path, "zclip:warmup_steps=3", callbacks=[tracked]).train()
    assert ClipConfig.parse(tracked.kept["gradclip"]) == ClipConfig.parse("zclip:warmup_steps=3")
    assert tracked.changes == [more]


class TestAttach:
    def test_the_chosen_keys(self, caplog):
        caplog.set_level(logging.WARNING)
        accelerator = Accelerator(cpu=True)
        attachment = attach(accelerator, {"gradient": "global_norm:max_norm=0.1", "log": "rate,norm_max"}, auto=True)
        model = torch.nn.Linear(2, 1)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        accelerator.backward(model(torch.ones(1, 2)).square().sum())
        optimizer.step()
        assert [*attachment.scalars()] == ["clip/rate", "clip/norm_max"]
        assert ClipConfig.parse(attachment.clipper.config.to_dict()) == attachment.clipper.config

    def test_nobody_prints(self):
        with pytest.raises(SpecError, match=r"'console': 2}\): a loop prints what it wants itself\. Leave it out"):
            attach(Accelerator(cpu=True), {"gradient": "zclip", "console": 2})

"""What goes wrong with a record, or with a picture of a NaN, is said, and the run goes on to its `save_model()`."""

from __future__ import annotations

import gc
import json
import logging
import sys
import types
import weakref
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from transformers import PrinterCallback, TrainerCallback

import hf_gradclip
from hf_gradclip import GradClipTrainer
from hf_gradclip.record.files import read_record
from tests.integrations.loops import StopAt
from tests.integrations.recorded import CLIP, RECORD
from tests.tiny import counting_data, tiny_llama, train, training_args


@pytest.fixture(autouse=True)
def _hear(caplog):
    caplog.set_level(logging.INFO, logger="hf_gradclip")


def parts_in(folder: Path) -> list[Path]:
    return sorted((folder / "gradclip").glob("gradient-*.parquet"))


def cut(path: Path) -> None:
    """As a disk that was full leaves a file."""
    path.write_bytes(path.read_bytes()[:-200])


class AtLog(TrainerCallback):
    """Does something right after the last log, whose steps were written by then."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_log(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


class TestAFinishedRun:
    @pytest.mark.parametrize("fault", ["disk full", "truncated part"])
    def test_is_saved_whatever_the_joining_meets(self, tmp_path, monkeypatch, caplog, fault) -> None:
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        def act():
            assert len(parts_in(tmp_path)) == 3
            if fault == "disk full":
                monkeypatch.setattr(pq, "write_table", full)
            else:
                cut(parts_in(tmp_path)[1])

        settings = {"max_steps": 30, "logging_steps": 10, "output_dir": str(tmp_path), "callbacks": [AtLog(30, act)]}
        trainer = train(GradClipTrainer, clip=RECORD, **settings)
        trainer.save_model()
        assert (tmp_path / "model.safetensors").exists()
        assert len(parts_in(tmp_path)) == 3, "what was written is there"
        assert not list((tmp_path / "gradclip").glob("*.tmp"))
        if fault == "disk full":
            assert caplog.text.count("cannot be written ([Errno 28] No space left on device). The run goes on") == 1
            assert read_record(tmp_path).step_T.tolist() == [*range(1, 31)]
        else:
            with pytest.raises(ValueError, match=r"gradient-000000011-000000020\.parquet: cannot be read .* 11 to 20"):
                read_record(tmp_path)

    def test_goes_on_beside_a_damaged_part_when_it_is_resumed(self, tmp_path, caplog) -> None:
        settings = {"max_steps": 40, "logging_steps": 10, "output_dir": str(tmp_path)}
        train(GradClipTrainer, clip=RECORD, callbacks=[StopAt(20)], **settings)
        [joined] = parts_in(tmp_path)
        cut(joined)
        train(GradClipTrainer, clip=RECORD, resume=str(tmp_path / "checkpoint-20"), **settings)
        assert read_record(tmp_path).step_T.tolist() == [*range(21, 41)]
        assert f"It is kept as {joined.name}.damaged" in caplog.text
        assert joined.with_name(f"{joined.name}.damaged").exists()


def test_after_a_write_failure_no_batch_is_held(tmp_path, monkeypatch) -> None:
    """On a full disk: of 40 steps, the indices of the last ones alone may still be there."""
    indices = []

    class Watching(GradClipTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            indices.append(weakref.ref(inputs["gradclip_examples"]))
            return super().training_step(model, inputs, *args, **kwargs)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    alive = []

    def count():
        gc.collect()
        alive.append(sum(ref() is not None for ref in indices))

    monkeypatch.setattr(pq, "write_table", full)
    callbacks = [AtLog(30, count)]
    train(Watching, clip=RECORD, max_steps=32, logging_steps=10, output_dir=str(tmp_path), callbacks=callbacks)
    assert len(indices) == 32
    assert alive[0] < 12


class TestHistograms:
    """The trackers' own histograms, of a step with a NaN: TensorBoard's, and numpy's, which is Weights & Biases'."""

    @pytest.mark.parametrize("broken", ["one", "all"])
    def test_a_nan_step_does_not_end_the_run(self, tmp_path, monkeypatch, broken) -> None:
        from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

        class Nan(GradClipTrainer):
            def _clip_grad_norm(self, model):
                if self.state.global_step == 3:
                    for p in list(model.parameters())[: None if broken == "all" else 1]:
                        p.grad.view(-1)[0] = float("nan")
                return super()._clip_grad_norm(model)

        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
        sent = []
        wandb = types.ModuleType("wandb")
        wandb.Histogram = lambda values: np.histogram(values, bins=64)
        monkeypatch.setitem(sys.modules, "wandb", wandb)

        class Board(TrainerCallback):
            _wandb = types.SimpleNamespace(log=lambda values: sent.append(values))

        settings = {"max_steps": 12, "logging_steps": 1, "report_to": "tensorboard", "output_dir": str(tmp_path)}
        clip = {**RECORD, "histogram_every": 4}
        trainer = train(Nan, clip=clip, callbacks=[Board()], **settings)
        assert trainer.state.global_step == 12
        assert [entry["clip/nonfinite"] for entry in trainer.state.log_history[:5]] == [0, 0, 0, 1, 0]
        events = EventAccumulator(str(tmp_path / "tb"), size_guidance={HISTOGRAMS: 0}).Reload()
        drawn = {event.step: event.histogram_value for event in events.Histograms("clip/param_norm")}
        record = read_record(tmp_path)
        wanted = {"one": {4: 20, 8: 21, 12: 21}, "all": {5: 21, 9: 21}}[broken]
        assert {step: value.num for step, value in drawn.items()} == wanted
        for step, value in drawn.items():
            norms = record.norm_TP[step - 1]
            assert value.sum == pytest.approx(norms[np.isfinite(norms)].sum(), rel=1e-5)
        assert [values["train/global_step"] for values in sent] == [*wanted]
        assert [int(values["clip/param_norm"][0].sum()) for values in sent] == [*wanted.values()]


def loop(folder: Path, steps: int, scalars: int = 10**9, resume: Path | None = None, save: Path | None = None):
    """A plain Accelerate loop that is recorded; what its last steps hold on to."""
    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, CLIP, auto=True, record=folder)
    model = torch.nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-4))
    if resume is not None:
        accelerator.load_state(str(resume))
    generator = torch.Generator().manual_seed(0)
    for i in range(1, steps + 1):
        accelerator.backward(model(torch.randn(4, 3, generator=generator)).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        if i % scalars == 0:
            attachment.scalars()
    if save is not None:
        accelerator.save_state(str(save))
    return accelerator, attachment


def test_a_loop_that_never_asks_holds_a_thousand_steps_at_most(tmp_path) -> None:
    accelerator, _ = loop(tmp_path, 2345)
    assert read_record(tmp_path).step_T.tolist() == [*range(1, 2001)], "written by itself"
    accelerator.end_training()
    assert read_record(tmp_path).step_T.tolist() == [*range(1, 2346)]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": "7"}', '{"step": -1}', '{"step": true}', "\x00\x01"])
def test_a_damaged_step_file_is_said(tmp_path, caplog, content) -> None:
    loop(tmp_path / "run", 3, scalars=1, save=tmp_path / "saved")
    path = tmp_path / "saved" / "gradclip_record.json"
    assert json.loads(path.read_text()) == {"step": 3}
    path.write_text(content)
    accelerator, _ = loop(tmp_path / "run", 2, resume=tmp_path / "saved")
    accelerator.end_training()
    assert "gradclip_record.json is damaged, so the recorded steps count from 1" in caplog.text
    assert read_record(tmp_path / "run").step_T.tolist() == [1, 2]
    assert read_record(tmp_path / "run" / "gradclip.old1").step_T.tolist() == [1, 2, 3]


def test_two_runs_in_one_folder_do_not_mix(tmp_path, caplog) -> None:
    """The second one takes the folder over; the first says so, trains on, and leaves it alone."""

    def second():
        other = GradClipTrainer(
            model=tiny_llama(seed=5),
            args=training_args(str(tmp_path), max_steps=15, logging_steps=5),
            train_dataset=counting_data(),
            clip={"gradient": "none", "record": True},
        )
        other.remove_callback(PrinterCallback)
        other.train()

    settings = {"max_steps": 40, "logging_steps": 10, "output_dir": str(tmp_path), "callbacks": [AtLog(20, second)]}
    first = train(GradClipTrainer, clip=RECORD, **settings)
    assert first.state.global_step == 40
    record = read_record(tmp_path)
    assert record.step_T.tolist() == [*range(1, 16)]
    assert (record.meta["spec"], record.earlier) == ("none", ())
    assert read_record(tmp_path / "gradclip.old1").step_T.tolist() == [*range(1, 21)]
    assert caplog.text.count("belongs to another run now") == 1

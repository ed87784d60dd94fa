"""The record of whole runs: equal to what the run logged, through stops, kills, full disks and poisoned batches."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import IterableDataset

import hf_gradclip
from hf_gradclip import GradClipTrainer
from hf_gradclip.cli import main
from hf_gradclip.config import SpecError
from hf_gradclip.record.files import read_record
from hf_gradclip.run import recording
from hf_gradclip.strategies.global_norm import GlobalNorm
from tests.integrations.loops import StopAt, batches
from tests.integrations.recorded import CLIP, RECORD, PoisonedTrainer, is_poison, poisoned_data
from tests.tiny import counting_data, logged, tiny_llama, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _hear(caplog):
    caplog.set_level(logging.INFO, logger="hf_gradclip")


def record_of(folder: Path, place: str = "gradient") -> dict[str, np.ndarray]:
    """The columns as pyarrow reads them; every step once, in order."""
    tables = [pq.ParquetFile(path).read() for path in sorted((folder / "gradclip").glob(f"{place}-*.parquet"))]
    columns = {name: np.concatenate([np.array(t[name].to_pylist()) for t in tables]) for name in tables[0].column_names}
    assert (np.diff(columns["step"]) >= 1).all()
    return columns


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


class Measured(GradClipTrainer):
    """Measures every parameter before and after the clip, in float64."""

    def _clip_grad_norm(self, model):
        self.before = [*getattr(self, "before", []), self.norms(model)]
        norm = super()._clip_grad_norm(model)
        self.after = [*getattr(self, "after", []), self.norms(model)]
        return norm

    def norms(self, model):
        return [p.grad.double().norm().item() for p in model.parameters()]


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 3}], ids=["plain", "accumulation"])
def test_the_record_is_what_the_run_did(tmp_path, settings) -> None:
    trainer = train(Measured, clip=RECORD, max_steps=24, logging_steps=4, output_dir=str(tmp_path), **settings)
    found = record_of(tmp_path)
    before, after = np.array(trainer.before), np.array(trainer.after)
    assert found["step"].tolist() == [*range(1, 25)]
    np.testing.assert_allclose(found["norms"], before, rtol=1e-5)
    np.testing.assert_allclose(found["scales"], after / before, rtol=1e-5)
    np.testing.assert_allclose(found["norm"][3::4], logged(trainer), rtol=1e-6)
    np.testing.assert_allclose(found["loss"].reshape(6, 4).mean(1), logged(trainer, "loss"), rtol=1e-6)
    np.testing.assert_allclose(found["learning_rate"][3::4], logged(trainer, "learning_rate"), rtol=1e-6)
    assert found["learning_rate"][0] > found["learning_rate"][-1]
    meta = read_record(tmp_path).meta
    assert meta["names"] == [name for name, _ in trainer.model.named_parameters()]
    assert meta["numel"] == [p.numel() for p in trainer.model.parameters()]
    assert meta["spec"].startswith("zclip:")


def test_nothing_is_recorded_unasked(tmp_path) -> None:
    train(GradClipTrainer, clip=CLIP, max_steps=2, output_dir=str(tmp_path))
    assert not (tmp_path / "gradclip").exists()


def test_skips_and_nans_are_recorded(tmp_path) -> None:
    class Nan(GradClipTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * (float("nan") if self.state.global_step == 5 else 1.0)

    train(Nan, clip=RECORD, max_steps=12, output_dir=str(tmp_path))
    found = record_of(tmp_path)
    assert np.flatnonzero(found["skipped"]).tolist() == np.flatnonzero(~found["finite"]).tolist() == [5]
    assert np.isnan(found["norm"]).tolist() == np.isnan(found["loss"]).tolist() == [i == 5 for i in range(12)]


def test_updates_are_recorded_beside_gradients(tmp_path, caplog) -> None:
    clip = {**RECORD, "update": "block_rms:max_rms=0.3"}
    trainer = train(GradClipTrainer, clip=clip, max_steps=12, optim="adamw_torch", output_dir=str(tmp_path))
    gradient, update = record_of(tmp_path), record_of(tmp_path, "update")
    for name in ("step", "loss", "learning_rate"):
        np.testing.assert_array_equal(gradient[name], update[name], err_msg=name)
    norms = logged(trainer, "clip_update/norm_mean")
    np.testing.assert_allclose(update["norm"], norms, rtol=1e-6)
    assert (update["scales"] < 1).any()
    assert read_record(tmp_path, "update").meta["spec"].startswith("block_rms")
    for prefix, found in (("clip", gradient), ("clip_update", update)):
        clipped = (found["scales"] < 1).any(axis=1).sum()
        assert f"{prefix}: steps 12, clipped {clipped} ({clipped / 12:.1%}), skipped 0, non-finite 0" in caplog.text


def test_five_and_five_are_ten(tmp_path, caplog) -> None:
    settings = {"clip": RECORD, "max_steps": 10, "logging_steps": 2}
    train(GradClipTrainer, output_dir=str(tmp_path / "ten"), **settings)
    twice = str(tmp_path / "twice")
    train(GradClipTrainer, output_dir=twice, callbacks=[StopAt(5)], **settings)
    assert record_of(tmp_path / "twice")["step"].tolist() == [1, 2, 3, 4, 5]
    resume = str(tmp_path / "twice" / "checkpoint-5")
    train(GradClipTrainer, output_dir=twice, resume=resume, model=tiny_llama(seed=9), **settings)
    assert_same(record_of(tmp_path / "ten"), record_of(tmp_path / "twice"))
    train(GradClipTrainer, output_dir=twice, resume=resume, model=tiny_llama(seed=9), **settings)
    assert "record: 5 steps past the resumed step 5 are dropped" in caplog.text
    assert_same(record_of(tmp_path / "ten"), record_of(tmp_path / "twice"))


def test_a_run_that_goes_on_under_another_strategy(tmp_path, capsys) -> None:
    """Every step keeps the words of what clipped it, through joining, reading, the report and the replay."""
    first, second = ({"gradient": f"global_norm:max_norm={limit}", "record": True} for limit in (0.1, 100))
    settings = {"max_steps": 14, "logging_steps": 2, "output_dir": str(tmp_path)}
    train(GradClipTrainer, clip=first, callbacks=[StopAt(8)], **settings)
    train(GradClipTrainer, clip=second, resume=str(tmp_path / "checkpoint-8"), **settings)
    record = read_record(tmp_path)
    assert record.step_T.tolist() == list(range(1, 15))
    assert record.meta["spec"].startswith("global_norm:max_norm=100")
    assert [(meta["spec"][:24], meta["last"]) for meta in record.earlier] == [("global_norm:max_norm=0.1", 8)]
    assert len(list((tmp_path / "gradclip").glob("gradient-*.parquet"))) == 2

    assert main(["report", "--text", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Steps 1 to 8, under global_norm:max_norm=0.1" in said
    assert "The gradient was clipped in 8 of 8 steps (100%)" in said
    assert "Steps 9 to 14, under global_norm:max_norm=100" in said
    assert "The gradient was clipped in 0 of 6 steps (0%)" in said
    assert main(["replay", str(tmp_path)]) == 0
    assert "What was recorded is" not in capsys.readouterr().out


def test_a_strategy_of_ones_own_has_its_warm_up_in_the_record(tmp_path) -> None:
    """The report does not import it to ask."""

    @dataclass(frozen=True)
    class Patient(GlobalNorm):
        warmup_steps: int = 7

    train(GradClipTrainer, clip={"gradient": Patient(), "record": True}, max_steps=3, output_dir=str(tmp_path))
    assert read_record(tmp_path).meta["warmup"] == 7


def test_a_new_run_in_an_old_folder_keeps_the_old_record(tmp_path, caplog) -> None:
    train(GradClipTrainer, clip=RECORD, max_steps=6, output_dir=str(tmp_path))
    old = record_of(tmp_path)
    train(GradClipTrainer, clip=RECORD, max_steps=3, output_dir=str(tmp_path), model=tiny_llama(seed=4))
    assert record_of(tmp_path)["step"].tolist() == [1, 2, 3]
    assert "it is kept as gradclip.old1" in caplog.text
    (tmp_path / "gradclip.old1").rename(tmp_path / "apart")
    kept = pq.read_table(next((tmp_path / "apart").glob("*.parquet")))
    assert kept["norm"].to_pylist() == old["norm"].tolist()


@pytest.mark.parametrize("by_accelerator", [True, False])
def test_a_new_loop_in_an_old_folder_keeps_the_old_record(by_accelerator, tmp_path, caplog) -> None:
    for steps in (6, 3):
        accelerator = Accelerator(cpu=True)
        hf_gradclip.attach(accelerator, "none", record=tmp_path, auto=True)
        model = torch.nn.Linear(2, 1)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(steps):
            loss = model(torch.ones(1, 2)).sum()
            accelerator.backward(loss) if by_accelerator else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        accelerator.end_training()
    assert record_of(tmp_path)["step"].tolist() == [1, 2, 3]
    assert "it is kept as gradclip.old1" in caplog.text


def test_an_exception_leaves_the_record_of_every_step(tmp_path) -> None:
    class Fails(GradClipTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 7:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        train(Fails, clip=RECORD, max_steps=12, logging_steps=50, output_dir=str(tmp_path))
    assert record_of(tmp_path)["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_a_full_disk_does_not_stop_training(tmp_path, monkeypatch, caplog) -> None:
    written = []

    def full(*args, **kwargs):
        written.append(args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "write_part", full)
    trainer = train(GradClipTrainer, clip=RECORD, max_steps=30, logging_steps=10, output_dir=str(tmp_path))
    assert trainer.state.global_step == 30
    assert len(logged(trainer, "clip/rate")) == 3
    assert caplog.text.count("cannot be written") == 1
    assert "No space left on device" in caplog.text
    assert len(written) == 1, "recording is off after the first failure"


def test_a_killed_run_goes_on_without_gap_or_duplicate(tmp_path) -> None:
    train(GradClipTrainer, clip=RECORD, max_steps=30, logging_steps=3, output_dir=str(tmp_path / "whole"))
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.integrations.recorded", str(killed)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "at_17").exists() and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = record_of(killed)["step"].tolist()
    assert before == [*range(1, len(before) + 1)]
    assert len(before) >= 10, "a kill loses what was buffered, the steps up to the last save are there"
    resume = str(killed / "checkpoint-10")
    settings = {"clip": RECORD, "max_steps": 30, "logging_steps": 3}
    train(GradClipTrainer, output_dir=str(killed), resume=resume, model=tiny_llama(seed=9), **settings)
    assert_same(record_of(tmp_path / "whole"), record_of(killed))


@pytest.mark.parametrize("kind", ["list", "dataset"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_spike_names_the_poisoned_example(tmp_path, kind, accumulate) -> None:
    data = poisoned_data()
    if kind == "dataset":
        data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} | {"note": "unused"} for row in data])
        data = data.with_format("torch")
    settings = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 4 // accumulate}
    trainer = train(
        PoisonedTrainer, clip=RECORD, data=data, max_steps=60, logging_steps=7, output_dir=str(tmp_path), **settings
    )
    norms, late = record_of(tmp_path), [step for step in trainer.poisoned_steps if step > 25]
    assert len(late) >= 2
    found = {f["step"]: f for f in (json.loads(p.read_text()) for p in (tmp_path / "gradclip" / "spikes").iterdir())}
    assert set(late) == {step for step in found if step > 25}
    for step in late:
        spike = found[step]
        assert any(is_poison(data[i]["input_ids"]) for i in spike["examples"])
        assert len(spike["examples"]) == 4
        assert spike["rank"] == 0
        assert "text" not in spike
        row = step - 1
        assert spike["norm"] == norms["norm"][row]
        shares = norms["norms"][row].astype(np.float64) ** 2 / (norms["norms"][row].astype(np.float64) ** 2).sum()
        assert spike["tensors"][0]["share"] == pytest.approx(shares.max(), rel=1e-5)
        assert spike["tensors"][0]["name"] == [n for n, _ in trainer.model.named_parameters()][shares.argmax()]


def test_workers_carry_the_indices_too(tmp_path) -> None:
    data = poisoned_data()
    settings = {"dataloader_num_workers": 1, "max_steps": 60, "output_dir": str(tmp_path)}
    trainer = train(PoisonedTrainer, clip={**RECORD, "record": "text"}, data=data, **settings)
    late = [step for step in trainer.poisoned_steps if step > 25]
    spike = json.loads((tmp_path / "gradclip" / "spikes" / f"step_{late[0]}.json").read_text())
    assert any(is_poison(data[i]["input_ids"]) for i in spike["examples"])
    assert spike["text"] == ["unknown"] * 4, "there is no tokenizer to decode with"


def test_iterable_data_has_no_indices(tmp_path) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(poisoned_data())

    trainer = train(PoisonedTrainer, clip=RECORD, data=Stream(), max_steps=60, output_dir=str(tmp_path))
    late = [step for step in trainer.poisoned_steps if step > 25]
    spike = json.loads((tmp_path / "gradclip" / "spikes" / f"step_{late[0]}.json").read_text())
    assert spike["examples"] == "unknown"


def loop(folder: Path, steps: range, seed: int = 0, resume: str | None = None, save: str | None = None) -> list[float]:
    """A plain Accelerate loop; its losses."""
    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, CLIP, record=folder)
    model = tiny_llama(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    if resume:
        accelerator.load_state(resume)
    data, losses = counting_data(), []
    for i in steps:
        rows = data[4 * i : 4 * i + 4]
        loss = model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        attachment.scalars()
        if save and i == 4:
            accelerator.save_state(save)
    accelerator.end_training()
    return losses


def test_a_plain_loop_is_recorded_and_resumed(tmp_path, caplog) -> None:
    losses = loop(tmp_path / "ten", range(10))
    whole = record_of(tmp_path / "ten")
    np.testing.assert_allclose(whole["loss"], losses, rtol=1e-6)
    assert "clip: steps 10, clipped" in caplog.text
    np.testing.assert_allclose(whole["learning_rate"], 3e-3, rtol=1e-6)
    checkpoint = str(tmp_path / "checkpoint")
    loop(tmp_path / "twice", range(8), save=checkpoint)
    loop(tmp_path / "twice", range(5, 10), seed=9, resume=checkpoint)
    assert "record: 3 steps past the resumed step 5 are dropped" in caplog.text
    assert_same(whole, record_of(tmp_path / "twice"))
    loop(tmp_path / "twice", range(2))
    assert record_of(tmp_path / "twice")["step"].tolist() == [1, 2]
    assert "it is kept as gradclip.old1" in caplog.text


def test_an_unfrozen_layer_loses_no_recorded_step(tmp_path) -> None:
    class Unfreeze(GradClipTrainer):
        def training_step(self, model, *args, **kwargs):
            if self.state.global_step == 15:
                model.model.layers[0].requires_grad_(True)
            return super().training_step(model, *args, **kwargs)

    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    clip = {"gradient": "adagc:warmup_steps=5", "record": True}
    train(Unfreeze, clip=clip, model=model, max_steps=30, logging_steps=100, optim="sgd", output_dir=str(tmp_path))
    record = read_record(tmp_path)
    assert record.step_T.tolist() == list(range(1, 31))
    late = [i for i, name in enumerate(record.names) if "layers.0" in name]
    assert np.isnan(record.norm_TP[:15, late]).all()
    assert (record.norm_TP[15:, late] > 0).all()
    assert np.isfinite(record.loss_T).all()


def test_a_learning_rate_that_is_a_tensor_is_recorded_as_it_was(tmp_path) -> None:
    accelerator = Accelerator(cpu=True)
    attachment = hf_gradclip.attach(accelerator, CLIP, auto=True, record=tmp_path)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3), foreach=False)
    model, optimizer = accelerator.prepare(model, optimizer)
    for i, (batch, _) in enumerate(batches(5)):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"].fill_(1e-3 / 2 ** (i + 1))
    attachment.finish()
    np.testing.assert_allclose(read_record(tmp_path).learning_rate_T, [1e-3 / 2**i for i in range(5)], rtol=1e-6)


def test_a_record_without_a_folder_is_refused() -> None:
    with pytest.raises(SpecError, match="Give record='a/folder'"):
        hf_gradclip.attach(Accelerator(cpu=True), RECORD)


def test_histograms_reach_tensorboard(tmp_path, monkeypatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    clip = {**RECORD, "histogram_every": 4}
    settings = {"max_steps": 12, "logging_steps": 2, "report_to": "tensorboard", "output_dir": str(tmp_path)}
    train(GradClipTrainer, clip=clip, **settings)
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={HISTOGRAMS: 0}).Reload()
    drawn = events.Histograms("clip/param_norm")
    assert [event.step for event in drawn] == [4, 8, 12]
    norms = record_of(tmp_path)["norms"]
    for event in drawn:
        assert event.histogram_value.num == norms.shape[1]
        assert event.histogram_value.sum == pytest.approx(norms[event.step - 1].sum(), rel=1e-5)
        assert event.histogram_value.max == pytest.approx(norms[event.step - 1].max(), rel=1e-5)


def test_histograms_of_a_plain_loop(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    attachment = hf_gradclip.attach(accelerator, {"gradient": "none", "histogram_every": 3})
    model = tiny_llama()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    norms = {}
    for step, (batch, _) in enumerate(batches(7), start=1):
        accelerator.backward(model(**batch).loss)
        norms[step] = torch.stack([p.grad.double().norm() for p in model.parameters()])
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log(attachment.scalars(), step=step)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={HISTOGRAMS: 0}).Reload()
    drawn = events.Histograms("clip/param_norm")
    assert [event.step for event in drawn] == [3, 6]
    assert [event.histogram_value.sum for event in drawn] == pytest.approx([float(norms[i].sum()) for i in (3, 6)])
    assert {"clip/norm_mean", "clip/rate"} <= set(events.Tags()["scalars"])

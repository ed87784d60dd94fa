"""scripts/finetune.py: the main job end to end, at a size that takes seconds."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_gradclip.record.files import read_record
from hf_gradclip.strategy import SpecError

ROOT = Path(__file__).parents[2]
SMALL = (
    "--max_steps 12 --max_text_bytes 150000 --vocab_size 400 --block_size 32 --max_eval_samples 16 --logging_steps 3"
)
SMALL += " --eval_steps 6 --save_steps 6 --warmup_steps 2"
ZCLIP = "zclip:warmup_steps=4,z_threshold=0.5,max_norm=1"


def launch(*flags: str) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "scripts/finetune.py", *SMALL.split(), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_main_job_and_its_resume(tmp_path, caplog, capsys) -> None:
    flags = ["--clip", ZCLIP, "--output_dir", str(tmp_path)]
    first = launch(*flags)
    assert "clip: zclip:z_threshold=0.5" in first
    assert "12/12" in first, "a progress bar"
    assert "steps 12, clipped" in first
    assert "norm: median" in first
    assert "threshold at the end" in first
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.2
    assert 0 < metrics["clip/clipped"] < 12
    history = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    saved = torch.load(tmp_path / "checkpoint-6" / "gradclip.pt", weights_only=True)
    assert saved["state"]["seen"] == 6
    assert (tmp_path / "model.safetensors").exists()

    killed = tmp_path / "checkpoint-13"  # while it was saved
    killed.mkdir()
    half = (tmp_path / "checkpoint-12" / "model.safetensors").read_bytes()
    (killed / "model.safetensors").write_bytes(half[: len(half) // 2])
    caplog.set_level(logging.INFO, logger="hf_gradclip")
    script().main([*SMALL.split(), *flags, "--max_steps", "14", "--resume_from_checkpoint", "true"])
    said = capsys.readouterr().out
    assert f"{killed} is passed over: trainer_state.json is missing" in said
    assert f"going on from {tmp_path / 'checkpoint-12'}." in said
    assert "starts anew" not in caplog.text
    assert "steps 2, clipped" in caplog.text

    ended = json.loads((tmp_path / "metrics.json").read_text())["eval_loss"]
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()  # as if it had been killed before it was saved
    again = script().main([*SMALL.split(), *flags, "--max_steps", "14", "--resume_from_checkpoint", "true"])
    assert "checkpoint-14 is of step 14, where a run of --max_steps 14 has ended" in capsys.readouterr().out
    assert again["eval_loss"] == pytest.approx(ended, rel=1e-6)
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_files_lora_and_a_run_file(tmp_path, caplog) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of a small file, with {i * i} in it" for i in range(2000)))
    run = tmp_path / "run.yaml"
    run.write_text(f"clip: adagc:warmup_steps=4\nlora_r: 4\ntrain_file: {text}\noutput_dir: {tmp_path / 'out'}\n")
    caplog.set_level(logging.INFO, logger="hf_gradclip")
    script().main([str(run), *SMALL.split(), "--learning_rate", "1e-2"])
    assert "clip: adagc:lambda_rel=1.04,beta=0.99,warmup_steps=4" in caplog.text
    saved = torch.load(tmp_path / "out" / "checkpoint-12" / "gradclip.pt", weights_only=True)
    assert saved["names"]
    assert all("lora_" in name for name in saved["names"])
    assert (saved["state"]["gamma_S"] < float("inf")).all(), "LoRA's A has no gradient at step 1; it is not lost"
    assert (saved["state"]["gamma_S"] > 0).all()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def script():
    spec = importlib.util.spec_from_file_location("finetune", ROOT / "scripts" / "finetune.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["finetune"] = module  # where dataclasses look their types up
    spec.loader.exec_module(module)
    return module


def test_a_run_file_may_leave_a_value_open(tmp_path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("clip: null\nmax_grad_norm: 0.5\n")
    clip_args, _, args = script().parse([str(run), "--output_dir", str(tmp_path)])
    assert clip_args.clip is None
    assert args.max_grad_norm == 0.5
    run.write_text("")
    assert script().parse([str(run), "--output_dir", str(tmp_path)])[0].clip is not None, "the default"


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("clip: {gradient: adaptive, update: block_rms}", [], "clip must be one value. Put it into a file of its own"),
        ("- clip", [], "must hold lines of key: value"),
        ("clip: zclip", ["--max_steps", "2"], "a file of arguments comes first, before all flags"),
    ],
)
def test_a_wrong_run_file_is_explained(tmp_path, capsys, text, flags, words) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(text)
    with pytest.raises(SystemExit):
        script().parse([*flags, str(run)])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("optimizer", "rate", "limit"),
    [("adamw", 2e-3, 0.5), ("adam", 2e-3, 0.9), ("rmsprop", 2e-3, 2), ("momentum", 0.1, 0.01), ("nesterov", 0.1, 0.01)],
)
def test_every_optimizer_with_its_update_clipped(tmp_path, optimizer, rate, limit) -> None:
    flags = ["--clip", ZCLIP, "--clip_update", f"block_rms:max_rms={limit}"]
    flags += ["--optimizer", optimizer, "--learning_rate", str(rate), "--save_strategy", "no", "--disable_tqdm", "true"]
    metrics = script().main([*SMALL.split(), *flags, "--output_dir", str(tmp_path)])
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.1
    assert metrics["clip_update/steps"] == 11, "the learning rate of the first step is 0"
    assert metrics["clip_update/clipped"] > 0
    assert metrics["clip/clipped"] > 0


def assert_recorded(folder: Path, metrics: dict[str, float], *places: str) -> None:
    """Every step once, with what the Trainer and the closing summary say of the whole run."""
    record = read_record(folder)
    assert record.step_T.tolist() == list(range(1, 13))
    assert record.loss_T.mean() == pytest.approx(metrics["train_loss"], rel=1e-5)
    assert np.median(record.norm_T) == pytest.approx(metrics["clip/norm_median"], rel=1e-9)
    np.testing.assert_allclose(np.sqrt((record.norm_TP.astype(float) ** 2).sum(axis=1)), record.norm_T, rtol=1e-6)
    assert (record.scale_TP < 1).any(axis=1).sum() == metrics["clip/clipped"]
    for place in places:
        update = read_record(folder, place)
        assert set(update.step_T) <= set(record.step_T)
        assert np.isin(update.learning_rate_T, record.learning_rate_T).all()
        assert (update.scale_TP < 1).any(axis=1).sum() == metrics["clip_update/clipped"]


@pytest.mark.deepspeed
@pytest.mark.dist
@pytest.mark.parametrize("stage", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_the_main_job_under_deepspeed(tmp_path, stage, monkeypatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file=configs/accelerate/{stage}.yaml"]
    command += ["--main_process_port=0", "-m", "tests.integrations.zero_finetune_main", *SMALL.split()]
    command += ["--clip", "adagc:warmup_steps=3", "--clip_update", "block_rms:max_rms=0.5"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    said = done.stdout + done.stderr
    assert (tmp_path / "metrics.json").exists(), said
    assert f"ZeRO-{'3' if stage == 'zero3' else '1/2'} partitions, 2 part(s) to step, cpu, DEEPSPEED x 2" in said
    assert ("\nafter training: " in said) == (stage == "zero2"), "no process has all weights of ZeRO-3"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.2
    assert metrics["clip/clipped"] > 0
    assert metrics["clip_update/clipped"] > 0
    assert_recorded(tmp_path, metrics, "update")
    saved = torch.load(tmp_path / "checkpoint-12" / "gradclip.pt", weights_only=True)
    assert saved["state"]["seen"] == 12


@pytest.mark.dist
def test_the_main_job_under_fsdp2(tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.integrations.fsdp_finetune_main", "--clip", "adagc:warmup_steps=3", *SMALL.split()]
    command += ["--fsdp", "full_shard auto_wrap", "--save_strategy", "no", "--output_dir", str(tmp_path)]
    command += ["--fsdp_config", '{"fsdp_version": 2, "cpu_ram_efficient_loading": false}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert (tmp_path / "metrics.json").exists(), said
    assert "every parameter is a DTensor" in said
    assert "DTensor shards on a 2 mesh, cpu, FSDP x 2" in said
    assert "training: " not in said, "text that no process could write alone"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.2
    assert metrics["clip/clipped"] > 0
    assert_recorded(tmp_path, metrics)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--clip", "zclop"], "Did you mean zclip?"),
        (["--clip", "adaptive", "--clip_nonfinite", "skipp"], "must be skip or raise or pass. Did you mean skip?"),
    ],
)
def test_wrong_flags_stop_with_the_right_word(tmp_path, flags, words) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        script().main([*flags, "--output_dir", str(tmp_path)])

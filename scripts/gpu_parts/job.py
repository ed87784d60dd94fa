"""Part `job`: scripts/finetune.py as it is and with what users change, its report, and one rank under FSDP2."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gpu_parts.worker import ROOT, Worker, given_up, serve

KEPT = ["eval_loss_before", "eval_loss", "train_runtime", "train_steps_per_second"]
KEPT += ["clip/clipped", "clip/skipped", "clip/nonfinite", "clip/norm_median"]
ZCLIP, ADAGC = "zclip:warmup_steps=5", "adagc:warmup_steps=5"
OWN = ["--optimizer", "adamw", "--clip_update", "block_rms:max_rms=1"]
UNREAD = ["--clip_fold", "true", "--clip_skip_sync", "false", "--optim", "adamw_torch_fused"]
STOCK = "bf16 stock Trainer"
RUNS = {  # precision, and what is added
    "bf16 adaptive": ("bf16", ["--clip", "adaptive"]),
    STOCK: ("bf16", []),
    "bf16 adagc, our AdamW, update clip": ("bf16", ["--clip", ADAGC, *OWN]),
    "bf16 clip none": ("bf16", ["--clip", "none"]),
    "fp16 zclip": ("fp16", ["--clip", ZCLIP]),
    "fp32 agc": ("", ["--clip", "agc"]),
    "bf16 LoRA adagc": ("bf16", ["--clip", ADAGC, "--lora_r", "8"]),
    "bf16 fold, no skip_sync": ("bf16", ["--clip", ZCLIP, *UNREAD]),
}


def few_datasets(w: Worker) -> None:
    """Without the package `datasets`, what plain_datasets.py has of it serves, here and in processes started here."""
    if importlib.util.find_spec("datasets") is not None:
        return
    folder = w.work / "plain"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("plain_datasets.py"), folder / "datasets.py")
    sys.path.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(folder)])
    importlib.invalidate_caches()
    w.emit(datasets="not installed: plain_datasets.py serves")


def words_of(w: Worker, precision: str) -> list[str]:
    """What all runs have."""
    steps = 4 if w.tiny else 40
    words = [
        "--max_steps",
        str(steps),
        "--warmup_steps",
        "2",
        "--save_steps",
        str(steps // 2),
        "--disable_tqdm",
        "true",
    ]
    words += ["--eval_steps", str(steps // 2), "--logging_steps", str(steps // 4)]
    if w.tiny:
        words += ["--max_text_bytes", "60000", "--vocab_size", "512", "--max_eval_samples", "8", "--block_size", "32"]
        return words
    words += ["--max_text_bytes", "600000", "--max_eval_samples", "64", "--per_device_train_batch_size", "64"]
    return [*words, f"--{precision}", "true"] if precision else words


def job(w: Worker) -> None:
    """One run after another, in one process but for the last."""
    few_datasets(w)
    from accelerate.state import AcceleratorState, GradientState

    finetune: Any = importlib.import_module("finetune")
    ours, stock = finetune.GradClipTrainer, _stock()
    folder = w.work / "job"
    runs = dict(list(RUNS.items())[:3]) if w.tiny else RUNS
    for name, (precision, more) in runs.items():
        if w.late(6):
            w.emit(row=name, note="no time left")
            continue
        with w.row(name):
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            finetune.GradClipTrainer = stock if name == STOCK else ours
            began, peak = time.monotonic(), 0.0
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            out = folder / name.replace(" ", "_")
            found = finetune.main([*words_of(w, precision), *more, "--output_dir", str(out)])
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated() / 2**30
            kept = {key: found[key] for key in KEPT if key in found}
            w.emit(row=name, seconds=time.monotonic() - began, **kept, peak_GiB=peak, given_up=given_up())
    report = [sys.executable, "-m", "hf_gradclip.cli", "report", str(folder / "bf16_adaptive")]
    _run(w, "report of the first run", report)
    if not w.tiny and not w.late(25):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp2.yaml"]
        launch += ["--num_processes", "1", "scripts/finetune.py", *words_of(w, "bf16"), "--clip", ADAGC]
        _run(w, "FSDP2, one rank: bf16 adagc", [*launch, "--output_dir", str(folder / "fsdp2")])


def _stock() -> type:
    """transformers' own Trainer, with its max_grad_norm, in the place of ours."""
    from transformers import Trainer

    class Stock(Trainer):
        clipper = update_clipper = None

        def __init__(self, *args: Any, clip: Any = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    return Stock


def _run(w: Worker, name: str, command: list[str]) -> None:
    """Something in a process of its own: its exit status, and what it says of clipping."""
    with w.row(name):
        env = {**os.environ, "MPLBACKEND": "Agg"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=w.left(), env=env)
        print(done.stdout[-6000:], done.stderr[-6000:])
        if done.returncode:
            raise RuntimeError(" ".join(done.stderr.split())[-300:])
        lines = (done.stdout + done.stderr).splitlines()
        says = [line for line in lines if line.startswith(("[hf_gradclip]", "eval loss"))]
        w.emit(row=name, says=(" | ".join(says) or " ".join(done.stdout.split()))[:400])


if __name__ == "__main__":
    serve(job)

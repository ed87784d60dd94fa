"""Which kernels serve: plain torch unless Triton is asked for, and plain torch again where Triton cannot."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_gradclip import Clipper, kernels
from tests.strategies.sequence import Tiny, gradients, set_gradients

ROOT = Path(__file__).parents[2]
STEPS = """
import torch
from hf_gradclip import Clipper, kernels
from tests.strategies.sequence import Tiny, gradients, set_gradients

found = []
specs = ["zclip:warmup_steps=3,z_threshold=0.5", "adagc:warmup_steps=3", "param_norm:max_norm=0.4"]
specs.append("value:max_value=0.2")
for spec in specs:
    model, norms = Tiny(), []
    clipper = Clipper.for_model(model, spec)
    for grads in gradients(14):
        set_gradients(model, grads)
        norms.append(clipper.step())
        found += [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    found.append(torch.stack(norms).float())
torch.save((found, "hf_gradclip.kernels.fused_triton" in __import__("sys").modules), "{out}")
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_given_up", [])
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    caplog.set_level(logging.INFO, logger="hf_gradclip")


def clipped() -> list[torch.Tensor]:
    model = Tiny()
    clipper = Clipper.for_model(model, "global_norm:max_norm=0.1")
    for grads in gradients(3):
        set_gradients(model, grads)
        clipper.step()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_a_missing_triton_is_said_once_and_torch_serves(monkeypatch, caplog) -> None:
    expected = clipped()
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "hf_gradclip.kernels.fused_triton", raising=False)
    assert all(map(torch.equal, clipped(), expected))
    assert caplog.text.count("HF_GRADCLIP_KERNELS=triton:") == 1
    assert "Plain torch serves instead" in caplog.text


def test_without_a_gpu_torch_serves_in_silence(monkeypatch, caplog) -> None:
    expected = clipped()
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert all(map(torch.equal, clipped(), expected))
    assert caplog.text == ""


def test_a_word_that_is_no_choice_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="HF_GRADCLIP_KERNELS=cuda: must be eager or triton"):
        clipped()


def test_whole_steps_under_the_interpreter_equal_torch(tmp_path) -> None:
    found = {}
    for choice in ("eager", "triton"):
        out = tmp_path / choice
        env = {**os.environ, kernels.VARIABLE: choice, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-c", STEPS.replace("{out}", str(out))]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert out.exists(), done.stderr[-3000:]
        found[choice], used = torch.load(out)
        assert used == (choice == "triton")
        assert "serves instead" not in done.stderr
    for mine, theirs in zip(found["triton"], found["eager"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9, equal_nan=True)

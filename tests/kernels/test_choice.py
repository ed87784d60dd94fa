"""Which kernels serve: Triton or C where they run and agree with plain torch, plain torch everywhere else."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hf_gradclip import Clipper, kernels
from hf_gradclip.kernels import eager, native
from tests.strategies.sequence import Tiny, gradients, set_gradients

ROOT = Path(__file__).parents[2]
STEPS = """
import torch
from hf_gradclip import Clipper, kernels
from tests.strategies.sequence import Tiny, gradients, set_gradients

found = []
specs = ["zclip:warmup_steps=3,z_threshold=0.5", "adagc:warmup_steps=3", "param_norm:max_norm=0.4"]
specs += ["value:max_value=0.2", "agc:clip_factor=0.1,eps=1,include_1d=true"]
specs.append("agc:eps=5,unit_axis=1+value:max_value=0.1")
for spec in specs:
    model, norms = Tiny(), []
    clipper = Clipper.for_model(model, spec)
    for grads in gradients(14):
        set_gradients(model, grads)
        norms.append(clipper.step())
        found += [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    found.append(torch.stack(norms).float())
used = ["hf_gradclip.kernels." + name in __import__("sys").modules for name in ("fused_triton", "units_triton")]
torch.save((found, used), "{out}")
"""


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_given_up", {})
    monkeypatch.setattr(kernels, "_checked", set())
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    caplog.set_level(logging.INFO, logger="hf_gradclip")


def clipped(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    model = Tiny().to(dtype)
    clipper = Clipper.for_model(model, "global_norm:max_norm=0.1")
    for grads in gradients(3):
        set_gradients(model, grads)
        clipper.step()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture
def by_torch(monkeypatch) -> list[torch.Tensor]:
    """What plain torch gives."""
    with monkeypatch.context() as patch:
        patch.setenv(kernels.VARIABLE, "eager")
        return clipped()


def test_a_missing_triton_is_said_once_and_torch_serves(monkeypatch, caplog, by_torch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "hf_gradclip.kernels.fused_triton", raising=False)
    assert all(map(torch.equal, clipped(), by_torch))
    assert caplog.text.count("The kernels in Triton are not used: ") == 1
    assert "Plain torch serves instead; HF_GRADCLIP_KERNELS=eager asks for it." in caplog.text


def used(monkeypatch) -> list[str]:
    """Notes by which kernels each gradient is scaled from now on."""
    found: list[str] = []
    note = lambda name, function: lambda *plan: found.append(name) or function(*plan)  # noqa: E731
    monkeypatch.setattr(native, "apply_", note("C", native.apply_))
    monkeypatch.setattr(eager, "scale_", note("torch", eager.scale_))
    return found


@pytest.mark.parametrize("choice", ["auto", "triton"])
def test_on_a_cpu_c_serves(monkeypatch, caplog, by_torch, choice) -> None:
    monkeypatch.setenv(kernels.VARIABLE, choice)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels.language_of(torch.device("cpu")) == "C"
    names = used(monkeypatch)
    for mine, theirs in zip(clipped(), by_torch, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    assert set(names) == {"C"}
    assert caplog.text == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes_that_c_does_not_take_go_to_torch(monkeypatch, caplog, dtype) -> None:
    names = used(monkeypatch)
    clipped(dtype)
    assert set(names) == {"torch"}
    assert caplog.text == ""


def test_tensors_without_memory_of_their_own_go_to_torch(monkeypatch, caplog) -> None:
    """A wrapper, or a tensor that is fake: at its address there is something else, or nothing."""
    names = used(monkeypatch)
    with FakeTensorMode():
        sums, _ = kernels.statistics([torch.empty(5, 3)], torch.float64, torch.device("cpu"), max_abs=True)
        assert sums.shape == (1,)
    clipped()
    assert set(names) == {"C"}
    assert caplog.text == ""


def test_what_was_not_compiled_is_no_fault(monkeypatch, caplog, by_torch) -> None:
    monkeypatch.setattr(kernels, "_compiled", lambda: False)
    assert all(map(torch.equal, clipped(), by_torch))
    assert caplog.text == ""


def test_a_library_of_another_version_is_said(monkeypatch, caplog, by_torch) -> None:
    native.library.cache_clear()
    monkeypatch.setattr(native, "INTERFACE", 0)
    assert all(map(torch.equal, clipped(), by_torch))
    assert caplog.text.count("native.c has changed since it was compiled: install hf_gradclip again") == 1


def test_c_that_disagrees_is_not_used(monkeypatch, caplog, by_torch) -> None:
    names = used(monkeypatch)
    monkeypatch.setattr(native, "statistics", off_by_a_bit)
    assert all(map(torch.equal, clipped(), by_torch))
    assert set(names) == {"torch"}
    assert caplog.text.count("The kernels in C are not used: their sum of squares is") == 1


def test_too_little_memory_is_no_reason_to_go_on_with_something_else(monkeypatch) -> None:
    """Which needs more memory; and one rank alone would go on with other numbers than the rest."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    clipped()
    monkeypatch.setattr(native, "statistics", full)
    with pytest.raises(torch.OutOfMemoryError):
        clipped()
    assert kernels._given_up == {}


def test_torch_serves_where_it_is_asked_for(monkeypatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "eager")
    names = used(monkeypatch)
    clipped()
    assert set(names) == {"torch"}


def wrong(monkeypatch, **results) -> None:
    """In the place of the Triton kernels, some that run and whose results are not right."""
    module = types.ModuleType("fused_triton")
    module.statistics = lambda grads, dtype, device: eager_statistics(grads, dtype, device)
    module.apply_ = eager_apply_
    for name, result in results.items():
        setattr(module, name, result)
    monkeypatch.setitem(sys.modules, "hf_gradclip.kernels.fused_triton", module)
    monkeypatch.setenv(kernels.VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def eager_statistics(grads, dtype, device):
    return eager.sumsq(grads, None, dtype, device), eager.max_abs(grads, dtype, device)


def eager_apply_(grads, scale_S, bound_S) -> None:
    eager.scale_(grads, scale_S)
    if bound_S is not None:
        eager.clamp_(grads, bound_S)


def off_by_a_bit(grads, dtype, device):
    sumsq_S, max_S = eager_statistics(grads, dtype, device)
    return sumsq_S * (1 + 1e-5), max_S


def beyond_the_end(grads, scale_S, bound_S) -> None:
    eager_apply_(grads, scale_S, bound_S)
    grads[0].as_strided((1,), (1,), grads[0].storage_offset() + grads[0].numel()).zero_()


@pytest.mark.parametrize(
    ("results", "says"),
    [
        ({"statistics": off_by_a_bit}, "their sum of squares is"),
        ({"apply_": lambda grads, scale_S, bound_S: None}, "their result of scaling in torch.float32 differs"),
        ({"apply_": beyond_the_end}, "their result of scaling in torch.float32 differs"),
    ],
)
def test_kernels_that_disagree_are_not_used(monkeypatch, caplog, by_torch, results, says) -> None:
    wrong(monkeypatch, **results)
    assert all(map(torch.equal, clipped(), by_torch))
    assert caplog.text.count(says) == caplog.text.count("Plain torch serves instead") == 1


def test_kernels_that_agree_are_checked_once_and_used(monkeypatch, caplog) -> None:
    calls = []
    wrong(monkeypatch, apply_=lambda *plan: calls.append(1) or eager_apply_(*plan))
    drawn = torch.get_rng_state()
    clipped()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert len(calls) == 1 + 3
    assert caplog.text == ""


def test_a_word_that_is_no_choice_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="HF_GRADCLIP_KERNELS=cuda: must be auto, eager or triton"):
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
        assert used == [choice == "triton"] * 2
        assert "serves instead" not in done.stderr
    for mine, theirs in zip(found["triton"], found["eager"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9, equal_nan=True)

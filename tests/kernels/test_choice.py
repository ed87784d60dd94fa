"""Which kernels serve: Triton or C where they run and agree with plain torch, plain torch everywhere else.

What happens where they fail later is in test_failing.py.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hf_gradclip import Clipper, kernels
from hf_gradclip.kernels import choice
from hf_gradclip.kernels.eager import step, units, whole
from hf_gradclip.kernels.operations import Language
from hf_gradclip.run.startup import in_force
from tests.kernels.languages import language, serving
from tests.strategies.sequence import Tiny, gradients, set_gradients

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, caplog):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    caplog.set_level(logging.INFO, logger="hf_gradclip")
    choice.forget()
    yield
    choice.forget()


@pytest.fixture
def c() -> Language:
    return language("C")


def clipped(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    model = Tiny().to(dtype)
    clipper = Clipper.for_model(model, "global_norm:max_norm=0.1")
    for grads in gradients(3):
        set_gradients(model, grads)
        clipper.step()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture
def by_torch() -> list[torch.Tensor]:
    """What plain torch gives."""
    with serving("torch"):
        return clipped()


def ask(monkeypatch, word: str) -> None:
    monkeypatch.setenv(choice.VARIABLE, word)
    choice.forget()


def ask_for_the_interpreter(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ask(monkeypatch, "triton")


def test_a_missing_triton_is_said_once_and_torch_serves(monkeypatch, caplog, by_torch) -> None:
    ask_for_the_interpreter(monkeypatch)
    monkeypatch.setattr(kernels, "triton", None, raising=False)
    for name in ("", ".whole", ".units", ".step"):
        monkeypatch.delitem(sys.modules, f"hf_gradclip.kernels.triton{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert all(map(torch.equal, clipped(), by_torch))
    assert caplog.text.count("The kernels in Triton are not used: ") == 1
    assert "Plain torch serves instead; HF_GRADCLIP_KERNELS=eager asks for it." in caplog.text


def noted(found: list[str], name: str, kernel: Callable[..., object]) -> Callable[..., object]:
    """The kernel; each call adds its name to the list."""
    return lambda *given, **named: found.append(name) or kernel(*given, **named)


@pytest.fixture
def used(monkeypatch, c) -> list[str]:
    """Notes by which kernels each gradient is scaled from now on."""
    found: list[str] = []
    monkeypatch.setattr(c.whole, "apply_", noted(found, "C", c.whole.apply_))
    monkeypatch.setattr(whole, "apply_", noted(found, "torch", whole.apply_))
    return found


@pytest.mark.parametrize("word", ["auto", "triton"])
def test_on_a_cpu_c_serves(monkeypatch, caplog, by_torch, word, used) -> None:
    ask(monkeypatch, word)
    assert choice.language_of(CPU).name == "C"
    for mine, theirs in zip(clipped(), by_torch, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    assert set(used) == {"C"}
    assert caplog.text == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes_that_c_does_not_take_go_to_torch(caplog, dtype, used) -> None:
    clipped(dtype)
    assert set(used) == {"torch"}
    assert caplog.text == ""


def test_tensors_without_memory_of_their_own_go_to_torch(caplog, used) -> None:
    """A wrapper, or a tensor that is fake: at its address there is something else, or nothing."""
    with FakeTensorMode():
        sums, _ = kernels.statistics([torch.empty(5, 3)], torch.float64, CPU, max_abs=True)
        assert sums.shape == (1,)
    clipped()
    assert set(used) == {"C"}
    assert caplog.text == ""


def test_what_was_not_compiled_is_no_fault(monkeypatch, caplog, by_torch) -> None:
    monkeypatch.setattr(choice, "compiled", lambda: False)
    assert choice.language_of(CPU).name == "torch"
    assert all(map(torch.equal, clipped(), by_torch))
    assert caplog.text == ""
    monkeypatch.undo()  # before `forget`, which clears the real one


def test_a_library_of_another_version_is_said(monkeypatch, caplog, by_torch, c) -> None:
    from hf_gradclip.kernels.c import library

    library.library.cache_clear()
    monkeypatch.setattr(library, "INTERFACE", 0)
    assert all(map(torch.equal, clipped(), by_torch))
    assert caplog.text.count("the C files have changed since they were compiled: install hf_gradclip again") == 1


def test_c_that_disagrees_is_not_used(monkeypatch, caplog, by_torch, c, used) -> None:
    monkeypatch.setattr(c.whole, "statistics", off_by_a_bit)
    assert all(map(torch.equal, clipped(), by_torch))
    assert set(used) == {"torch"}
    assert caplog.text.count("The kernels in C are not used: their sum of squares is") == 1


def test_torch_serves_where_it_is_asked_for(monkeypatch, used) -> None:
    ask(monkeypatch, "eager")
    clipped()
    assert set(used) == {"torch"}


def wrong(monkeypatch, **results: Callable[..., object]) -> None:
    """In the place of the Triton kernels, some that run and whose results are not right."""
    given = {"statistics": whole_statistics, "apply_": whole_apply_, **results}
    made = Language("Triton", frozenset(choice.DTYPES), SimpleNamespace(**given), units, step)
    monkeypatch.setattr(choice, "triton_language", lambda: made)
    ask_for_the_interpreter(monkeypatch)


whole_statistics, whole_apply_ = whole.statistics, whole.apply_


def off_by_a_bit(grads, dtype, device, max_abs):
    sumsq_S, max_S = whole_statistics(grads, dtype, device, max_abs)
    return sumsq_S * (1 + 1e-5), max_S


def beyond_the_end(grads, scale_S, bound_S) -> None:
    whole_apply_(grads, scale_S, bound_S)
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
    wrong(monkeypatch, apply_=lambda *plan: calls.append(1) or whole_apply_(*plan))
    drawn = torch.get_rng_state()
    clipped()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert len(calls) == 1 + 3
    assert caplog.text == ""


def test_a_word_that_is_no_choice_is_refused(monkeypatch) -> None:
    ask(monkeypatch, "cuda")
    with pytest.raises(ValueError, match="HF_GRADCLIP_KERNELS=cuda: must be auto, eager or triton"):
        clipped()


SPECS = [
    "zclip:warmup_steps=3,z_threshold=0.5", "adagc:warmup_steps=3", "param_norm:max_norm=0.4", "value:max_value=0.2",
    "agc:clip_factor=0.1,eps=1,include_1d=true", "agc:eps=5,unit_axis=1+value:max_value=0.1",
]  # fmt: skip


@pytest.mark.parametrize("name", ["C", "Triton"])
def test_whole_steps_equal_those_of_torch(name, monkeypatch, caplog) -> None:
    def run() -> list[torch.Tensor]:
        found = []
        for spec in SPECS:
            model, norms = Tiny(), []
            clipper = Clipper.for_model(model, spec)
            for grads in gradients(14):
                set_gradients(model, grads)
                norms.append(clipper.step())
                found += [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found.append(torch.stack(norms).float())
        return found

    with serving("torch"):
        theirs = run()
    served: list[str] = []
    with serving(name) as found, monkeypatch.context() as patch:
        for file, operation in ((found.whole, "statistics"), (found.units, "unit_sums")):
            patch.setattr(file, operation, noted(served, operation, getattr(file, operation)))
        mine = run()
    assert min(served.count("statistics"), served.count("unit_sums")) >= 14
    assert "serves instead" not in caplog.text
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_the_start_line_says_what_serves(c, monkeypatch):
    clipper = Clipper.for_model(Tiny(), "adaptive")
    assert "segments, kernels in C; a step" in in_force(clipper)
    ask(monkeypatch, "eager")
    assert "segments, kernels in plain torch; a step" in in_force(clipper)

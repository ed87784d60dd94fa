"""Where kernels fail after they were trusted.

Reading goes on in plain torch, and writing where nothing was written. What must not happen is that memory is written a
second time, or that a fault of the caller, or too little memory, gives up a language.
"""

from __future__ import annotations

import logging
import math

import pytest
import torch

from hf_gradclip import kernels
from hf_gradclip.kernels import choice
from hf_gradclip.kernels.operations import WrittenError
from hf_gradclip.kernels.table import MisfitError
from tests.kernels.failing import FILES, FUNCTIONS, PLACES, READS, WRITES, Failing, call, itself, sgd
from tests.kernels.languages import NAMES, serving, using

OPERATIONS = [*READS, *WRITES]


@pytest.fixture(params=[name for name in NAMES if name != "torch"])
def served(request, caplog):
    """The language that serves; whatever is said is noted."""
    caplog.set_level(logging.INFO, logger="hf_gradclip")
    with serving(request.param) as found:
        yield found


def size_for(language) -> int:
    return 20_000 if language.name == "Triton" else 1_000_000


class Broken:
    """A kernel that raises."""

    def __init__(self, monkeypatch, language, name: str, error: BaseException) -> None:
        self.calls, self.error = 0, error
        monkeypatch.setattr(getattr(language, FILES[name]), name, self)

    def __call__(self, *given: object) -> None:
        self.calls += 1
        raise self.error


@pytest.mark.parametrize("name", OPERATIONS)
def test_plain_torch_goes_on(served, name, monkeypatch, caplog):
    """Where nothing was written; from then on for all operations, and this is said once."""
    size = size_for(served)
    good = call(name, size=size)
    assert choice._given_up == {}
    broken = Broken(monkeypatch, served, name, RuntimeError("no such device"))
    for _ in range(3):
        for mine, theirs in zip(call(name, size=size), good, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    assert broken.calls == 1
    assert caplog.text.count(f"The kernels in {served.name} are not used: no such device") == 1
    assert caplog.text.count("Plain torch serves instead") == 1
    assert choice.language_of(torch.device("cpu")).name == "torch"


def test_a_language_that_was_asked_for_before_it_was_given_up(served, monkeypatch):
    """An optimizer asks once for the measurement and the step; where the first fails, plain torch makes the other."""
    weight = torch.ones(1000)
    memory = itself(weight)
    ready = kernels.prepare(sgd(), memory, PLACES)
    assert ready.language is choice.step(memory, PLACES)
    assert ready.language.name == served.name
    broken = [Broken(monkeypatch, served, name, RuntimeError("broken")) for name in ("measure_update", "step_")]
    sumsq_S, _ = kernels.measure_update(sgd(), memory, PLACES, None, ready)
    kernels.step_(sgd(), memory, PLACES, None, None, ready=ready)
    assert sumsq_S.tolist() == pytest.approx([1000])
    assert (weight == 0.5).all()
    assert [kernel.calls for kernel in broken] == [1, 0]


@pytest.mark.parametrize("error", [MisfitError("of the caller"), torch.OutOfMemoryError("too little")], ids=repr)
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_plain_torch_cannot_help_rises(served, name, error, monkeypatch, caplog):
    """It would need more memory; and one rank alone would go on with other numbers than the rest."""
    call(name, size=1000)
    torchs = Broken(monkeypatch, choice.torch_language(), name, AssertionError("torch was asked"))
    Broken(monkeypatch, served, name, error)
    with pytest.raises(type(error)) as raised:
        call(name, size=1000)
    assert raised.value is error
    assert torchs.calls == 0
    assert choice._given_up == {}
    assert caplog.text == ""


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_of_plain_torch_rises(name, monkeypatch):
    with serving("torch") as found:
        Broken(monkeypatch, found, name, RuntimeError("of torch"))
        with pytest.raises(RuntimeError, match="of torch"):
            call(name)
        assert choice._given_up == {}


@pytest.fixture
def threads():
    with serving("C"), using("C in threads") as found:
        yield found


class TestAThreadInC:
    @pytest.mark.parametrize("name", READS)
    def test_that_fails_in_reading_is_no_nan(self, threads, name, monkeypatch, caplog):
        """Plain torch reads everything again."""
        from hf_gradclip.kernels.c import library

        call(name)
        failing = Failing(monkeypatch, library, FUNCTIONS[name], RuntimeError("of the thread"))
        found = call(name)
        assert len(set(failing.threads)) == 2
        assert found[0].sum().item() == pytest.approx(1_000_000, rel=1e-6)
        assert all(numbers.isfinite().all() for numbers in found)
        assert caplog.text.count("The kernels in C are not used: of the thread") == 1

    @pytest.mark.parametrize("name", WRITES)
    def test_that_fails_in_writing_is_not_written_again(self, threads, name, monkeypatch, caplog):
        """Half of a tensor scaled is a fault that is seen; half of it scaled twice is not."""
        from hf_gradclip.kernels.c import library

        call(name)
        with monkeypatch.context() as patch:
            failing = Failing(patch, library, FUNCTIONS[name], RuntimeError("of the thread"))
            tensor = torch.ones(1_000_000)
            with pytest.raises(WrittenError, match="a part of the memory may be written: of the thread") as raised:
                WRITES[name](kernels, tensor)
        assert isinstance(raised.value.__cause__, RuntimeError)
        assert len(set(failing.threads)) == 2
        assert set(tensor.unique().tolist()) == {0.5, 1.0}
        assert choice._given_up == {}
        assert caplog.text == ""
        assert (call(name)[0] == 0.5).all()


def test_autograd_sees_what_was_written(served):
    """And of what nothing is asked, that it was not."""
    grads = [torch.ones(20), torch.ones(30), None]
    kernels.apply_(grads, torch.tensor([0.5, 1.0, 0.5]), torch.full((3,), math.inf))
    assert [grad._version for grad in grads[:2]] == [1, 0]
    kernels.apply_(grads, torch.ones(3), torch.tensor([math.inf, 0.5, 0.5]))
    assert [grad._version for grad in grads[:2]] == [1, 1]
    block = torch.ones(4, 5)
    kernels.unit_apply_([block], [(0,)], [4], torch.full((4,), 0.5), None)
    assert block._version == 1

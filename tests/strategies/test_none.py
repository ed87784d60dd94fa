"""`none` measures, and writes to no gradient, whatever its norm."""

from __future__ import annotations

from hf_gradclip import Clipper
from tests.strategies.sequence import SPIKES, Tiny, drive, gradients, set_gradients


def test_every_step_is_left_alone():
    run = drive("none", gradients(), lambda grads: grads)
    assert run.share() == 0


def test_no_gradient_is_written():
    model = Tiny()
    clipper = Clipper.for_model(model, "none")
    set_gradients(model, gradients()[SPIKES[0]])
    before = {name: (p.grad.data_ptr(), p.grad._version) for name, p in model.named_parameters()}
    clipper.step()
    assert {name: (p.grad.data_ptr(), p.grad._version) for name, p in model.named_parameters()} == before

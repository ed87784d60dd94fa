"""What an optimizer keeps from step to step: it must not be believed where memory is another since.

Each case changes something between two steps; compared with torch's optimizer, to which the same is done.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hf_gradclip import kernels, optim
from tests.kernels.languages import serving

Optimizer = torch.optim.Optimizer


def gradients(params: list[nn.Parameter], step: int, missing: tuple[int, ...] = ()) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + i)
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if i in missing:
            p.grad = None
        elif p.grad is None:
            p.grad = grad
        else:
            p.grad.copy_(grad)  # at the same address


def moved(params: list[nn.Parameter], optimizer: Optimizer) -> Optimizer:
    params[1].data = params[1].data.clone()
    return optimizer


def other_grads(params: list[nn.Parameter], optimizer: Optimizer) -> Optimizer:
    for p in params:
        p.grad = None
    return optimizer


def loaded(params: list[nn.Parameter], optimizer: Optimizer) -> Optimizer:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def dropped(params: list[nn.Parameter], optimizer: Optimizer) -> Optimizer:
    del optimizer.state[params[2]]
    return optimizer


def wide(params: list[nn.Parameter], optimizer: Optimizer) -> Optimizer:
    """One in float64, with its moments."""
    params[0].grad = None
    params[0].data = params[0].data.double()
    state = optimizer.state[params[0]]
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = state[key].double()
    return optimizer


def turned(params: list[nn.Parameter], optimizer: Optimizer) -> Optimizer:
    """A square one whose elements lie in the other order, at the same address."""
    params[0].grad = None
    params[0].data = params[0].data.t()
    return optimizer


def counted(params: list[nn.Parameter], optimizer: Optimizer) -> Optimizer:
    """Somebody sets a counter."""
    optimizer.state[params[1]]["step"] = torch.tensor(40.0)
    optimizer.state[params[2]]["step"].fill_(7.0)
    return optimizer


def in_a_row(params: list[nn.Parameter], optimizer: Optimizer) -> Optimizer:
    """A counter with an axis, as some checkpoints have it."""
    optimizer.state[params[1]]["step"] = torch.tensor([5.0])
    return optimizer


CHANGES: dict[str, Callable[[list[nn.Parameter], Optimizer], Optimizer]] = {
    "nothing": lambda _, optimizer: optimizer,
    "a weight is moved": moved,
    "the gradients are": other_grads,
    "the state is loaded": loaded,
    "a state is dropped": dropped,
    "a dtype": wide,
    "an order of elements": turned,
    "counters": counted,
    "a counter with an axis": in_a_row,
}


@pytest.mark.parametrize("language", ["C", "torch", "Triton"])
@pytest.mark.parametrize("change", CHANGES)
def test_as_torch_after_a_change(change, language):
    with serving(language):
        runs = []
        for kind in (optim.AdamW, torch.optim.AdamW):
            params = [nn.Parameter(torch.linspace(-1, 1, 36).view(6, 6) + i) for i in range(4)]
            optimizer = kind(params, lr=1e-2, eps=1e-3)
            for step in range(9):
                if step == 4:
                    optimizer = CHANGES[change](params, optimizer)
                gradients(params, step, missing=(3,) if step in (2, 6) else ())
                optimizer.step()
            runs.append((params, [float(optimizer.state[p]["step"]) for p in params]))
        (ours, mine), (theirs, counts) = runs
        assert mine == counts
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_what_is_where_it_was_is_not_looked_at_again(monkeypatch):
    """Or the tests above would show nothing."""
    with serving("C"):
        asked = []
        real = kernels.choice.step
        monkeypatch.setattr(kernels.choice, "step", lambda *given: asked.append(1) or real(*given))
        params = [nn.Parameter(torch.ones(6, 6)) for _ in range(3)]
        optimizer = optim.AdamW(params, lr=1e-2)
        looks = []
        for step in range(6):
            if step == 4:
                params[0].data = params[0].data.clone()
            gradients(params, step)
            asked.clear()
            optimizer.step()
            looks.append(len(asked))
        assert looks[2:] == [0, 0, 1, 0]


def test_counters_are_numbers_of_their_own():
    """As torch keeps them: for those who read, copy or save them."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = optim.RMSprop(params, lr=1e-2)
    for step in range(3):
        gradients(params, step, missing=(1,) if step == 1 else ())
        optimizer.step()
    steps = [optimizer.state[p]["step"] for p in params]
    assert [(step.ndim, step.dtype, float(step)) for step in steps] == [(0, torch.float32, n) for n in (3, 2, 3)]
    twin = copy.deepcopy(optimizer)
    optimizer.step()
    assert [float(entry["step"]) for entry in twin.state.values()] == [3, 2, 3]
    assert [float(optimizer.state[p]["step"]) for p in params] == [4, 3, 4]
    theirs = torch.optim.RMSprop([nn.Parameter(torch.ones(2)) for _ in range(3)])
    theirs.load_state_dict(optimizer.state_dict())
    assert [float(entry["step"]) for entry in theirs.state.values()] == [4, 3, 4]

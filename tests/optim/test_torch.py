"""Without clipping the optimizers are torch.optim's, and so are their checkpoints."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from hf_gradclip import optim

SHAPES = [(4, 3), (5,), (2, 3, 2), ()]
STEPS = 100
NAMES = ["AdamW", "Adam", "RMSprop", "SGD"]

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("AdamW", {"weight_decay": 0.0}),
    ("AdamW", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"maximize": True, "weight_decay": 0.1}),
    ("AdamW", {"maximize": True, "amsgrad": True, "betas": (0.8, 0.95), "eps": 1e-3}),
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1}),
    ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("Adam", {"amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    ("RMSprop", {}),
    ("RMSprop", {"weight_decay": 0.1, "maximize": True, "alpha": 0.9}),
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "weight_decay": 0.1, "eps": 1e-4}),
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1, "maximize": True}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}),
]
CHECKPOINTS = [
    ("AdamW", {"amsgrad": True, "weight_decay": 0.1}),
    ("Adam", {"weight_decay": 0.1, "maximize": True}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3}),
    ("SGD", {}),
]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two, the second with a learning rate of its own."""
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.003}]


def give(params: list[nn.Parameter], step: int) -> None:
    """Gradients around the weights; every third step the second one has none, the last has none for five steps."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        absent = (i == 1 and step % 3 == 2) or (i == 3 and step < 5)
        noise = torch.randn(p.shape, generator=generator)
        p.grad = None if absent else 0.3 * p.detach() + noise


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        give(params, step)
        optimizer.step()


def close(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    assert not any(torch.equal(p, q) for p, q in zip(ours, parameters(), strict=True)), "nothing moved"
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("update_clip", [None, "none"])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_hundred_steps(name: str, options: dict[str, Any], update_clip: str | None) -> None:
    ours, theirs = parameters(), parameters()
    run(getattr(optim, name)(groups(ours), lr=0.01, update_clip=update_clip, **options), ours, 0, STEPS)
    run(getattr(torch.optim, name)(groups(theirs), lr=0.01, foreach=True, **options), theirs, 0, STEPS)
    close(ours, theirs)


@pytest.mark.parametrize("update_clip", [None, "none"])
@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_in_a_tensor(name: str, update_clip: str | None) -> None:
    """It is changed in place, as a scheduler does."""
    ours, theirs = parameters(), parameters()
    ours_lr, theirs_lr = torch.tensor(0.01), torch.tensor(0.01)
    a = getattr(optim, name)(ours, lr=ours_lr, update_clip=update_clip)
    b = getattr(torch.optim, name)(theirs, lr=theirs_lr)
    run(a, ours, 0, 50)
    run(b, theirs, 0, 50)
    ours_lr.fill_(0.002)
    theirs_lr.fill_(0.002)
    run(a, ours, 50, STEPS)
    run(b, theirs, 50, STEPS)
    close(ours, theirs)


def test_a_closure() -> None:
    """It is called with gradients on, and its loss comes back."""
    ours, theirs = parameters(), parameters()
    for optimizer, params in ((optim.AdamW(ours), ours), (torch.optim.AdamW(theirs, foreach=True), theirs)):

        def closure(optimizer=optimizer, params=params):
            optimizer.zero_grad()
            loss = sum(((p - 1) ** 2).sum() for p in params)
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(STEPS)]
        assert losses[-1] < losses[0]
    close(ours, theirs)


@pytest.mark.parametrize(("name", "options"), CHECKPOINTS)
def test_the_keys_of_a_checkpoint(name: str, options: dict[str, Any]) -> None:
    ours, theirs = parameters(), parameters()
    a = getattr(optim, name)(groups(ours), lr=0.01, update_clip="value:max_value=1", **options)
    b = getattr(torch.optim, name)(groups(theirs), lr=0.01, **options)
    for optimizer, params in ((a, ours), (b, theirs)):
        run(optimizer, params, 0, 8)
    mine, torchs = a.state_dict(), b.state_dict()
    assert mine.keys() == torchs.keys()
    extra = {"bias_correction"} if name == "RMSprop" else set()
    for group, like in zip(mine["param_groups"], torchs["param_groups"], strict=True):
        assert group.keys() - like.keys() == extra
        assert like.keys() <= group.keys()
        assert {key: group[key] for key in like} == like
    assert mine["state"].keys() == torchs["state"].keys()
    for i, entry in mine["state"].items():
        assert entry.keys() == torchs["state"][i].keys()
        for key, value in entry.items():
            assert (value.dtype, value.shape) == (torchs["state"][i][key].dtype, torchs["state"][i][key].shape), key


@pytest.mark.parametrize(
    ("name", "options", "start"),
    [(*case, "foreach") for case in CHECKPOINTS] + [(*case, "fused") for case in CHECKPOINTS if case[0] != "RMSprop"],
)
def test_a_checkpoint_moves_to_ours_and_back(name: str, options: dict[str, Any], start: str) -> None:
    """Through a file read with weights_only=True; then ours and torch's go on as one torch optimizer would.

    From step 6: torch's fused SGD cannot take a parameter that has its first gradient later than another.
    """
    ours, theirs = parameters(), parameters()
    whole = getattr(torch.optim, name)(groups(theirs), lr=0.01, foreach=True, **options)
    run(whole, theirs, 6, 90)

    first = getattr(torch.optim, name)(groups(ours), lr=0.01, **{start: True}, **options)
    run(first, ours, 6, 30)
    second = getattr(optim, name)(groups(ours), lr=0.5, clip="zclip:max_norm=inf,z_threshold=1e6", **options)
    second.load_state_dict(through_a_file(first.state_dict()))
    run(second, ours, 30, 60)
    saved = through_a_file(second.state_dict())
    assert "clip" in saved
    third = getattr(torch.optim, name)(groups(ours), lr=0.5, **options)
    third.load_state_dict(saved)
    run(third, ours, 60, 90)
    close(ours, theirs)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)

"""Edges of the optimizers: replaced parameters, copies, gradients with gaps, states of other optimizers."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from hf_gradclip import Clipper, optim
from tests.strategies.sequence import Tiny, gradients, set_gradients

ZCLIP = "zclip:warmup_steps=3,max_norm=inf"


def stepped(optimizer: torch.optim.Optimizer, p: nn.Parameter, steps: int) -> None:
    for step in range(steps):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()


@pytest.mark.parametrize("place", ["clip", "update_clip"])
def test_parameters_put_into_the_groups_by_a_wrapper_are_clipped(place: str, caplog) -> None:
    """As Accelerate does under FSDP2, after the optimizer was made."""
    optimizer = optim.SGD([nn.Parameter(torch.zeros(4))], lr=1.0, **{place: "value:max_value=0.5"})
    new = nn.Parameter(torch.zeros(4))
    optimizer.param_groups[0]["params"] = [new]
    new.grad = torch.full((4,), 3.0)
    with caplog.at_level(logging.WARNING, "hf_gradclip"):
        optimizer.step()
    assert torch.equal(new, torch.full((4,), -0.5))
    assert "starts anew" in caplog.text


@pytest.mark.parametrize("gradient", [torch.full((8,), 3.0)[::2], torch.full((1,), 3.0).expand(4)])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_an_update_is_clipped_where_the_gradient_has_gaps(name: str, gradient: torch.Tensor) -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = getattr(optim, name)([p], lr=1.0, weight_decay=0.0, update_clip="value:max_value=0.5")
    p.grad = gradient
    optimizer.step()
    assert torch.equal(p, torch.full((4,), -0.5))


@pytest.mark.parametrize("place", ["clip", "update_clip"])
def test_a_copy_keeps_the_clip_state(place: str, caplog) -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = optim.SGD([p], lr=0.1, **{place: ZCLIP})
    stepped(optimizer, p, 6)
    copied = copy.deepcopy(optimizer)
    assert {k: v.keys() for k, v in copied.state_dict()["clip"].items()} == {
        k: v.keys() for k, v in optimizer.state_dict()["clip"].items()
    }
    stepped(copied, copied.param_groups[0]["params"][0], 1)
    clipper = copied.clipper or copied.update_clipper
    assert clipper.state.seen == 7
    assert not caplog.records


def test_a_checkpoint_of_adam_in_adamw_decays_apart() -> None:
    ours, theirs = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    adam = torch.optim.Adam([nn.Parameter(torch.ones(4))], weight_decay=0.5)
    a, b = optim.AdamW([ours]), torch.optim.AdamW([theirs])
    for optimizer, p in ((a, ours), (b, theirs)):
        optimizer.load_state_dict(adam.state_dict())
        stepped(optimizer, p, 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_centered_with_bias_correction_is_refused() -> None:
    """Else the first update is 0 / 0 or g / eps: 40 % of the weights were NaN after one step."""
    with pytest.raises(ValueError, match=r"RMSprop\(centered=True, bias_correction=True\).*Leave one of them out"):
        optim.RMSprop([nn.Parameter(torch.zeros(4))], centered=True, bias_correction=True)


def test_a_clip_state_that_starts_anew_does() -> None:
    """The message said so, and the old statistics went on."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = optim.AdamW([p], clip=ZCLIP)
    stepped(optimizer, p, 6)
    optimizer.load_state_dict(torch.optim.AdamW([p]).state_dict())
    assert optimizer.clipper.state.seen == 0

    model, other = Tiny(), Tiny()
    clipper, adagc = Clipper.for_model(model, ZCLIP), Clipper.for_model(other, "adagc")
    for grads in gradients(6):
        set_gradients(model, grads)
        clipper.step()
    assert clipper.state.seen == 6
    assert clipper.load_state_dict(adagc.state_dict()).endswith("starts anew.")
    assert clipper.state.seen == 0


def test_the_zero_step_of_torchs_checkpoints_leaves_no_trace() -> None:
    """torch.distributed.checkpoint makes the optimizer's state by a step with zero gradients and lr = 0."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    made = []
    for _ in range(2):
        net = nn.Linear(3, 3)
        made.append((net, optim.AdamW(net.named_parameters(), clip="adagc:mode=reference,warmup_steps=4")))
    (first, a), (second, b) = made
    for p in first.parameters():
        p.grad = torch.ones_like(p)
    a.step()
    set_optimizer_state_dict(second, b, get_optimizer_state_dict(first, a))
    assert b.clipper.state.gamma_S.isinf().all()
    assert b.clipper.state.seen == 0


def test_an_empty_parameter_is_not_clipped() -> None:
    p, empty = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(0))
    optimizer = optim.SGD([p, empty], lr=1.0, update_clip="block_rms")
    p.grad, empty.grad = torch.full((4,), 0.1), torch.zeros(0)
    optimizer.step()
    assert optimizer.update_clipper.report.summary()["clipped"] == 0


@pytest.mark.parametrize("make", [optim.AdamW, optim.SGD])
@pytest.mark.parametrize("clip", ["adaptive", "agc", "adaptive_norm"])
def test_an_empty_matrix_at_the_end_steps_along(make, clip) -> None:
    net = nn.ModuleDict({"full": nn.Linear(4, 5), "empty": nn.Linear(3, 0, bias=False)})
    twin = copy.deepcopy(net)
    ours = make(net.named_parameters(), lr=0.1, clip=clip)
    clipper = Clipper.for_model(twin, clip)
    theirs = getattr(torch.optim, make.__name__)(twin.parameters(), lr=0.1)
    for size in (1.0, 2.0, 1.0, 1000.0):
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            p.grad = torch.full_like(p, size)
            q.grad = p.grad.clone()
        clipper.step()
        theirs.step()
        ours.step()
    torch.testing.assert_close(net.full.weight, twin.full.weight, rtol=1e-5, atol=1e-6)


def test_a_closure_may_give_the_loss_as_a_number() -> None:
    net = nn.Linear(3, 2)
    optimizer = optim.SGD(net.named_parameters(), lr=0.1, clip="skip_step:on=loss,window=8,min_values=4")

    def closure(loss: float) -> float:
        optimizer.zero_grad()
        net(torch.ones(1, 3)).sum().backward()
        return loss

    for loss in (1.0, 1.1, 0.9, 1.0, 1.1, 50.0):
        assert optimizer.step(lambda loss=loss: closure(loss)) == loss
    assert optimizer.clipper.report.summary()["skipped"] == 1
    with pytest.raises(TypeError, match="must be one number"):
        optimizer.step(lambda: closure("much"))

"""What the optimizers do not take is refused by the call, the value and what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_gradclip import optim
from hf_gradclip.strategy import SpecError

NAMES = ["AdamW", "Adam", "RMSprop", "SGD"]
TORCH_ONLY = {"fused": True, "capturable": True, "differentiable": True}
LACKING = {("RMSprop", "fused"), ("SGD", "capturable")}
"""Which torch's optimizer of the name does not have either."""


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (3,), dtype=dtype))


@pytest.mark.parametrize(
    ("name", "option"), [(n, o) for n in NAMES for o in TORCH_ONLY if (n, o) not in LACKING], ids=lambda v: str(v)
)
def test_options_of_torch_alone(name: str, option: str) -> None:
    with pytest.raises(ValueError, match="is torch's; here the device") as caught:
        getattr(optim, name)([weight()], **{option: TORCH_ONLY[option]})
    message = str(caught.value)
    assert message.startswith(f"{name}({option}={TORCH_ONLY[option]})")
    assert f"Leave {option} out" in message
    assert f"torch.optim.{name}" in message


@pytest.mark.parametrize("name", NAMES)
def test_the_usual_values_of_these_options_are_taken(name: str) -> None:
    for options in ({"foreach": True}, {"foreach": False}, {"foreach": None, "differentiable": False}):
        getattr(optim, name)([weight()], **options)


@pytest.mark.parametrize(
    ("name", "bad", "rule"),
    [
        *[(name, {"lr": value}, ">= 0") for name in NAMES for value in (-1.0, float("nan"))],
        *[(name, {"weight_decay": -0.1}, ">= 0") for name in NAMES],
        *[(name, {"eps": -1e-8}, ">= 0") for name in NAMES[:3]],
        *[(name, {"betas": value}, "two numbers in [0, 1)") for name in NAMES[:2] for value in ((0.9, 1.0), (-0.1, 0))],
        ("RMSprop", {"alpha": 1.0}, "in [0, 1)"),
        ("RMSprop", {"momentum": -0.9}, ">= 0"),
        ("SGD", {"momentum": -0.9}, ">= 0"),
    ],
)
def test_bad_numbers(name: str, bad: dict[str, Any], rule: str) -> None:
    ((key, value),) = bad.items()
    with pytest.raises(ValueError, match="must be") as caught:
        getattr(optim, name)([weight()], **bad)
    assert str(caught.value) == f"{name}({key}={value}): must be {rule}."


@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_that_is_not_on_the_host(name: str) -> None:
    there = torch.tensor(0.1, device="meta")
    with pytest.raises(ValueError, match=r"\(lr=<tensor on meta>\): every step would wait .* a tensor on the CPU"):
        getattr(optim, name)([{"params": [weight()], "lr": there}], lr=0.1)
    p = weight()
    optimizer = getattr(optim, name)([p], lr=torch.tensor(0.5))
    p.grad = torch.ones(3)
    optimizer.step()
    assert (p != 1).all()


@pytest.mark.parametrize("bad", [{}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_without_what_it_needs(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"SGD\(nesterov=True, .*: needs momentum > 0 and dampening = 0"):
        optim.SGD([weight()], nesterov=True, **bad)


def test_a_skip_cannot_be_an_update_clip() -> None:
    with pytest.raises(SpecError, match="Put skip_step under 'gradient'"):
        optim.AdamW([weight()], update_clip="skip_step")


def test_a_wrong_spec() -> None:
    with pytest.raises(SpecError, match="Did you mean zclip"):
        optim.AdamW([weight()], clip="zclp")
    with pytest.raises(SpecError, match="Did you mean block_rms"):
        optim.AdamW([weight()], update_clip="block_rsm")


CLIPS = [{}, {"clip": 1.0}, {"update_clip": 1.0}]


def sparse(p: Tensor) -> Tensor:
    return torch.sparse_coo_tensor([[0, 2]], [1.0, 2.0], p.shape, check_invariants=True)


@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("name", NAMES)
def test_sparse_gradients(name: str, clips: dict[str, Any]) -> None:
    p = weight()
    optimizer = getattr(optim, name)([p], **clips)
    p.grad = sparse(p)
    with pytest.raises(ValueError, match=r"does not take sparse gradients\. Use the optimizer of torch.optim"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("name", NAMES)
def test_sparse_gradients_of_a_second_group_change_nothing_in_the_first(name: str, clips: dict[str, Any]) -> None:
    p, q = weight(), weight()
    optimizer = getattr(optim, name)([{"params": [p]}, {"params": [q]}], **clips)
    p.grad, q.grad = torch.full((3,), 9.0), sparse(q)
    with pytest.raises(ValueError, match="does not take sparse gradients"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert torch.equal(p.grad, torch.full((3,), 9.0))
    assert not optimizer.state


@pytest.mark.parametrize("clips", CLIPS)
@pytest.mark.parametrize("name", NAMES)
def test_complex_parameters(name: str, clips: dict[str, Any]) -> None:
    p = weight(dtype=torch.complex64)
    optimizer = getattr(optim, name)([p], **clips)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"does not take complex parameters\. Use the optimizer of torch.optim"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3, dtype=torch.complex64))
    assert not optimizer.state

"""The state of the clipping in an optimizer: in checkpoints, in copies, after a step that was skipped."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_gradclip import optim
from hf_gradclip.guard import NonFiniteError
from hf_gradclip.state import flatten
from hf_gradclip.strategy import SpecError

NAMES = ["AdamW", "Adam", "RMSprop", "SGD"]
ZCLIP = "zclip:warmup_steps=5,max_norm=inf"
ADAGC = "adagc:warmup_steps=5,max_norm=inf,lambda_rel=1.2"
STEPS = 30
LOUD = (10, 11, 19, 20, 21, 22)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 8))


def build(name: str, net: nn.Module, **clips: Any) -> torch.optim.Optimizer:
    momentum = {"momentum": 0.2} if name in ("SGD", "RMSprop") else {}
    return getattr(optim, name)(net.named_parameters(), lr=0.01, weight_decay=0.1, **momentum, **clips)


def run(optimizer: torch.optim.Optimizer, net: nn.Module, first: int, last: int) -> None:
    """Gradients by hand: noise, and all of one sign and large in some steps, so that updates are large as well."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator) + (10 if step in LOUD else 0)
        optimizer.step()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    """Weights, moments and step counters, copied."""
    kept = {f"weight.{name}": p.detach().clone() for name, p in net.named_parameters()}
    for i, entry in optimizer.state_dict()["state"].items():
        kept |= {f"{i}.{key}": value.clone() for key, value in entry.items()}
    return kept


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clips", [{"clip": ZCLIP}, {"update_clip": ADAGC}, {"clip": ZCLIP, "update_clip": ADAGC}])
def test_thirty_steps_are_fifteen_and_fifteen(name: str, clips: dict[str, str], caplog: Any) -> None:
    whole_net, net, free_net = model(), model(), model()
    whole, first, free = build(name, whole_net, **clips), build(name, net, **clips), build(name, free_net)
    run(whole, whole_net, 0, STEPS)
    run(free, free_net, 0, STEPS)
    moved = [(p - q).abs().max().item() for p, q in zip(whole_net.parameters(), free_net.parameters(), strict=True)]
    assert max(moved) > 1e-3, "clipping must matter"
    run(first, net, 0, 15)
    saved = through_a_file(first.state_dict())
    assert set(saved["clip"]) == {{"clip": "gradient", "update_clip": "update"}[key] for key in clips}

    second = build(name, net, **clips)
    second.load_state_dict(saved)
    run(second, net, 15, STEPS)
    assert same(everything(second, net), everything(whole, whole_net))
    for a, b in ((second.clipper, whole.clipper), (second.update_clipper, whole.update_clipper)):
        if b is None:
            assert a is None
            continue
        assert same(flatten(a.state), flatten(b.state))
        assert 0 < b.report.summary()["clipped"] < STEPS
    assert not caplog.records


def test_without_the_clip_state_the_end_is_another() -> None:
    """And it says so: the test above would see a state that was not taken."""
    ends = []
    for keep in (True, False):
        net = model()
        first = build("AdamW", net, clip=ZCLIP)
        run(first, net, 0, 15)
        saved = first.state_dict()
        second = build("AdamW", net, clip=ZCLIP)
        second.load_state_dict(saved if keep else {key: saved[key] for key in ("state", "param_groups")})
        run(second, net, 15, STEPS)
        ends.append(everything(second, net))
    assert not same(*ends)


def test_a_checkpoint_without_the_clip_state_is_told(caplog: Any) -> None:
    net = model()
    plain = torch.optim.AdamW(net.parameters())
    optimizer = build("AdamW", net, clip=ZCLIP, update_clip="value:max_value=1")
    optimizer.load_state_dict(plain.state_dict())
    assert [record.message for record in caplog.records] == [
        "AdamW: the state has no clip state of the gradient; it starts anew."
    ]


def test_names_come_from_named_parameters_else_numbers() -> None:
    net = model()
    names = [name for name, _ in net.named_parameters()]
    assert build("AdamW", net, clip=ADAGC).state_dict()["clip"]["gradient"]["names"] == names
    two = [{"params": list(net[0].named_parameters())}, {"params": [("out", net[2].weight)]}]
    named = optim.AdamW(two, update_clip=ADAGC)
    assert named.state_dict()["clip"]["update"]["names"] == ["weight", "bias", "out"]
    numbers = optim.AdamW([{"params": net[0].parameters()}, {"params": net[2].parameters()}], clip=ADAGC)
    assert numbers.state_dict()["clip"]["gradient"]["names"] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("update_clip", [None, "block_rms:max_rms=0.5"])
def test_a_nan_gradient_skips_exactly(name: str, bad: float, update_clip: str | None) -> None:
    net = model()
    optimizer = build(name, net, clip="global_norm:max_norm=15", update_clip=update_clip)
    run(optimizer, net, 0, 6)
    before = everything(optimizer, net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    net[2].weight.grad[0, 0] = bad
    optimizer.step()
    assert same(everything(optimizer, net), before)
    assert optimizer.clipper.step_was_skipped

    run(optimizer, net, 6, 12)
    assert not same(everything(optimizer, net), before)
    summary = optimizer.clipper.report.summary()
    assert (summary["steps"], summary["skipped"], summary["nonfinite"]) == (13, 1, 1)
    assert 0 < summary["clipped"] < 12
    if update_clip is not None:
        assert optimizer.update_clipper.report.summary()["steps"] == 12, "a skipped step has no update"


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_clips(name: str, how: str) -> None:
    """The copy has parameters of its own, clips their gradients and their updates, and leaves the original alone."""
    net = model()
    optimizer = build(name, net, clip="value:max_value=1", update_clip="value:max_value=0.01")
    run(optimizer, net, 0, 5)
    kept = everything(optimizer, net)
    copied = pickle.loads(pickle.dumps(optimizer)) if how == "pickle" else copy.deepcopy(optimizer)
    assert copied.clips_itself
    params = [p for group in copied.param_groups for p in group["params"]]
    before = [p.detach().numpy().copy() for p in params]
    for p in params:
        p.grad = torch.full_like(p, 3.0)
    copied.step()
    assert copied.clipper.report.summary()["clipped"] == 1
    for p, old in zip(params, before, strict=True):
        decay = 1 - 0.01 * 0.1 if name == "AdamW" else 1.0
        moved = np.abs(p.detach().numpy() - decay * old)
        assert 0 < moved.max() <= 0.01 * 0.01 * 1.01
    assert same(everything(optimizer, net), kept)


def test_a_new_group_is_clipped_and_the_clip_state_starts_anew(caplog: Any) -> None:
    net = model()
    optimizer = optim.SGD(net[0].parameters(), lr=1.0, clip=ADAGC, update_clip="value:max_value=0.5")
    run(optimizer, net[0], 0, 8)
    assert optimizer.clipper.state.seen == 8
    clipper = optimizer.clipper
    optimizer.add_param_group({"params": net[2].parameters()})
    before = net[2].weight.detach().clone()
    with caplog.at_level(logging.WARNING, "hf_gradclip"):
        run(optimizer, net, 8, 9)
    assert "the set of parameters changed, so the clip state starts anew" in caplog.text
    assert optimizer.clipper.state.seen == 1
    assert optimizer.clipper.state.gamma_S.shape == (4,)
    assert (net[2].weight - before).abs().max().item() == pytest.approx(0.5, rel=1e-5)
    caplog.clear()
    run(optimizer, net, 9, 20)
    assert not caplog.records
    assert optimizer.clipper.state.seen == 12
    assert optimizer.clipper is clipper
    for made in (clipper, optimizer.update_clipper):
        assert made.steps == made.report.summary()["steps"] == 20, "the report is of the whole run"


def test_a_new_group_that_no_pattern_finds_is_refused_in_each_step() -> None:
    net = model()
    named = [(f"old.{name}", p) for name, p in net[0].named_parameters()]
    optimizer = optim.SGD(named, lr=1.0, clip="old.*=global_norm:max_norm=0.01")
    optimizer.add_param_group({"params": [(f"new.{name}", p) for name, p in net[2].named_parameters()]})
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.ones(2, net[0].in_features)).sum().backward()
    for _ in range(2):
        with pytest.raises(SpecError, match=r"new\.weight"):
            optimizer.step()
    assert all(map(torch.equal, net.parameters(), before))


def test_skips_in_a_row_go_on_over_a_new_group() -> None:
    """Three before it and two after it are five."""
    net = model()
    optimizer = optim.SGD(net[0].parameters(), lr=1.0, clip={"gradient": "adaptive_norm", "max_consecutive_skips": 5})

    def step() -> None:
        optimizer.zero_grad()
        (net(torch.ones(2, net[0].in_features)).sum() * math.nan).backward()
        optimizer.step()

    for _ in range(3):
        step()
    optimizer.add_param_group({"params": net[2].parameters()})
    step()
    with pytest.raises(NonFiniteError, match="5 steps in a row"):
        step()


@pytest.mark.parametrize("clip", ["global_norm:max_norm=1", "adaptive_norm"])
def test_skips_in_a_row_go_on_after_a_resume(clip) -> None:
    """Also where the strategy has no state: a run that is resumed often still comes to its limit."""
    net = nn.Linear(3, 2)
    spec = {"gradient": clip, "max_consecutive_skips": 5}

    def go(optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
        for _ in range(steps):
            for p in net.parameters():
                p.grad = torch.full_like(p, float("nan"))
            optimizer.step()
        return through_a_file(optimizer.state_dict())

    saved = go(optim.AdamW(net.named_parameters(), clip=spec), 3)
    resumed = optim.AdamW(net.named_parameters(), clip=spec)
    resumed.load_state_dict(saved)
    go(resumed, 1)
    with pytest.raises(NonFiniteError, match="5 steps in a row"):
        go(resumed, 1)

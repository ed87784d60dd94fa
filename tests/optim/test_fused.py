"""Clip and step in C and in Triton against the foreach form, float64 and float32 rounded by hand.

In C here, in Triton in the process that `test_under_the_interpreter` starts; there, as in tests/kernels/test_triton.py,
bfloat16 is truncated where a GPU rounds to nearest.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_gradclip import kernels, optim
from tests.kernels import tensors
from tests.optim import reference, sequence

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from hf_gradclip.kernels import step_triton as fused
else:
    from hf_gradclip.kernels import native_step as fused

FORM = "triton" if INTERPRETED else "auto"
SHAPES = [(13, 27)]
STEPS = 20
LOUD = {4: 5.0, 9: 8.0, 10: 3.0, 15: 6.0}
OPTIONS: list[tuple[str, dict[str, Any], float]] = [
    ("AdamW", {"weight_decay": 0.1}, 0.5),
    ("AdamW", {"amsgrad": True, "maximize": True, "betas": (0.0, 0.95), "eps": 1e-3}, 1.03),
    ("Adam", {"weight_decay": 0.1}, 0.5),
    ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}, 0.5),
    ("RMSprop", {"weight_decay": 0.1, "maximize": True, "alpha": 0.9}, 1.7),
    ("RMSprop", {"centered": True, "momentum": 0.5, "eps": 1e-2}, 6.0),
    ("RMSprop", {"bias_correction": True, "momentum": 0.9}, 2.7),
    ("SGD", {}, 1.1),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}, 2.6),
    ("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}, 4.3),
]
"""With a limit of the RMS of each update, which some are over."""
ZCLIP = "zclip:warmup_steps=3,max_norm=inf,z_threshold=0.5"


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_under_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.fail("triton is missing, and its kernels untested: pip install -c constraints.txt -e '.[test]'")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(autouse=True)
def _fresh(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_given_up", {})
    monkeypatch.setenv(kernels.VARIABLE, FORM)


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    if not INTERPRETED:
        tensors.library()


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The rule of every step that the kernels made."""
    seen: list[str] = []
    for dtype in (torch.float32, torch.bfloat16):
        assert kernels.step_kernels([torch.zeros(1, dtype=dtype)]) is fused  # the check at first use
    step = fused.step_
    monkeypatch.setattr(fused, "step_", lambda rule, *rest: (step(rule, *rest), seen.append(rule.name)))
    return seen


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give(params: list[nn.Parameter], step: int) -> None:
    """Gradients around the weights; the second parameter has none in every third step, the third none before step 5."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        absent = (i == 1 and step % 3 == 2) or (i == 2 and step < 5)
        noise = torch.randn(p.shape, generator=generator)
        p.grad = None if absent else LOUD.get(step, 1.0) * (0.3 * p.detach() + noise)


def pair(monkeypatch, name: str, groups: list[list[tuple[int, ...]]], **options: Any) -> tuple[Any, Any]:
    """The optimizer after the run in the kernels, and after the foreach form's; a group of parameters for each list."""
    found = []
    for form in (FORM, "eager"):
        monkeypatch.setenv(kernels.VARIABLE, form)
        params = [parameters(shapes) for shapes in groups]
        rates = [{"params": some, "lr": 0.01 / (1 + i)} for i, some in enumerate(params)]
        optimizer = getattr(optim, name)(rates, **options)
        for step in range(STEPS):
            give([p for some in params for p in some], step)
            optimizer.step()
        found.append(optimizer)
    return found[0], found[1]


def same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Weights, moments and counters."""
    left, right = a.state_dict()["state"], b.state_dict()["state"]
    assert left.keys() == right.keys()
    for i, entry in right.items():
        assert left[i].keys() == entry.keys()
        for key, value in entry.items():
            torch.testing.assert_close(left[i][key], value, rtol=2e-6, atol=1e-6, msg=f"{key} of parameter {i}")
    for mine, other in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(mine["params"], other["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-6)


class TestForeach:
    """The same as the foreach form, which does not share the arithmetic."""

    @pytest.mark.parametrize(("name", "options", "limit"), OPTIONS)
    def test_gradients_and_updates_clipped(self, name, options, limit, monkeypatch, launches):
        spec = f"block_rms:max_rms={limit}"
        a, b = pair(monkeypatch, name, [SHAPES], clip="param_norm:max_norm=30", update_clip=spec, **options)
        same(a, b)
        assert len(launches) == STEPS
        changes = [[p._version for p in optimizer.param_groups[0]["params"]] for optimizer in (a, b)]
        assert min(changes[0]) >= STEPS <= min(changes[1])  # autograd sees a write, whoever made it
        for place in ("clipper", "update_clipper"):
            mine, theirs = (getattr(optimizer, place).report.summary() for optimizer in (a, b))
            assert mine["clipped"] == theirs["clipped"]
            assert 2 <= mine["clipped"] <= STEPS - 2

    @pytest.mark.parametrize(("name", "options"), [("AdamW", {}), ("SGD", {"momentum": 0.9, "dampening": 0.3})])
    def test_groups_with_missing_and_empty_gradients(self, name, options, monkeypatch, launches):
        groups = [[(9, 7), (9,), ()], [(0, 3)], [(5,)]]
        a, b = pair(monkeypatch, name, groups, clip="global_norm:max_norm=15", **options)
        same(a, b)
        assert len(launches) == 3 * STEPS
        assert 2 <= a.clipper.report.summary()["clipped"] == b.clipper.report.summary()["clipped"] <= STEPS - 4

    @pytest.mark.parametrize("place", ["clip", "update_clip"])
    def test_elements_bounded(self, place, monkeypatch):
        a, b = pair(monkeypatch, "Adam", [SHAPES], **{place: "param_norm:max_norm=15+value:max_value=0.8"})
        same(a, b)

    def test_without_a_clip(self, monkeypatch, launches):
        a, b = pair(monkeypatch, "AdamW", [SHAPES])
        same(a, b)
        assert len(launches) == STEPS


class TestFloat64:
    """The equations in float64; those of AdamW are in tests/kernels/test_step.py."""

    @pytest.mark.parametrize("name", ["Adam", "RMSprop", "SGD"])
    def test_update(self, name, launches):
        ours, theirs = sequence.OPTIMIZERS[name]
        limit = sequence.LIMITS[name]
        spec = f"block_rms:max_rms={limit}"
        weights, optimizer = sequence.trained(lambda params: ours(params, lr=sequence.LR, update_clip=spec))
        wanted, clips = sequence.expected(theirs(), reference.block_rms(limit))
        sequence.close(weights, wanted)
        assert len(launches) == sequence.STEPS
        assert optimizer.update_clipper.report.summary()["clipped"] == clips
        assert 0 < clips < sequence.STEPS


def cut(x: Tensor) -> Tensor:
    """To bfloat16: to nearest, or truncated as by the interpreter."""
    return (x.view(torch.int32) & -65536).view(torch.float32) if INTERPRETED else x.bfloat16().float()


class TestBfloat16:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("AdamW", {}),
            ("SGD", {"momentum": 0.9}),
            ("RMSprop", {"centered": True, "momentum": 0.5, "eps": 1e-2}),
            ("AdamW", {"amsgrad": True, "update_clip": "block_rms:max_rms=0.5"}),
        ],
    )
    def test_rounded_once(self, name, options, monkeypatch, launches):
        """As float32 whose weights and moments are rounded after every step; the next begins from ours."""
        ours = [nn.Parameter(p.detach().bfloat16()) for p in parameters(SHAPES)]
        theirs = [nn.Parameter(p.detach().float()) for p in ours]
        a, b = (
            getattr(optim, name)(some, lr=0.02, clip="param_norm:max_norm=30", **options) for some in (ours, theirs)
        )
        for step in range(STEPS):
            give(theirs, step)
            for p, q in zip(ours, theirs, strict=True):
                p.grad = q.grad.bfloat16()
                q.grad = p.grad.float()
            monkeypatch.setenv(kernels.VARIABLE, FORM)
            a.step()
            monkeypatch.setenv(kernels.VARIABLE, "eager")
            b.step()
            for p, q in zip(ours, theirs, strict=True):
                mine, other = {"weight": p.data, **a.state[p]}, {"weight": q.data, **b.state[q]}
                for key in mine.keys() - {"step"}:
                    torch.testing.assert_close(mine[key].float(), cut(other[key]), rtol=2**-7, atol=1e-6)
                    other[key].copy_(mine[key])
        assert len(launches) == STEPS


class TestSemantics:
    def test_the_gradient_is_left_as_it_was(self):
        params = parameters(SHAPES)
        optimizer = optim.AdamW(params, clip="global_norm:max_norm=0.1", update_clip="block_rms:max_rms=0.1")
        give(params, 9)
        before = [p.grad.clone() for p in params if p.grad is not None]
        optimizer.step()
        assert all(map(torch.equal, [p.grad for p in params if p.grad is not None], before))
        assert optimizer.clipper.report.summary()["clipped"] == 1

    @pytest.mark.parametrize("place", ["clip", "update_clip"])
    @pytest.mark.parametrize(("name", "options"), [("AdamW", {}), ("SGD", {"momentum": 0.9, "dampening": 0.5})])
    def test_a_skipped_step_moves_nothing(self, name, options, place, launches):
        params = parameters(SHAPES)
        optimizer = getattr(optim, name)(params, weight_decay=0.1, **{place: "global_norm:max_norm=1"}, **options)
        for step in (5, 6):
            give(params, step)
            optimizer.step()
        made = len(launches)
        before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
        give(params, 6)
        params[0].grad[3, 3] = float("nan")
        optimizer.step()
        clipper = optimizer.clipper or optimizer.update_clipper
        assert clipper.step_was_skipped
        assert len(launches) == made
        assert all(map(torch.equal, params, before[0]))
        after = optimizer.state_dict()["state"]
        assert all(torch.equal(after[i][key], value) for i, entry in before[1].items() for key, value in entry.items())

    def test_a_first_update_that_is_skipped_leaves_the_first_step_to_the_next(self):
        """The first momentum is the gradient, without dampening."""
        found = []
        for first in (True, False):
            p = nn.Parameter(torch.ones(5))
            optimizer = optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5, update_clip="global_norm:max_norm=9")
            for number in [float("nan")] * first + [1.0, 2.0]:
                p.grad = torch.full((5,), number)
                optimizer.step()
            found.append(p.detach())
        assert torch.equal(*found)

    def test_an_infinite_update_at_a_learning_rate_of_0_moves_no_weight(self):
        p = nn.Parameter(torch.ones(5))
        optimizer = optim.SGD([p], lr=0.0, clip={"gradient": "none", "nonfinite": "pass"})
        p.grad = torch.full((5,), float("inf"))
        optimizer.step()
        assert torch.equal(p, torch.ones(5))

    def test_a_gradient_whose_sign_is_still_to_be_taken(self):
        """As autograd leaves behind the conjugate of a complex number."""
        a, b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))
        optimizer = optim.SGD([a, b], lr=0.1, clip="global_norm:max_norm=100")
        (torch.complex(a, b).conj() * (1 + 3j)).real.backward()
        assert b.grad.is_neg()
        optimizer.step()
        assert (a.item(), b.item()) == pytest.approx((0.9, 1.7))

    def test_a_variance_that_is_nearly_0_stays_above_it(self, launches):
        """Of gradients that hardly change, centered RMSprop finds one in the last digits of two averages."""
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(100, generator=generator)
        p = nn.Parameter(torch.zeros(100))
        optimizer = optim.RMSprop([p], lr=1e-5, centered=True)
        for _ in range(40 if INTERPRETED else 1500):
            p.grad = base * (1 + 1e-3 * torch.randn(100, generator=generator))
            optimizer.step()
        assert set(launches) == {"rmsprop"}
        assert p.isfinite().all()

    def test_another_order_of_the_elements(self, monkeypatch, launches):
        """Served where all tensors of a parameter have it, else by the foreach form."""
        memory = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
        found = []
        for form in (FORM, "eager"):
            monkeypatch.setenv(kernels.VARIABLE, form)
            p = nn.Parameter(memory.clone().contiguous(memory_format=torch.channels_last))
            optimizer = optim.AdamW([p], clip="global_norm:max_norm=1")
            for grad in (memory.contiguous(memory_format=torch.channels_last), memory, -memory):
                p.grad = grad.clone()
                optimizer.step()
            found.append(p.detach())
        assert launches == ["adam"]
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("update", [None, "block_rms:max_rms=0.5"])
    def test_a_group_that_is_not_served(self, update, monkeypatch, launches):
        """float64, beside float32: the foreach form takes it, or both groups if updates are measured."""
        found = []
        for form in (FORM, "eager"):
            monkeypatch.setenv(kernels.VARIABLE, form)
            params = [nn.Parameter(torch.ones(20)), nn.Parameter(torch.ones(30, dtype=torch.float64))]
            optimizer = optim.AdamW(
                [{"params": [p]} for p in params], clip="global_norm:max_norm=1", update_clip=update
            )
            for step in range(3):
                for p in params:
                    p.grad = torch.full_like(p, 0.5 + step)
                optimizer.step()
            found.append([p.detach() for p in params])
        assert launches == ([] if update else ["adam"] * 3)
        for p, q in zip(*found, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)

    def test_on_several_devices_the_foreach_form_serves(self, launches):
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="meta"))]
        optimizer = optim.SGD(params, lr=0.1)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert launches == []

    def test_by_unit_the_foreach_form_serves(self, launches):
        p = nn.Parameter(torch.ones(4, 5))
        optimizer = optim.AdamW([p], clip="agc")
        p.grad = torch.ones(4, 5)
        optimizer.step()
        assert launches == []
        assert (p.grad < 1).all()


class TestFailure:
    @pytest.mark.parametrize(("update", "fails"), [(None, "step_"), (ZCLIP, "measure"), (ZCLIP, "step_")])
    def test_said_once_and_the_foreach_form_goes_on(self, update, fails, monkeypatch, caplog):
        """From the step in which it fails, wherever it fails, and every clipper decides once per step."""
        calls, works = [], getattr(fused, fails)

        def fail(*args):
            calls.append(1)
            if len(calls) > 11:
                raise RuntimeError("no such device")
            return works(*args)

        monkeypatch.setattr(fused, fails, fail)
        caplog.set_level(logging.WARNING, logger="hf_gradclip")
        a, b = pair(monkeypatch, "AdamW", [[(9,)], [(7,)]], clip=ZCLIP, update_clip=update)
        same(a, b)
        assert caplog.text.count("no such device. Plain torch serves instead") == 1
        assert len(calls) == 12
        for key, value in b.state_dict()["clip"].items():
            torch.testing.assert_close(a.state_dict()["clip"][key]["state"], value["state"], rtol=1e-5, atol=1e-6)

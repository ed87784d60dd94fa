"""Clip and step in Triton on a GPU: the numbers, the same ones every time, few launches, one read by the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_gradclip import optim
from hf_gradclip.kernels import choice, table
from hf_gradclip.kernels.eager import whole as eager
from hf_gradclip.kernels.rule import Memory, Places, Rule
from tests.kernels.tensors import randn
from tests.kernels.test_quotient import apart, spread, wanted

pytestmark = pytest.mark.gpu

SIZES = [3_000_001, 65_536, 16_385, 100, 7, 1, 0]
CLIPS = {"clip": "param_norm:max_norm=20", "update_clip": "block_rms:max_rms=0.5"}
NAMES = ["AdamW", "Adam", "RMSprop", "SGD"]


@pytest.fixture(autouse=True)
def _triton(monkeypatch) -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    choice.forget()
    yield
    torch.cuda.set_sync_debug_mode("default")
    assert choice._given_up == {}


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Two of each size: one on 16 bytes, one an element further."""
    generator = torch.Generator("cuda").manual_seed(0)
    found = []
    for size in SIZES:
        memory = torch.randn(size + 1, generator=generator, device="cuda").to(dtype)
        found += [nn.Parameter(memory[:size].clone()), nn.Parameter(memory[1:])]
    return found


def give(params: list[nn.Parameter], step: int) -> None:
    """Gradients at new addresses, half of them an element off."""
    generator = torch.Generator("cuda").manual_seed(step)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.numel() + 1, generator=generator, device="cuda").to(p.dtype)[(i // 2) % 2 :][: p.numel()]


def make(name: str, params: list[nn.Parameter], **clips: Any) -> torch.optim.Optimizer:
    more = {"momentum": 0.9} if name == "SGD" else {}
    return getattr(optim, name)(params, lr=0.01, weight_decay=0.1, **more, **clips)


def trained(name: str, dtype: torch.dtype, steps: int, **clips: str) -> list[Tensor]:
    params = parameters(dtype)
    optimizer = make(name, params, **clips)
    for step in range(steps):
        give(params, step)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("name", NAMES)
def test_as_in_float64(name) -> None:
    """The plain form in float64, which Triton does not take."""
    ours, theirs = parameters(torch.float32), [nn.Parameter(p.detach().double()) for p in parameters(torch.float32)]
    a, b = make(name, ours, **CLIPS), make(name, theirs, **CLIPS)
    for step in range(20):
        give(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.double()
        before = [p.grad.clone() for p in ours]
        a.step()
        b.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(ours, before, strict=True))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-5)
    assert a.clipper.report.summary()["clipped"] == b.clipper.report.summary()["clipped"] > 0
    assert a.update_clipper.report.summary()["clipped"] == b.update_clipper.report.summary()["clipped"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype) -> None:
    """One step of AdamW from nothing moves each weight by lr g / (|g| + eps), in float32 and rounded to nearest."""
    params = [p for p in parameters(dtype) if p.numel()]
    give(params, 1)
    moves = [0.01 * p.grad.double() / (p.grad.double().abs() + 1e-8) for p in params]
    want = [p.detach().double() * (1 - 0.01 * 0.1) - move for p, move in zip(params, moves, strict=True)]
    optim.AdamW(params, lr=0.01, weight_decay=0.1, clip="none").step()
    for p, expected in zip(params, want, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-8)
        assert (p != expected.to(dtype)).float().mean() < 0.01 or p.numel() < 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_in_100_runs(dtype) -> None:
    first = trained("AdamW", dtype, 2, **CLIPS)
    for _ in range(100):
        assert all(map(torch.equal, trained("AdamW", dtype, 2, **CLIPS), first))


@pytest.mark.parametrize("name", NAMES)
def test_few_launches_for_any_number_of_tensors(name) -> None:
    """Of the kernels that move weights and moments: one that measures the update, what adds it up, and the step."""
    params = [nn.Parameter(torch.randn(500, device="cuda")) for _ in range(200)]
    optimizer = make(name, params, **CLIPS)
    for step in range(3):
        give(params, step)
        if step < 2:
            optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in names if name in ("_step", "_measure", "_scale_and_clamp")]) == 3
    assert "_scale_and_clamp" not in names
    assert "multi_tensor_apply" not in " ".join(names)


@pytest.mark.parametrize("nonfinite", ["skip", "pass"])
def test_the_host_reads_one_flag_per_clipper_and_none_if_nothing_is_skipped(nonfinite, monkeypatch) -> None:
    params = parameters(torch.float32)
    spec = {"gradient": CLIPS["clip"], "nonfinite": nonfinite}
    optimizer = optim.AdamW(params, clip=spec, update_clip=CLIPS["update_clip"])
    for step in range(2):
        give(params, step)
        optimizer.step()
    give(params, 2)
    settle, reads = type(optimizer.clipper).settle, []

    def settled(clipper, decision):
        torch.cuda.set_sync_debug_mode("default" if nonfinite == "skip" else "error")
        reads.append(1)
        found = settle(clipper, decision)
        torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(type(optimizer.clipper), "settle", settled)
    torch.cuda.set_sync_debug_mode("error")
    optimizer.step()
    assert len(reads) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_skip_that_nobody_reads(name) -> None:
    """The run with a read, with NaN in the first step and in others; after the first nobody waits at all."""
    found = []
    for sync in (True, False):
        params = parameters(torch.float32)
        clip = {"gradient": CLIPS["clip"], "skip_sync": sync}
        optimizer = make(name, params, clip=clip, update_clip=CLIPS["update_clip"])
        for step in range(8):
            give(params, step)
            if step in (0, 3, 4, 6):
                params[1].grad.fill_(float("nan"))
            torch.cuda.set_sync_debug_mode("default" if sync or step == 0 else "error")
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
        state = optimizer.state_dict()["state"].values()
        found.append([*params, *(entry[key] for entry in state for key in sorted(entry) if entry[key] is not None)])
        assert optimizer.clipper.report.summary()["skipped"] == 4
    for a, b in zip(*found, strict=True):
        assert a.device == b.device
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("eps", [1e-8, 1e-12, 0.0])
def test_an_update_is_within_one_unit_in_the_last_place(eps) -> None:
    """With the instructions that test_quotient.py puts in their place."""
    a, square, term = spread(3, -20, 20), spread(1, -90, 90), (1.7, 0.3)
    weight, grad = torch.zeros_like(a, device="cuda"), torch.zeros_like(a, device="cuda")
    memory = Memory([weight], [grad], [a.cuda()], [square.cuda()], [None])
    rule = Rule("adam", 1.0, 0.0, True, False, past=1.0, fresh=0.0, past2=1.0, fresh2=0.0, eps=eps, terms=[term])
    choice.triton_language().step.step_(rule, memory, Places((0,), (0,)), None, None)
    assert apart(-weight.cpu(), wanted(a, square, eps, term)) <= 1


@pytest.mark.parametrize("dtype", table.DTYPES)
def test_plain_torch_rounds_once(dtype) -> None:
    """By factors on the device and of the host, many gradients in a launch."""
    for factor_S in (torch.tensor(0.3337123), torch.tensor([0.3337123, 1.7])):
        for numbers in (factor_S, factor_S.cuda()):
            grads = [randn(size, dtype, size).cuda() for size in (300, 70_001)]
            want = [(g.float() * f).to(dtype) for g, f in zip(grads, factor_S.expand(2).tolist(), strict=True)]
            sums_S, max_S = eager.statistics(grads, torch.float64, grads[0].device, True)
            torch.testing.assert_close(
                sums_S, torch.stack([g.double().square().sum() for g in grads]), rtol=1e-6, atol=0
            )
            assert torch.equal(max_S, torch.stack([g.double().abs().max() for g in grads]))
            eager.apply_(grads, numbers, None)
            assert all(map(torch.equal, grads, want))


def test_more_than_2_31_elements() -> None:
    size = (1 << 31) + 70_001
    free, _ = torch.cuda.mem_get_info()
    if free < 5 * 2 * size:
        pytest.skip(f"needs {10 * size / 2**30:.0f} GiB of free memory on the device")
    p = nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.full_like(p, 2.0)
    optim.SGD([p], lr=0.5, momentum=0.9, clip="value:max_value=1").step()
    assert (p[-100_000:] == 0.5).all()
    assert (p[:100_000] == 0.5).all()

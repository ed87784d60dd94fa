"""Tensors on several devices, each part by its own kernels; and gradients of a GPU in plain torch, many in a launch.

There is one device here. It is cut in two where the package asks what lies where; and a GPU's tensors are fake: they
have a device and no memory, and what would be launched is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_gradclip import kernels
from hf_gradclip.kernels import choice, devices, table
from hf_gradclip.kernels.eager import many
from hf_gradclip.kernels.eager import whole as eager
from hf_gradclip.kernels.operations import WrittenError
from tests.kernels.languages import NAMES, serving
from tests.kernels.tensors import CPU, randn, same_bits, wanted
from tests.kernels.test_moved import GPU

F64 = torch.float64


@pytest.fixture
def apart(monkeypatch) -> list[torch.device]:
    """Every second tensor as if on a device of its own; the devices that a language was then asked for."""
    asked: list[torch.device] = []

    def parts_of(tensors, device):
        if len(tensors) < 4:  # a part
            asked.append(device)
            return []
        return [(CPU, [*range(0, len(tensors), 2)]), (CPU, [*range(1, len(tensors), 2)])]

    monkeypatch.setattr(kernels, "parts_of", parts_of)
    return asked


def made() -> list[Tensor | None]:
    return [randn(5), randn(300, torch.bfloat16, 1), None, randn(7, seed=2), randn(1, seed=3)]


@pytest.mark.parametrize("name", NAMES)
class TestParts:
    def test_statistics(self, name, request):
        with serving(name):
            want = kernels.statistics(made(), F64, CPU, True)
            asked = request.getfixturevalue("apart")
            got = kernels.statistics(made(), F64, CPU, True)
        assert len(asked) == 2
        assert all(map(torch.equal, got, want))

    @pytest.mark.parametrize("bounded", [True, False])
    def test_apply(self, name, bounded, apart):
        scale_S = torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5], dtype=F64)
        bound_S = torch.tensor([0.1, math.inf, 1.0, 0.3, math.inf], dtype=F64) if bounded else None
        for plan in ((scale_S, bound_S), (torch.tensor(0.5), bound_S)):
            grads = made()
            with serving(name):
                kernels.apply_(grads, *plan)
            for i, (grad, old) in enumerate(zip(grads, made(), strict=True)):
                if grad is not None:
                    bound = math.inf if bound_S is None else float(bound_S[i])
                    assert torch.equal(grad, wanted(old, plan[0][i] if plan[0].ndim else plan[0], bound))

    def test_by_unit(self, name, request):
        shapes, kept = [(3, 40), (5, 8), (2, 6), (4, 4)], [(0,), (1,), (0,), (1,)]
        counts = [3, 8, 2, 4]
        scale_U = torch.linspace(0.2, 1.0, 17, dtype=F64)
        blocks = [[randn(a * b, seed=a).view(a, b) for a, b in shapes] for _ in range(2)]
        with serving(name):
            want = kernels.unit_sums(blocks[0], kept, counts, F64, CPU)
            kernels.unit_apply_(blocks[0], kept, counts, scale_U, scale_U)
            asked = request.getfixturevalue("apart")
            assert torch.equal(kernels.unit_sums(blocks[1], kept, counts, F64, CPU), want)
            kernels.unit_apply_(blocks[1], kept, counts, scale_U, scale_U)
        assert len(asked) == 4
        assert all(map(same_bits, *blocks))


def test_what_was_written_before_a_part_is_refused_is_said(apart):
    grads = [torch.ones(3), torch.ones(4)[::2], torch.ones(3), torch.ones(3)]
    with pytest.raises(WrittenError, match="strides"):
        kernels.apply_(grads, torch.tensor(0.5), None)
    grads[0], grads[1] = grads[1], grads[0]
    with pytest.raises(table.MisfitError, match="strides"):
        kernels.apply_(grads, torch.tensor(0.5), None)
    assert grads[1].tolist() == [0.5] * 3


class Launches(TorchDispatchMode):
    """Counts what is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.namespace == "aten":
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch) -> Iterator[Launches]:
    monkeypatch.setattr(many, "GPUS", (GPU.type,))
    monkeypatch.setattr(many, "PLAIN", {FakeTensor})
    with FakeTensorMode(), Launches() as mode:
        yield mode


def on_gpu(count: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(40 + i, dtype=dtype, device=GPU) for i in range(count)]


def test_each_device_is_asked_for_its_own(monkeypatch):
    asked, whole = [], choice.whole

    def seen(grads, device):
        asked.append((len(grads), device))
        return whole(grads, device)

    monkeypatch.setattr(choice, "whole", seen)
    with FakeTensorMode():
        grads = [torch.empty(4), torch.empty(4, device=GPU), None, torch.empty(4)]
        assert devices.parts_of(grads, GPU) == [(CPU, [0, 2, 3]), (GPU, [1])]
        assert devices.parts_of(grads[:1], CPU) == devices.parts_of([None], GPU) == []
        for device in (CPU, GPU):
            sumsq_S, max_S = kernels.statistics(grads, F64, device, True)
            assert sumsq_S.device == max_S.device == device
            assert sumsq_S.shape == max_S.shape == (4,)
    assert asked == [(3, CPU), (1, GPU)] * 2


@pytest.mark.parametrize("dtype", table.DTYPES)
class TestLaunches:
    """Of plain torch, for 50 gradients of a GPU."""

    def test_statistics(self, launches, dtype):
        grads = on_gpu(50, dtype)
        launches.seen.clear()
        eager.statistics(grads, F64, GPU, True)
        assert len(launches.seen) < 10

    def test_one_factor(self, launches, dtype):
        grads, scale = on_gpu(50, dtype), torch.ones((), dtype=F64, device=GPU)
        launches.seen.clear()
        eager.apply_(grads, scale, None)
        assert len(launches.seen) < 5

    def test_a_factor_and_a_bound_for_each(self, launches, dtype):
        grads, (scale_S, bound_S) = on_gpu(50, dtype), torch.ones(2, 50, dtype=F64, device=GPU)
        launches.seen.clear()
        eager.apply_(grads, scale_S, bound_S)
        assert len(launches.seen) < 110


@pytest.mark.parametrize("dtype", table.DTYPES)
class TestMany:
    """The numbers, on the CPU."""

    def grads(self, dtype: torch.dtype) -> list[Tensor]:
        found = [randn(size, dtype, size) for size in (1, 300, 4099)]
        found[1][7], found[2][9] = math.nan, -math.inf
        return found

    def test_factors_round_once(self, dtype):
        for factor_S in (torch.tensor(0.3337123), torch.tensor([0.3337123, 1.0, 1.7])):
            grads = self.grads(dtype)
            many.scale_on_device_(grads, factor_S)
            for grad, old, factor in zip(grads, self.grads(dtype), factor_S.expand(3), strict=True):
                assert torch.equal(grad.isnan(), old.isnan())
                assert torch.equal(grad.nan_to_num(0), wanted(old, factor).nan_to_num(0))

    def test_statistics(self, dtype):
        grads = [*self.grads(dtype)[:1], randn(300, dtype, 1)]
        norms = torch.stack([g.double().norm() for g in grads])
        torch.testing.assert_close(many.norms(grads).double(), norms, rtol=1e-6, atol=0)
        assert torch.equal(many.largest(grads), torch.stack([g.abs().max() for g in grads]))
        assert many.largest(self.grads(dtype))[1:].isnan().tolist() == [True, False]

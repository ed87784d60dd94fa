"""Between a GPU and the host: what the host will read is waited for, and nothing else is.

A copy to the host that nobody waits for holds whatever was in its memory, until it has arrived. Nothing here has a
GPU, so the tensors are fake: they have a device and no memory, and every copy is seen on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_gradclip.kernels.eager import step, units
from hf_gradclip.kernels.eager import whole as eager
from hf_gradclip.kernels.rule import Memory, Places, Rule
from hf_gradclip.run.weight_difference import correct_
from hf_gradclip.types import ClipPlan

# a torch built without CUDA cannot index a fake CUDA tensor; the lazy device stands in for it there
GPU = torch.device("cuda:0" if torch.backends.cuda.is_built() else "lazy:0")
CPU = torch.device("cpu")


class Copies(TorchDispatchMode):
    """Notes every copy from one device to another: where it goes, and whether somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and to is not None and to.type != args[0].device.type:
            self.seen.append((to.type, not kwargs.get("non_blocking", False)))
        return func(*args, **kwargs)


@pytest.fixture
def copies() -> Iterator[Copies]:
    with FakeTensorMode(), Copies() as mode:
        yield mode


def grads(*devices: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.empty(6, 5, dtype=dtype, device=device) for device in devices]


def scale_(kernel: Callable[..., None], device: torch.device, other: torch.device) -> None:
    kernel(grads(other), torch.empty(1, dtype=torch.float64, device=device))


WAYS: dict[str, Callable[[torch.device, torch.device], object]] = {
    "sumsq": lambda device, other: eager.sumsq(grads(device, other), None, torch.float64, device),
    "divided": lambda device, other: eager.sumsq(
        grads(other), torch.empty(1, dtype=torch.float64, device=device), torch.float64, device
    ),
    "largest": lambda device, other: eager.largest(grads(device, other), torch.float64, device),
    "unit sums": lambda device, other: units.unit_sums(grads(other), [(1,)], [5], torch.float64, device),
    "unit norms": lambda device, other: units.unit_sums(grads(other), [(0,)], [6], torch.float64, device),
    "unit factor": lambda device, other: units.scale_(grads(other)[0], (0,), torch.empty(6, device=device)),
    "statistics": lambda device, other: eager.statistics(grads(device, other), torch.float64, device, True),
    "unit apply": lambda device, other: units.unit_apply_(
        grads(other), [(0,)], [6], torch.empty(6, dtype=torch.float64, device=device), None
    ),
    "correction": lambda device, other: correct_(
        grads(other), grads(other), [0.1], ClipPlan(torch.empty(1, device=device)),
        torch.empty(1, dtype=torch.int64, device=device), 1, lambda plan: None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_the_host_waits_for_what_it_reads(copies, way) -> None:
    """Numbers of gradients on a GPU for statistics on the host, or the other way round."""
    WAYS[way](*((GPU, CPU) if way in ("unit factor", "unit apply", "correction") else (CPU, GPU)))
    to_host = [waits for kind, waits in copies.seen if kind == "cpu"]
    assert to_host
    assert all(to_host)


@pytest.mark.parametrize("kernel", [eager.scale_, eager.clamp_, lambda *given: eager.apply_(*given, None)])
def test_factors_for_gradients_on_the_host(copies, kernel) -> None:
    scale_(kernel, GPU, CPU)
    assert copies.seen == [("cpu", True)]


@pytest.mark.parametrize("way", ["sumsq", "largest", "statistics", "unit sums", "unit norms"])
def test_nobody_waits_for_what_goes_to_the_device(copies, way) -> None:
    WAYS[way](GPU, CPU)
    to_device = [waits for kind, waits in copies.seen if kind == GPU.type]
    assert to_device
    assert not any(to_device)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_step_on_the_device_waits_for_nothing(copies, name) -> None:
    """Its plan is there; only the places of the numbers go there from the host."""
    moments = [grads(GPU, GPU) if name == "adam" else [None] * 2 for _ in range(2)]
    memory = Memory(grads(GPU, GPU), grads(GPU, GPU), *moments, [None] * 2)
    rule = Rule(name, 0.1, 0.1, True, False, 0.9, 0.1, 0.99, 0.01, 1e-8, [(1.0, 1.0)] * 2)
    plan = ClipPlan(torch.empty(2, dtype=torch.float64, device=GPU), torch.empty(2, device=GPU))
    step.measure_update(rule, memory, Places((0, 1), (1, 0)), plan)
    step.step_(rule, memory, Places((0, 1), (1, 0)), plan, plan)
    assert copies.seen
    assert set(copies.seen) == {(GPU.type, False)}


def test_the_test_sees_a_copy_that_nobody_waits_for(copies) -> None:
    torch.empty(3, device=GPU).to(CPU, non_blocking=True)
    assert copies.seen == [("cpu", False)]

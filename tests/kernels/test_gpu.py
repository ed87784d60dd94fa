"""The Triton kernels on a GPU: the numbers, the same ones every time, few launches, and no wait for the host."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hf_gradclip import Clipper
from hf_gradclip.kernels import choice
from hf_gradclip.kernels.operations import ByUnit, Language, Whole
from hf_gradclip.kernels.table import MisfitError
from hf_gradclip.state import flatten

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [3_000_001, 65_536, 65_535, 4_097, 100, 8, 7, 1]


@pytest.fixture
def triton(monkeypatch) -> Iterator[Language]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    choice.forget()
    yield choice.triton_language()
    choice.forget()


@pytest.fixture
def kernels(triton) -> Whole:
    return triton.whole


@pytest.fixture
def no_waiting(kernels) -> Iterator[None]:
    """Any call in which the host waits for the device is an error, after what compiles and allocates has been done."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def make(dtypes: list[torch.dtype], seed: int = 0) -> list[Tensor | None]:
    """A missing and an empty gradient, and two of each size: one on 16 bytes, one an element further."""
    generator = torch.Generator(device()).manual_seed(seed)
    grads: list[Tensor | None] = [None, torch.zeros(0, dtype=dtypes[0], device=device())]
    for dtype in dtypes:
        for size in SIZES:
            memory = torch.randn(size + 1, generator=generator, device=device()).to(dtype)
            grads += [memory[:size].clone(), memory[1:]]
    return grads


def sumsq64(grad: Tensor | None) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=device())
    return zero if grad is None else sum((part.double().square().sum() for part in grad.split(1 << 26)), start=zero)


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], [torch.float16], DTYPES])
class TestNumbers:
    def test_statistics(self, kernels, dtypes):
        grads = make(dtypes)
        sumsq_S, max_S = kernels.statistics(grads, torch.float64, device(), True)
        torch.testing.assert_close(sumsq_S, torch.stack([sumsq64(grad) for grad in grads]), rtol=1e-6, atol=0)
        for grad, largest in zip(grads, max_S.tolist(), strict=True):
            assert largest == (0 if grad is None or grad.numel() == 0 else grad.abs().max().item())

    def test_apply(self, kernels, dtypes):
        """Bit for bit what torch gives when it multiplies in float32 and rounds once."""
        grads = make(dtypes)
        scale_S = torch.linspace(0.1, 1.3, len(grads), dtype=torch.float64, device=device())
        scale_S[::3] = 1
        bound_S = torch.full_like(scale_S, float("inf"))
        bound_S[::2] = 0.7
        plan = list(zip(grads, scale_S.float(), bound_S.float(), strict=True))
        want = [g if g is None else (g.float() * scale).clamp(-bound, bound).to(g.dtype) for g, scale, bound in plan]
        kernels.apply_(grads, scale_S, bound_S)
        for got, expected in zip(grads, want, strict=True):
            assert got is expected is None or torch.equal(got, expected)

    def test_the_same_bits_in_100_runs(self, kernels, dtypes):
        grads = make(dtypes)
        first = torch.stack(kernels.statistics(grads, torch.float64, device(), True))
        for _ in range(100):
            assert torch.equal(torch.stack(kernels.statistics(grads, torch.float64, device(), True)), first)

    def test_at_most_four_launches(self, kernels, dtypes):
        grads = make(dtypes)
        step(kernels, grads)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            sumsq_S, _ = kernels.statistics(grads, torch.float64, device(), True)
            kernels.apply_(grads, sumsq_S, None)
            torch.cuda.synchronize()
        on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        launched = [event.name for event in on_device if not event.name.lower().startswith(("memcpy", "memset"))]
        assert 1 <= len(launched) <= 4, launched

    def test_the_host_never_waits(self, kernels, no_waiting, dtypes):
        grads, moved = make(dtypes), make(dtypes, seed=1)
        step(kernels, grads)
        torch.cuda.set_sync_debug_mode("error")
        step(kernels, grads)
        step(kernels, moved)


def step(kernels: Whole, grads: list[Tensor | None]) -> None:
    sumsq_S, max_S = kernels.statistics(grads, torch.float64, device(), True)
    kernels.apply_(grads, (1 / (sumsq_S.sum().sqrt() + 1e-6)).clamp(max=1), None)
    kernels.apply_(grads, torch.ones_like(sumsq_S), max_S)


KINDS = [((4096, 576), (0,)), ((1000, 7), (0,)), ((768, 3072), (1,)), ((4, 512, 96), (0, 2)), ((8, 96, 512), (0, 1))]


class TestUnits:
    """Rows, columns, and both within experts."""

    @pytest.fixture
    def by_unit(self, triton) -> ByUnit:
        return triton.units

    def make(self, dtype: torch.dtype) -> tuple[list[Tensor], list[tuple[int, ...]], list[int]]:
        generator = torch.Generator(device()).manual_seed(0)
        blocks = [torch.randn(shape, generator=generator, device=device()).to(dtype) for shape, _ in KINDS]
        kept = [axes for _, axes in KINDS]
        return blocks, kept, [math.prod(shape[axis] for axis in axes) for shape, axes in KINDS]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_numbers(self, by_unit, no_waiting, dtype):
        blocks, kept, counts = self.make(dtype)
        others = [[axis for axis in range(b.ndim) if axis not in axes] for b, axes in zip(blocks, kept, strict=True)]
        want = [b.double().square().sum(axes, keepdim=True) for b, axes in zip(blocks, others, strict=True)]
        found = [by_unit.unit_sums(blocks, kept, counts, torch.float64, device()) for _ in range(100)]
        assert all(torch.equal(found[0], sums_U) for sums_U in found)
        torch.testing.assert_close(found[0], torch.cat([sums.view(-1) for sums in want]), rtol=1e-6, atol=0)

        scale_U = torch.linspace(0.1, 1.3, len(found[0]), dtype=torch.float64, device=device()).clamp(max=1)
        scales = [scale.float().view(sums.shape) for scale, sums in zip(scale_U.split(counts), want, strict=True)]
        expected = [(b.float() * scale).to(dtype) for b, scale in zip(blocks, scales, strict=True)]
        torch.cuda.set_sync_debug_mode("error")
        by_unit.unit_sums(blocks, kept, counts, torch.float64, device())
        by_unit.unit_apply_(blocks, kept, counts, scale_U, None)
        torch.cuda.set_sync_debug_mode("default")
        assert all(map(torch.equal, blocks, expected))


@pytest.mark.parametrize("spec", ["zclip:warmup_steps=3,z_threshold=0.5", "adagc:warmup_steps=3", "agc:eps=5"])
def test_a_decision_that_skips_nothing_waits_for_nothing(kernels, no_waiting, spec):
    """Only the skip flag would be read, and `pass` needs none; some steps are clipped."""
    generator = torch.Generator(device()).manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)]).to(device())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator)
    clipper = Clipper.for_model(model, spec, nonfinite="pass")
    for step in range(30):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, device=device()) * (5 if step % 7 == 6 else 1)
        torch.cuda.set_sync_debug_mode("error" if step > 10 else "default")
        clipper.step()
    torch.cuda.set_sync_debug_mode("default")
    assert choice.language_of(device()).name == "Triton"
    assert clipper.report.summary()["clipped"] >= 4


@pytest.mark.parametrize("most", [16_384, 300], ids=["all on the host", "units on the device"])
@pytest.mark.parametrize("spec", ["global_norm:max_norm=60", "adaptive_norm", "adagc:warmup_steps=3", "adaptive"])
def test_a_step_that_is_read_is_judged_on_the_host_as_on_a_cpu(kernels, monkeypatch, spec, most):
    """One wait in a step, for the statistics; the gradients that are left are those of the same run on a CPU."""
    monkeypatch.setattr("hf_gradclip.seat.MOST", most)
    generator = torch.Generator().manual_seed(0)
    there = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
    model = copy.deepcopy(there).to(device())
    clippers = [Clipper.for_model(one, spec) for one in (there, model)]
    waits = []
    for step in range(30):
        grads = [torch.randn(p.shape, generator=generator) * (40 if step % 9 == 8 else 1) for p in there.parameters()]
        for p, q, grad in zip(there.parameters(), model.parameters(), grads, strict=True):
            p.grad, q.grad = grad, grad.to(device())
        norms = [float(clippers[0].step())]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            norm = clippers[1].step()
        torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in said))
        assert norm.device == device()
        assert norms[0] == pytest.approx(float(norm), rel=1e-6)
        for p, q in zip(there.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-5, atol=1e-7)
    assert set(waits[5:]) == {1}
    assert all(tensor.is_cpu for tensor in flatten(clippers[1].state).values())
    mine, theirs = (clipper.report.summary() for clipper in clippers)
    assert mine == pytest.approx(theirs)
    assert theirs["rate"] > 0


def test_triton_serves_on_a_gpu(kernels):
    """And is given up for plain torch nowhere in this file: its own numbers are those that are tested."""
    grads = make(DTYPES)
    assert choice.whole(grads, device()).whole is kernels
    assert choice._given_up == {}


def test_what_does_not_fit_is_refused_before_the_launch(kernels):
    """A read of memory that is not there would end the process's use of the device."""
    grads = [torch.ones(4, 6, device=device())]
    half = torch.full((3,), 0.5, device=device())
    for call in (
        lambda: kernels.apply_(grads, half, None),
        lambda: kernels.apply_(grads, half[:1].cpu(), None),
        lambda: kernels.statistics([torch.ones(3)], torch.float64, device(), True),
        lambda: choice.by_unit(grads, [(0,)], device()).units.unit_apply_(grads, [(0,)], [3], half, None),
    ):
        with pytest.raises(MisfitError):
            call()
    torch.cuda.synchronize()
    assert (grads[0] == 1).all()


def test_addresses_that_change_while_the_device_is_busy(kernels):
    """The host runs ahead: a table must not be overwritten while an earlier launch still needs it."""
    sets = [[torch.full((1000,), float(i + 1), device=device()) for _ in range(3)] for i in range(50)]
    kernels.statistics(sets[0], torch.float64, device(), True)
    torch.cuda._sleep(200_000_000)
    results = [kernels.statistics(grads, torch.float64, device(), True)[0] for grads in sets]
    for i, sumsq_S in enumerate(results):
        assert sumsq_S.tolist() == [1000.0 * (i + 1) ** 2] * 3


def test_more_than_2_31_elements(kernels):
    size = (1 << 31) + 70_001
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * 2 * size:
        pytest.skip(f"needs {6 * size / 2**30:.0f} GiB of free memory on the device")
    grad = torch.empty(size, dtype=torch.bfloat16, device=device()).normal_(generator=torch.Generator(device()))
    grad[-1] = 100
    want, last = sumsq64(grad).item(), grad[-1000:].clone()
    sumsq_S, max_S = kernels.statistics([grad], torch.float64, device(), True)
    assert sumsq_S.item() == pytest.approx(want, rel=1e-6)
    assert max_S.item() == 100
    kernels.apply_([grad], torch.tensor(0.5, device=device()), None)
    assert torch.equal(grad[-1000:], last * 0.5)
    assert sumsq64(grad).item() == pytest.approx(want / 4, rel=1e-6)

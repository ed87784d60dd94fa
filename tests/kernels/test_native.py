"""The kernels in C against float64 and torch: every sum within 1e-6, every element that is written bit for bit."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_gradclip import clip_grad_norm_, kernels
from hf_gradclip.kernels import native, table, units_native
from tests.kernels import tensors
from tests.kernels.guards import Guards
from tests.kernels.tensors import CPU, Axes, guarded, randn, segments, units, wanted

DTYPES = [torch.float32, torch.bfloat16]
assert_right = functools.partial(tensors.assert_right, units_native)


@pytest.fixture(scope="module", autouse=True)
def _library() -> ctypes.CDLL:
    return tensors.library()


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch) -> int:
    """Of torch; a single program is worth one here."""
    monkeypatch.setattr(native, "SHARE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_statistics(grads: list[Tensor | None]) -> None:
    sumsq_S, max_S = native.statistics(grads, torch.float64, CPU)
    wide = [torch.zeros(1, dtype=torch.float64) if g is None or g.numel() == 0 else g.double() for g in grads]
    torch.testing.assert_close(sumsq_S, torch.stack([g.square().sum() for g in wide]), rtol=1e-6, atol=0)
    assert torch.equal(max_S, torch.stack([g.abs().max() for g in wide]))


def assert_same(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.mark.usefixtures("threads")
class TestStatistics:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sizes(self, dtype):
        """About a vector, a row, four rows side by side, a program, and several."""
        sizes = (1, 7, 8, 15, 16, 17, 1023, 1025, 4095, 4096, 4097, 5121, 65_535, 65_536, 65_537, 300_001)
        assert_statistics([randn(size, dtype, seed=size) for size in sizes])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("start", range(4))
    def test_any_alignment(self, dtype, start):
        """The NaN around each segment is not read."""
        _, grads = segments([1, 7, 8, 9, 17, 100, 4099], dtype, start)
        assert_statistics(grads)

    def test_mixed_missing_and_empty(self):
        grads = [None, randn(50), torch.zeros(0), randn(7, torch.bfloat16), None, randn(3000), torch.zeros(9)]
        assert_statistics(grads)
        for none in ([], [None, None], [torch.zeros(0)]):
            sumsq_S, max_S = native.statistics(none, torch.float32, CPU)
            assert sumsq_S.dtype == max_S.dtype == torch.float32
            assert sumsq_S.tolist() == max_S.tolist() == [0.0] * len(none)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [0, 1500, 4200, 9_000])
    def test_nan_and_inf(self, dtype, bad, place):
        _, (grad, other) = segments([9_001, 4], dtype)
        grad[place] = bad
        sumsq_S, max_S = native.statistics([grad, other], torch.float64, CPU)
        assert sumsq_S[0].isnan() if math.isnan(bad) else sumsq_S[0].isposinf()
        assert max_S[0].isposinf()
        assert sumsq_S[1].isfinite()
        assert max_S[1].isfinite()

    @pytest.mark.parametrize("size", [1e38, 1e20, 2.0**51, 2.0**49, 1e-15, 1e-16, 1e-25, 1e-38])
    def test_squares_neither_overflow_nor_vanish(self, size):
        assert_statistics([randn(9000) * size, torch.tensor([size, 1.0, size]), torch.full((30,), size).bfloat16()])

    def test_subnormal_numbers(self):
        assert_statistics([torch.full((20,), 1e-45), torch.full((20,), 1e-39).bfloat16()])

    @settings(deadline=None, max_examples=30, database=None)
    @given(
        st.lists(
            st.tuples(st.sampled_from(DTYPES), st.integers(0, 9), st.one_of(st.none(), st.integers(0, 9000))),
            min_size=1,
            max_size=8,
        ),
        st.sampled_from([8, 64, 4100, 1 << 16]),
    )
    def test_any_set(self, kinds, chunk):
        grads = [None if size is None else segments([size], dtype, start)[1][0] for dtype, start, size in kinds]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "CHUNK", chunk)
            assert_statistics(grads)
            _, max_S = native.statistics(grads, torch.float64, CPU)
            want = [g if g is None else wanted(g, 1 / (1 + top)) for g, top in zip(grads, max_S, strict=True)]
            native.apply_(grads, 1 / (1 + max_S), None)
        for got, expected in zip(grads, want, strict=True):
            assert got is expected is None or assert_same(got, expected) is None


@pytest.mark.usefixtures("threads")
class TestApply:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale_dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("bounded", [False, True])
    def test_numbers_per_gradient(self, dtype, scale_dtype, bounded):
        sizes = (9001, 1, 255, 256, 257, 70_001)
        grads = [*(randn(size, dtype, seed=size) for size in sizes), None, torch.zeros(0, dtype=dtype)]
        scale_S = torch.tensor([0.3337, 0.0302, 1.0, 0.1, 1.7, 0.9, 0.2, 0.2], dtype=scale_dtype)
        bounds = [0.7, math.inf, 0.5, 0.05, math.inf, 0.3, 1.0, 1.0] if bounded else [math.inf] * 8
        plans = list(zip(grads, scale_S, bounds, strict=True))
        want = [grad if grad is None else wanted(grad, scale, bound) for grad, scale, bound in plans]
        native.apply_(grads, scale_S, torch.tensor(bounds, dtype=torch.float64) if bounded else None)
        for got, expected in zip(grads, want, strict=True):
            assert got is expected is None or assert_same(got, expected) is None

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_one_number_for_all(self, dtype):
        grads = [randn(70_001), randn(3, torch.bfloat16), None]
        scale = torch.tensor(0.3, dtype=dtype)
        want = [wanted(grad, scale) for grad in grads[:2]]
        native.apply_(grads, scale, None)
        assert_same(grads[0], want[0])
        assert_same(grads[1], want[1])
        shrunk = [wanted(grad, torch.ones(()), 0.01) for grad in grads[:2]]
        native.apply_(grads, scale.new_ones(()).expand(3), torch.tensor(0.01))
        assert_same(grads[0], shrunk[0])
        assert_same(grads[1], shrunk[1])

    @pytest.mark.parametrize("scale", [0.501, 0.7, 1.0 + 2**-7])
    def test_every_bfloat16_is_rounded_as_by_torch(self, scale):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).short().view(torch.bfloat16)
        got, want = every.clone(), wanted(every, torch.tensor(scale))
        native.apply_([got], torch.tensor(scale), None)
        assert torch.equal(got.isnan(), want.isnan())
        assert_same(got[~got.isnan()], want[~want.isnan()])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_and_inf(self, dtype):
        tensors.assert_nan_stays(native, dtype)

    def test_nothing_asked_is_neither_read_nor_written(self):
        """Its address is 0, so that either would end the process."""
        tensors.assert_untouched(native)

    @pytest.mark.parametrize("chunk", [1 << 12, 1 << 16])
    @pytest.mark.parametrize("offset", [0, 1, 3])
    @pytest.mark.parametrize("number", [7.0, math.nan])
    def test_nothing_else_is_read_or_written(self, chunk, offset, number, monkeypatch):
        monkeypatch.setattr(native, "CHUNK", chunk)
        guards = Guards(number)
        sizes = sorted({1, 7, 8, 9, 255, 257, 4095, 4097, chunk - 1, chunk + 3})
        grads = [guards.place(randn(size, DTYPES[i % 2], seed=i), offset) for i, size in enumerate(sizes)]
        assert_statistics(grads)
        native.apply_(grads, torch.linspace(0.1, 0.9, len(grads)), torch.full((len(grads),), 0.5))
        guards.assert_kept()


@pytest.mark.usefixtures("threads")
class TestUnits:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("start", [0, 1])
    def test_shapes(self, dtype, start):
        """Lines of a few elements, of rows and of several programs; columns in one stretch and in several; experts."""
        kinds: list[tuple[tuple[int, ...], Axes]] = [
            ((33, 264), (0,)), ((17, 7), (0,)), ((3, 5000), (0,)), ((9, 20_000), (0,)), ((3000, 8), (0,)),
            ((20, 264), (1,)), ((40, 3), (1,)), ((300, 2500), (1,)), ((65, 1025), (1,)), ((3, 20, 136), (0, 2)),
            ((3, 4, 16), (0, 1)), ((9,), (0,)), ((4, 5), (0, 1)), ((1, 1000), (0,)), ((5, 1), (0,)), ((5, 1), (1,)),
        ]  # fmt: skip
        blocks = [guarded(shape, dtype, start, seed) for seed, (shape, _) in enumerate(kinds)]
        assert_right(blocks, [axes for _, axes in kinds], [units(*kind) for kind in kinds])

    def test_mixed_missing_and_empty(self):
        empty, whole = guarded((0, 9), torch.float32, 0), guarded((5, 16), torch.float32, 0)
        assert_right([None, guarded((5, 9), torch.bfloat16, 3), empty, whole], [(0,), (1,), (0,), (0,)], [4, 9, 0, 5])
        assert units_native.sumsq([None], [(0,)], [3], torch.float64, CPU).tolist() == [0.0] * 3
        units_native.apply_([None], [(0,)], [3], torch.zeros(3), None)

    @settings(deadline=None, max_examples=30, database=None)
    @given(st.data())
    def test_any_set(self, data):
        kind = st.tuples(
            st.sampled_from(DTYPES),
            st.integers(0, 9),
            st.lists(st.integers(1, 70), min_size=2, max_size=3).map(tuple),
            st.booleans(),
        )
        kinds = data.draw(st.lists(kind, min_size=1, max_size=5))
        blocks = [guarded(shape, dtype, start, seed) for seed, (dtype, start, shape, _) in enumerate(kinds)]
        kept = [(0,) if rows else ((1,) if len(shape) == 2 else (0, 2)) for _, _, shape, rows in kinds]
        assert_right(blocks, kept, [units(shape, axes) for (_, _, shape, _), axes in zip(kinds, kept, strict=True)])

    @pytest.mark.parametrize("kept", [(0,), (1,)])
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_nan_and_inf_stay_in_their_unit(self, kept, bad):
        tensors.assert_nan_stays_in_its_unit(units_native, kept, bad)

    def test_not_served(self):
        block, _ = guarded((4, 6), torch.float32, 0)
        assert units_native.serves(block, (0,))
        assert not units_native.serves(block.t(), (0,))
        assert not units_native.serves(block.double(), (0,))
        assert not units_native.serves(block.half(), (0,))
        assert not units_native.serves(block.view(2, 2, 6), (1,))


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    grads = [randn(size, dtype) for dtype in DTYPES for size in (200_000, 1_000_001, 5)]
    block = randn(900 * 1100).view(900, 1100)
    monkeypatch.setattr(native, "SHARE", 1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            sums = [units_native.sumsq([block], [(axis,)], [block.shape[axis]], torch.float64, CPU) for axis in (0, 1)]
            found.append([*native.statistics(grads, torch.float64, CPU), *sums])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_threads_of_python_do_not_meet():
    """Two that clip tensors of the same sizes at the same time."""

    def clip(value: float, wrong: list[float]) -> None:
        grads = [torch.full((size,), value) for size in (3, 40, 500)]
        for _ in range(1000):
            sumsq_S, _ = native.statistics(grads, torch.float64, CPU)
            wrong += [x for x in (sumsq_S / value**2).tolist() if x not in (3.0, 40.0, 500.0)]

    wrong: list[float] = []
    threads = [threading.Thread(target=clip, args=(value, wrong)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_where_no_thread_can_be_had_everything_is_done_once(monkeypatch):
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(native, "SHARE", 1)
    monkeypatch.setattr(threading.Thread, "start", start)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        grad = torch.ones(1_000_000)
        native.apply_([grad], torch.tensor(0.5), None)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(grad, torch.full_like(grad, 0.5))


@pytest.mark.parametrize("module", [native, units_native])
@pytest.mark.parametrize(
    ("scale", "bound"), [(torch.full((2,), 0.5), None), (torch.tensor(0.5), torch.full((5,), 0.1))]
)
def test_numbers_that_do_not_fit_are_refused(module, scale, bound):
    grads, kept = [torch.ones(4, 5) for _ in range(3)], ([(0,)] * 3, [4] * 3) if module is units_native else ()
    with pytest.raises(RuntimeError, match="expand"):
        module.apply_(grads, *kept, scale, bound)
    assert all(torch.equal(grad, torch.ones(4, 5)) for grad in grads)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_uses_the_addresses_of_its_own_gradients(backend, monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    torch.compiler.reset()
    p = torch.nn.Parameter(torch.ones(5000))
    step = torch.compile(lambda: clip_grad_norm_([p], 1.0), backend=backend)
    kept = []
    for factor in (1.0, 3.0, 0.001):
        kept.append(p.grad)
        p.grad = torch.full((5000,), factor)
        norm = factor * math.sqrt(5000)
        assert step().item() == pytest.approx(norm, rel=1e-6)
        assert p.grad.norm().item() == pytest.approx(min(norm, 1.0), rel=1e-5)


def test_addresses_are_handed_over_once_for_gradients_and_weights(monkeypatch):
    grads, weights = ([randn(300, seed=i + start) for i in range(3)] for start in (0, 9))
    first = [native.statistics(tensors, torch.float64, CPU)[0] for tensors in (grads, weights)]
    monkeypatch.setattr(table, "upload", lambda *_: pytest.fail("uploaded"))
    again = [native.statistics(tensors, torch.float64, CPU)[0] for tensors in (grads, weights)]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(*first)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only where processes fork")
@pytest.mark.usefixtures("threads")
def test_a_child_has_threads_of_its_own():
    """Those of its parent are not there, and a call that waits for them would not end."""
    grad = torch.ones(300_000)  # torch's own threads do not survive a fork, so the child makes nothing large
    native.statistics([grad], torch.float64, CPU)
    child = os.fork()
    if child == 0:
        os._exit(0 if native.statistics([grad], torch.float64, CPU)[0].tolist() == [300_000.0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

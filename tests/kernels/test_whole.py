"""Whole gradients in every language: sums within 1e-6 of float64, and every element that is written bit for bit.

Triton runs in its interpreter, which truncates to bfloat16 what a GPU rounds to nearest (one unit in the last place)
and misreads bfloat16 below 2^-126, so none is given to it.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_gradclip.kernels.operations import Language
from hf_gradclip.kernels.table import table_of
from tests.kernels.guards import Guards, Torch
from tests.kernels.languages import DTYPES, KERNELS, OTHER, WAYS, by, each, set_chunk, using
from tests.kernels.tensors import (
    CPU,
    assert_all_same,
    assert_same,
    assert_statistics,
    randn,
    segments,
    wanted,
)


class TestStatistics:
    @each(*WAYS)
    def test_sizes(self, language, dtype):
        """About a vector, a row, a block of one program, four rows side by side, a program, and several."""
        sizes = (1, 7, 8, 9, 15, 16, 17, 1023, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 4103, 5121, 9001)
        assert_statistics(language, [randn(size, dtype, seed=size) for size in sizes])
        large = (65_535, 65_536, 65_537, 70_001, 300_001)
        assert_statistics(
            language, [randn(size, dtype, seed=size) for size in large[: 4 if language.name == "Triton" else 5]]
        )

    @each(*KERNELS)
    def test_many_chunks(self, language, dtype, monkeypatch):
        set_chunk(monkeypatch, language.whole, 1024)
        _, grads = segments([5001, 1024, 1023, 1025, 3 * 1024], dtype)
        assert_statistics(language, grads)

    @each(*WAYS)
    @pytest.mark.parametrize("start", range(8))
    def test_any_alignment(self, language, dtype, start):
        """The NaN around each segment is not read."""
        _, grads = segments([1, 7, 8, 9, 17, 100, 4099], dtype, start)
        assert_statistics(language, grads)

    def test_mixed_missing_and_empty(self, language):
        _, others = segments([33, 1], OTHER[language.name])
        grads = [None, randn(50), torch.zeros(0), randn(7, torch.bfloat16), *others, None, randn(3000), torch.zeros(9)]
        assert_statistics(language, grads)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_no_gradient_at_all(self, language, dtype):
        for grads in ([], [None, None], [torch.zeros(0)]):
            sumsq_S, max_S = language.whole.statistics(grads, dtype, CPU, max_abs=True)
            assert sumsq_S.dtype == max_S.dtype == dtype
            assert sumsq_S.tolist() == max_S.tolist() == [0.0] * len(grads)

    def test_many_small(self, language):
        dtypes = DTYPES[language.name]
        assert_statistics(language, [randn(1 + i % 40, dtypes[i % len(dtypes)], seed=i) for i in range(50)])

    @each(*WAYS)
    @pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [0, 1500, 4200, 5000, 9_000])
    def test_nan_and_inf(self, language, dtype, bad, place):
        """In the edge before the body, in the body, in the edge after it."""
        _, (grad, other) = segments([9_001, 4], dtype)
        grad[place] = bad
        sumsq_S, max_S = language.whole.statistics([grad, other], torch.float64, CPU, max_abs=True)
        assert sumsq_S[0].isnan() if math.isnan(bad) else sumsq_S[0].isposinf()
        assert max_S[0].isposinf()
        assert sumsq_S[1].isfinite()
        assert max_S[1].isfinite()

    @by(*KERNELS)
    @pytest.mark.parametrize("size", [1e38, 1e20, 2.0**51, 2.0**49, 1e-15, 1e-16, 1e-25, 1e-38])
    def test_squares_neither_overflow_nor_vanish(self, language, size):
        """Plain torch leaves that to a division by the largest element, see test_eager.py."""
        assert_statistics(language, [randn(9000) * size, torch.tensor([size, 1.0, size])])
        least = 1e-37 if language.name == "Triton" else size
        assert_statistics(language, [torch.full((30,), max(size, least)).bfloat16()])

    @by(*KERNELS)
    def test_smallest_numbers(self, language):
        grads = [torch.full((20,), 1e-45)]
        other = torch.full((20,), 6e-8).half() if language.name == "Triton" else torch.full((20,), 1e-39).bfloat16()
        assert_statistics(language, [*grads, other])

    def test_result_in_float32(self, language):
        grads = [randn(5000), torch.tensor([1e30])]
        sumsq_S, max_S = language.whole.statistics(grads, torch.float32, CPU, max_abs=True)
        assert sumsq_S.dtype == max_S.dtype == torch.float32
        assert sumsq_S[0].item() == pytest.approx(randn(5000).double().square().sum().item(), rel=1e-6)
        assert sumsq_S[1].isinf()
        assert max_S[1].item() == pytest.approx(1e30)


@pytest.mark.parametrize("way", ["C", "C in threads", "torch"])
@settings(deadline=None, max_examples=30, database=None)
@given(data=st.data())
def test_any_set(way, data):
    assert_any_set(way, data)


@settings(deadline=None, max_examples=12, database=None)
@given(data=st.data())
def test_any_set_in_triton(data):
    assert_any_set("Triton", data)


def assert_any_set(way: str, data: st.DataObject) -> None:
    """Statistics, and what is scaled by them."""
    with using(way) as language, pytest.MonkeyPatch.context() as patch:
        most = 100 if language.name == "Triton" else 9000
        kind = st.tuples(
            st.sampled_from(DTYPES[language.name]), st.integers(0, 9), st.one_of(st.none(), st.integers(0, most))
        )
        kinds = data.draw(st.lists(kind, max_size=8))
        set_chunk(patch, language.whole, data.draw(st.sampled_from([8, 64, 4096, 4104, 1 << 16])))
        grads = [None if size is None else segments([size], dtype, start)[1][0] for dtype, start, size in kinds]
        assert_statistics(language, grads)
        _, max_S = language.whole.statistics(grads, torch.float64, CPU, max_abs=True)
        want = [g if g is None else wanted(g, 1 / (1 + top)) for g, top in zip(grads, max_S, strict=True)]
        language.whole.apply_(grads, 1 / (1 + max_S), None)
        assert_all_same(language, grads, want)


class TestApply:
    @each(*WAYS)
    @pytest.mark.parametrize("scale_dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("bounded", [False, True])
    def test_numbers_per_gradient(self, language, dtype, scale_dtype, bounded):
        sizes = (9001, 1, 5, 255, 256, 257, 70_001)
        grads = [*(randn(size, dtype, seed=size) for size in sizes), None, torch.zeros(0, dtype=dtype)]
        scale_S = torch.tensor([0.3337, 0.0302, 0.5, 1.0, 0.1, 1.7, 0.9, 0.2, 0.2], dtype=scale_dtype)
        bounds = [0.7, math.inf, 0.3, 0.5, 0.05, math.inf, 0.3, 1.0, 1.0] if bounded else [math.inf] * 9
        plans = list(zip(grads, scale_S, bounds, strict=True))
        want = [grad if grad is None else wanted(grad, scale, bound) for grad, scale, bound in plans]
        language.whole.apply_(grads, scale_S, torch.tensor(bounds, dtype=torch.float64) if bounded else None)
        assert_all_same(language, grads, want)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_one_number_for_all(self, language, dtype):
        grads = [randn(70_001), randn(3, OTHER[language.name]), randn(3, torch.bfloat16), None]
        scale = torch.tensor(0.3, dtype=dtype)
        want = [grad if grad is None else wanted(grad, scale) for grad in grads]
        language.whole.apply_(grads, scale, None)
        assert_all_same(language, grads, want)
        shrunk = [grad if grad is None else wanted(grad, torch.ones(()), 0.01) for grad in grads]
        language.whole.apply_(grads, scale.new_ones(()).expand(4), torch.tensor(0.01, dtype=dtype))
        assert_all_same(language, grads, shrunk)

    @each(*WAYS)
    def test_only_the_product_is_rounded(self, language, dtype):
        """Once: a factor that is itself rounded to 16 bits would shift the whole tensor."""
        grad = randn(4000, dtype)
        scale = torch.tensor(0.501)
        exact = grad.double() * scale.double()
        language.whole.apply_([grad], scale, None)
        truncated = language.name == "Triton" and dtype == torch.bfloat16
        unit = torch.finfo(dtype).eps * (1.01 if truncated else 0.51)
        assert ((grad.double() - exact).abs() <= unit * exact.abs() + torch.finfo(dtype).tiny).all()

    @by("C", "C in threads", "torch")
    @pytest.mark.parametrize("scale", [0.501, 0.7, 1.0 + 2**-7])
    def test_every_bfloat16_is_rounded_to_nearest(self, language, scale):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).short().view(torch.bfloat16)
        got, want = every.clone(), wanted(every, torch.tensor(scale))
        language.whole.apply_([got], torch.tensor(scale), None)
        assert torch.equal(got.isnan(), want.isnan())
        assert_same(language, got[~got.isnan()], want[~want.isnan()])

    @each(*WAYS)
    @pytest.mark.parametrize("start", range(8))
    def test_only_the_segments_are_written(self, language, dtype, start, monkeypatch):
        set_chunk(monkeypatch, language.whole, 64)
        buffer, grads = segments([1, 7, 8, 9, 17, 100, 193], dtype, start)
        scale_S = torch.linspace(0.1, 1.2, len(grads))
        scale_S[3] = 1
        want = [wanted(grad, scale) for grad, scale in zip(grads, scale_S, strict=True)]
        guards = int(buffer.isnan().sum())
        language.whole.apply_(grads, scale_S, None)
        assert int(buffer.isnan().sum()) == guards
        assert_all_same(language, grads, want)

    @each(*WAYS)
    def test_clamp(self, language, dtype):
        grads = [randn(3001, dtype, seed=i) for i in range(3)]
        scale_S = torch.tensor([1.0, 0.5, 0.9])
        bounds = [0.7, 0.3, math.inf]
        want = [wanted(g, scale, bound) for g, scale, bound in zip(grads, scale_S, bounds, strict=True)]
        language.whole.apply_(grads, scale_S, torch.tensor(bounds, dtype=torch.float64))
        assert_all_same(language, grads, want)

    @each(*WAYS)
    def test_nan_stays(self, language, dtype):
        grad = torch.tensor([math.nan, math.inf, -math.inf, 3.0, -0.5], dtype=dtype)
        language.whole.apply_([grad], torch.tensor(0.5), torch.tensor([1.0]))
        assert grad[0].isnan()
        assert grad[1:].tolist() == [1.0, -1.0, 1.0, -0.25]
        language.whole.apply_([grad], torch.tensor(math.nan), None)
        assert grad.isnan().all()

    @by(*KERNELS)
    def test_nothing_asked_is_neither_read_nor_written(self, language):
        """Its address is 0, so that either would end the process."""
        grads = [randn(3000), randn(3000, seed=1)]
        want = [grads[0].clone(), wanted(grads[1], torch.tensor(0.5))]
        table_of([grads], CPU, language.whole.CHUNK).address_RS[0] = 0
        language.whole.apply_(grads, torch.tensor([1.0, 0.5]), None)
        language.whole.apply_(grads, torch.ones((), dtype=torch.float64), torch.full((2,), math.inf))
        assert all(map(torch.equal, grads, want))


def mixed(guards: Guards, language: Language, chunk: int, offset: int) -> list[Tensor]:
    """Of sizes about a word, a block and a chunk; the dtype changes from size to size."""
    sizes = enumerate(sorted({1, 7, 8, 9, 255, 257, 4095, 4097, chunk - 1, chunk + 3}))
    dtypes = DTYPES[language.name]
    return [guards.place(randn(size, dtypes[(i + offset) % len(dtypes)], seed=i), offset) for i, size in sizes]


OFFSETS = [*((1 << 12, offset) for offset in range(10)), *((1 << 16, offset) for offset in (0, 1, 3, 5))]


@pytest.mark.parametrize(("chunk", "offset"), OFFSETS)
class TestGuards:
    """Around every tensor; the last chunk is the one in use."""

    def test_nothing_else_is_written(self, language, chunk, offset, monkeypatch):
        set_chunk(monkeypatch, language.whole, chunk)
        guards = Guards(7.0)
        grads = mixed(guards, language, chunk, offset)
        scale_S = torch.linspace(0.1, 0.8, len(grads))
        bound_S = torch.tensor([0.5, math.inf] * 5)[: len(grads)]
        want = [wanted(g, scale, float(bound)) for g, scale, bound in zip(grads, scale_S, bound_S, strict=True)]
        language.whole.apply_(grads, scale_S, bound_S)
        guards.assert_kept()
        assert_all_same(language, grads, want)

    def test_nothing_else_is_counted(self, language, chunk, offset, monkeypatch):
        """Nor written beside what a kernel makes: its results, and what they are added up from."""
        set_chunk(monkeypatch, language.whole, chunk)
        guards = Guards(math.nan)
        grads = mixed(guards, language, chunk, offset)
        assert_statistics(language, grads)
        if language.name != "torch":
            before = guards.placed
            monkeypatch.setattr(language.whole, "torch", Torch(guards))
            assert_statistics(language, grads)
            assert guards.placed == before + 2 * {"C": 3, "Triton": 4}[language.name]
        guards.assert_kept()

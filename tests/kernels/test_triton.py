"""The Triton kernels against float64, run by Triton's interpreter.

Triton reads TRITON_INTERPRET while it is imported, so `test_under_the_interpreter` runs this file again in a process
where the variable is set; the classes are collected only there. The interpreter truncates float32 to bfloat16 where
a GPU rounds to nearest, so bfloat16 results may be one unit in the last place away; it also misreads bfloat16 below
2^-126, so none are given to it.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels import tensors
from tests.kernels.guards import Guards, Torch
from tests.kernels.tensors import CPU, randn, segments, wanted

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from hf_gradclip.kernels import fused_triton, table

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_under_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.fail("triton is missing, and its kernels untested: pip install -c constraints.txt -e '.[test]'")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr


def set_chunk(patch: pytest.MonkeyPatch, elements: int) -> None:
    patch.setattr(fused_triton, "CHUNK", elements)


def assert_statistics(grads: list[Tensor | None]) -> None:
    sumsq_S, max_S = fused_triton.statistics(grads, torch.float64, CPU)
    wide = [torch.zeros(1, dtype=torch.float64) if g is None or g.numel() == 0 else g.double() for g in grads]
    assert sumsq_S.dtype == max_S.dtype == torch.float64
    torch.testing.assert_close(sumsq_S, torch.stack([g.square().sum() for g in wide]), rtol=1e-6, atol=0)
    assert torch.equal(max_S, torch.stack([g.abs().max() for g in wide]))


def assert_same(got: Tensor, want: Tensor) -> None:
    """Bit for bit; one unit in the last place for bfloat16."""
    if got.dtype == torch.bfloat16:
        assert torch.equal(got.isnan(), want.isnan())
        apart = got.nan_to_num(0).view(torch.int16).int() - want.nan_to_num(0).view(torch.int16).int()
        assert apart.abs().le(1).all()
    else:
        assert torch.equal(got.view(-1).view(torch.uint8), want.view(-1).view(torch.uint8))


class TestStatistics:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sizes(self, dtype):
        assert_statistics([randn(size, dtype, seed=size) for size in (1, 7, 8, 9, 2047, 2048, 2049, 4096, 4103, 9001)])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_longer_than_a_chunk(self, dtype):
        assert_statistics([randn(70_001, dtype), randn(5, dtype)])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_many_chunks(self, dtype, monkeypatch):
        set_chunk(monkeypatch, 1024)
        _, grads = segments([5001, 1024, 1023, 1025, 3 * 1024], dtype)
        assert_statistics(grads)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("start", range(8))
    def test_any_alignment(self, dtype, start):
        """The NaN around each segment is not read."""
        _, grads = segments([1, 7, 8, 9, 17, 100], dtype, start)
        assert_statistics(grads)

    def test_mixed_missing_and_empty(self):
        _, halves = segments([33, 1], torch.float16)
        grads = [None, randn(50), torch.zeros(0), randn(7, torch.bfloat16), *halves, None, randn(3000), torch.zeros(9)]
        assert_statistics(grads)

    def test_no_gradient_at_all(self):
        for grads in ([], [None, None], [torch.zeros(0)]):
            sumsq_S, max_S = fused_triton.statistics(grads, torch.float32, CPU)
            assert sumsq_S.tolist() == max_S.tolist() == [0.0] * len(grads)

    def test_many_small(self):
        assert_statistics([randn(1 + i % 40, DTYPES[i % 3], seed=i) for i in range(50)])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [0, 5000, 6000])
    def test_nan_and_inf(self, dtype, bad, place):
        """In the edge before the body, in the body, in the edge after it."""
        _, (grad, other) = segments([6001, 4], dtype)
        grad[place] = bad
        sumsq_S, max_S = fused_triton.statistics([grad, other], torch.float64, CPU)
        assert sumsq_S[0].isnan() if math.isnan(bad) else sumsq_S[0].isposinf()
        assert max_S[0].isposinf()
        assert sumsq_S[1].isfinite()
        assert max_S[1].isfinite()

    @pytest.mark.parametrize("size", [1e38, 1e20, 2.0**51, 2.0**49, 1e-15, 1e-16, 1e-25, 1e-38])
    def test_squares_neither_overflow_nor_vanish(self, size):
        assert_statistics([randn(3000) * size, torch.tensor([size, 1.0, size])])
        assert_statistics([torch.full((30,), max(size, 1e-37)).bfloat16()])

    def test_smallest_numbers(self):
        assert_statistics([torch.full((20,), 1e-45), torch.full((20,), 6e-8, dtype=torch.float16)])

    def test_result_in_float32(self):
        sumsq_S, max_S = fused_triton.statistics([randn(5000), torch.tensor([1e30])], torch.float32, CPU)
        assert sumsq_S.dtype == max_S.dtype == torch.float32
        assert sumsq_S[0].item() == pytest.approx(randn(5000).double().square().sum().item(), rel=1e-6)
        assert sumsq_S[1].isinf()
        assert max_S[1].item() == pytest.approx(1e30)

    @settings(deadline=None, max_examples=12, database=None)
    @given(
        st.lists(
            st.tuples(st.sampled_from(DTYPES), st.integers(0, 9), st.one_of(st.none(), st.integers(0, 300))), max_size=8
        ),
        st.sampled_from([8, 64, 1 << 16]),
    )
    def test_any_set(self, kinds, chunk):
        grads = [None if size is None else segments([size], dtype, start)[1][0] for dtype, start, size in kinds]
        with pytest.MonkeyPatch.context() as patch:
            set_chunk(patch, chunk)
            sumsq_S, max_S = fused_triton.statistics(grads, torch.float64, CPU)
            before = [None if grad is None else grad.clone() for grad in grads]
            fused_triton.apply_(grads, 1 / (1 + max_S), None)
        for i, (grad, old) in enumerate(zip(grads, before, strict=True)):
            if grad is None or grad.numel() == 0:
                assert sumsq_S[i] == max_S[i] == 0
                continue
            assert sumsq_S[i].item() == pytest.approx(old.double().square().sum().item(), rel=1e-6)
            assert max_S[i].item() == old.abs().max().item()
            assert_same(grad, wanted(old, 1 / (1 + max_S[i])))


class TestApply:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale_dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_one_factor_each(self, dtype, scale_dtype):
        grads = [randn(9001, dtype, seed=1), randn(1, dtype), None, torch.zeros(0, dtype=dtype), randn(5, dtype)]
        scale_S = torch.tensor([0.3337, 0.0302, 0.1, 0.2, 1.7], dtype=scale_dtype)
        want = [None if grad is None else wanted(grad, scale) for grad, scale in zip(grads, scale_S, strict=True)]
        fused_triton.apply_(grads, scale_S, None)
        for got, expected in zip(grads, want, strict=True):
            assert got is expected is None or assert_same(got, expected) is None

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_one_factor_for_all(self, dtype):
        grads = [randn(70_001), randn(3, torch.float16), None]
        scale = torch.tensor(0.3, dtype=dtype)
        want = [wanted(grad, scale) for grad in grads[:2]]
        fused_triton.apply_(grads, scale, None)
        assert_same(grads[0], want[0])
        assert_same(grads[1], want[1])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_only_the_product_is_rounded(self, dtype):
        """Once: a factor that is itself rounded to 16 bits would shift the whole tensor."""
        grad = randn(4000, dtype)
        scale = torch.tensor(0.501)
        exact = grad.double() * scale.double()
        fused_triton.apply_([grad], scale, None)
        unit = torch.finfo(dtype).eps * (1.01 if dtype == torch.bfloat16 else 0.51)
        assert ((grad.double() - exact).abs() <= unit * exact.abs() + torch.finfo(dtype).tiny).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("start", range(8))
    def test_only_the_segments_are_written(self, dtype, start, monkeypatch):
        set_chunk(monkeypatch, 64)
        buffer, grads = segments([1, 7, 8, 9, 17, 100, 193], dtype, start)
        scale_S = torch.linspace(0.1, 1.2, len(grads))
        scale_S[3] = 1
        want = [wanted(grad, scale) for grad, scale in zip(grads, scale_S, strict=True)]
        guards = int(buffer.isnan().sum())
        fused_triton.apply_(grads, scale_S, None)
        assert int(buffer.isnan().sum()) == guards
        for got, expected in zip(grads, want, strict=True):
            assert_same(got, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_clamp(self, dtype):
        grads = [randn(3001, dtype, seed=i) for i in range(3)]
        scale_S = torch.tensor([1.0, 0.5, 0.9])
        bounds = [0.7, 0.3, math.inf]
        want = [wanted(g, scale, bound) for g, scale, bound in zip(grads, scale_S, bounds, strict=True)]
        fused_triton.apply_(grads, scale_S, torch.tensor(bounds, dtype=torch.float64))
        for got, expected in zip(grads, want, strict=True):
            assert_same(got, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_and_inf(self, dtype):
        tensors.assert_nan_stays(fused_triton, dtype)

    def test_nothing_asked_is_neither_read_nor_written(self):
        """Its address is 0, so that either would end the process."""
        tensors.assert_untouched(fused_triton)


@pytest.mark.parametrize(("chunk", "offset"), [*((1 << 12, offset) for offset in range(10)), (1 << 16, 5)])
class TestGuards:
    """Around every tensor, of sizes about a word, a block and a chunk; the last chunk is the one in use.

    The dtype changes from size to size.
    """

    __test__ = INTERPRETED

    def made(self, guards: Guards, chunk: int, offset: int) -> list[Tensor]:
        sizes = enumerate(sorted({1, 7, 8, 9, 4095, 4097, chunk - 1, chunk + 3}))
        return [guards.place(randn(size, DTYPES[(i + offset) % 3], seed=i), offset) for i, size in sizes]

    def test_nothing_else_is_written(self, chunk, offset, monkeypatch):
        set_chunk(monkeypatch, chunk)
        guards = Guards(7.0)
        grads = self.made(guards, chunk, offset)
        scale_S = torch.linspace(0.1, 0.8, len(grads))
        bound_S = torch.tensor([0.5, math.inf] * 4)[: len(grads)]
        want = [wanted(g, scale, float(bound)) for g, scale, bound in zip(grads, scale_S, bound_S, strict=True)]
        fused_triton.apply_(grads, scale_S, bound_S)
        guards.assert_kept()
        for got, expected in zip(grads, want, strict=True):
            assert_same(got, expected)

    def test_nothing_else_is_counted(self, chunk, offset, monkeypatch):
        """The results too, and what they are added up from, lie between guards."""
        set_chunk(monkeypatch, chunk)
        guards = Guards(math.nan)
        grads = self.made(guards, chunk, offset)
        monkeypatch.setattr(fused_triton, "torch", Torch(guards))
        assert_statistics(grads)
        assert guards.placed == len(grads) + 4
        guards.assert_kept()


class TestTable:
    __test__ = INTERPRETED

    def count_uploads(self, monkeypatch) -> list[int]:
        uploads, upload = [], table.upload
        monkeypatch.setattr(table, "upload", lambda values, *to: uploads.append(1) or upload(values, *to))
        monkeypatch.setattr(table, "_tables", OrderedDict())
        return uploads

    def test_uploaded_only_when_changed(self, monkeypatch):
        uploads = self.count_uploads(monkeypatch)
        grads = [randn(100), None, randn(50, torch.bfloat16)]
        assert_statistics(grads)
        first = len(uploads)
        assert_statistics(grads)
        fused_triton.apply_(grads, torch.tensor(0.5), None)
        assert len(uploads) == first
        grads[0] = randn(101)[1:]
        assert_statistics(grads)
        assert len(uploads) == first + 1

    def test_new_addresses_are_used(self):
        keep = []
        for seed in range(3):
            grads = [randn(1000, seed=seed), randn(3, torch.float16, seed=seed)]
            keep += grads
            assert_statistics(grads)
            want = wanted(grads[0], torch.tensor(0.7))
            fused_triton.apply_(grads, torch.tensor(0.7), None)
            assert_same(grads[0], want)

    def test_a_gradient_goes_missing(self):
        grads = [randn(100), randn(50)]
        assert_statistics(grads)
        assert_statistics([grads[0], None])
        assert_statistics([None, grads[1]])

    def test_same_place_with_another_size_or_dtype(self):
        memory = randn(100)
        for grad in (memory, memory[:60], memory.view(torch.bfloat16)[:60].copy_(randn(60))):
            assert_statistics([grad])

    def test_few_tables_are_kept(self, monkeypatch):
        self.count_uploads(monkeypatch)
        monkeypatch.setattr(table, "TABLES", 3)
        for size in (1, 2, 3, 1, 4, 5, 1):
            assert_statistics([randn(size)])
        assert [sizes[0] for _, _, _, _, sizes, _ in table._tables] == [4, 5, 1]

    @pytest.mark.parametrize(
        ("grad", "says"),
        [
            (torch.zeros(3, dtype=torch.float64), "torch.float64"),
            (torch.zeros(6)[::2], "contiguous"),
            (torch.zeros(3, device="meta"), "meta"),
        ],
    )
    def test_refused(self, grad, says):
        with pytest.raises(ValueError, match=f"gradient 1 .*{says}"):
            fused_triton.statistics([None, grad], torch.float64, CPU)
        with pytest.raises(ValueError, match=f"gradient 1 .*{says}"):
            fused_triton.apply_([None, grad], torch.tensor(0.5), None)

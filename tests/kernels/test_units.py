"""Gradients by unit in every language: sums within 1e-6 of float64, and every element that is written bit for bit.

For Triton's interpreter see test_whole.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradclip.kernels import table
from hf_gradclip.kernels.blocks import block_table
from tests.kernels.languages import DTYPES, KERNELS, OTHER, WAYS, by, each, using
from tests.kernels.tensors import CPU, Axes, assert_units, guarded, same_bits, units

KINDS: list[tuple[tuple[int, ...], Axes]] = [
    ((33, 264), (0,)), ((17, 7), (0,)), ((20, 264), (1,)), ((40, 3), (1,)), ((3, 20, 136), (0, 2)),
    ((3, 4, 16), (0, 1)), ((9,), (0,)), ((4, 5), (0, 1)), ((1, 1000), (0,)), ((5, 1), (0,)), ((5, 1), (1,)),
]  # fmt: skip
"""Lines longer and shorter than a program's, columns, lines and columns of experts, elements, one line."""
LONG: list[tuple[tuple[int, ...], Axes]] = [
    ((3, 5000), (0,)), ((9, 20_000), (0,)), ((3000, 8), (0,)), ((300, 2500), (1,)), ((65, 1025), (1,)),
]  # fmt: skip
"""Lines of several programs; columns in several stretches."""


def assert_kinds(language, dtype, start, kinds) -> None:
    blocks = [guarded(shape, dtype, start, seed) for seed, (shape, _) in enumerate(kinds)]
    assert_units(language, blocks, [axes for _, axes in kinds], [units(*kind) for kind in kinds])


@each(*WAYS)
@pytest.mark.parametrize("start", [0, 1, 8])
def test_shapes(language, dtype, start):
    assert_kinds(language, dtype, start, KINDS)


@each("C", "C in threads", "torch")
@pytest.mark.parametrize("start", [0, 1])
def test_long_lines_and_many(language, dtype, start):
    assert_kinds(language, dtype, start, KINDS + LONG)


def test_mixed_missing_and_empty(language):
    empty, whole = guarded((0, 9), torch.float32, 0), guarded((5, 16), torch.float32, 0)
    kept: list[Axes] = [(0,), (1,), (0,), (0,)]
    for dtype in (OTHER[language.name], torch.bfloat16):
        assert_units(language, [None, guarded((5, 9), dtype, 3), empty, whole], kept, [4, 9, 0, 5])
    kernels = language.units
    assert kernels.unit_sums([None], [(0,)], [3], torch.float64, CPU).tolist() == [0.0] * 3
    assert kernels.unit_sums([], [], [], torch.float64, CPU).shape == (0,)
    kernels.unit_apply_([None], [(0,)], [3], torch.zeros(3), None)
    kernels.unit_apply_([], [], [], torch.zeros(0), None)


@pytest.mark.parametrize("way", ["C", "C in threads", "torch"])
@settings(deadline=None, max_examples=30, database=None)
@given(data=st.data())
def test_any_set(way, data):
    assert_any_set(way, data)


@settings(deadline=None, max_examples=6, database=None, derandomize=True)
@given(data=st.data())
def test_any_set_in_triton(data):
    assert_any_set("Triton", data)


def assert_any_set(way: str, data: st.DataObject) -> None:
    with using(way) as language:
        few = language.name == "Triton"
        kind = st.tuples(
            st.sampled_from(DTYPES[language.name]),
            st.integers(0, 9),
            st.lists(st.integers(1, 40 if few else 70), min_size=2, max_size=3).map(tuple),
            st.booleans(),
        )
        kinds = data.draw(st.lists(kind, min_size=1, max_size=2 if few else 5))
        blocks = [guarded(shape, dtype, start, seed) for seed, (dtype, start, shape, _) in enumerate(kinds)]
        kept = [(0,) if rows else ((1,) if len(shape) == 2 else (0, 2)) for _, _, shape, rows in kinds]
        counts = [units(shape, axes) for (_, _, shape, _), axes in zip(kinds, kept, strict=True)]
        assert_units(language, blocks, kept, counts)


@pytest.mark.parametrize("kept", [(0,), (1,)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_stay_in_their_unit(language, kept, bad):
    block, _ = guarded((20, 24), torch.float32, 0)
    block[3, 5] = bad
    got = language.units.unit_sums([block], [kept], [units((20, 24), kept)], torch.float64, CPU)
    assert (~got.isfinite()).nonzero().flatten().tolist() == [(3, 5)[kept[0]]]
    language.units.unit_apply_([block], [kept], [len(got)], torch.full_like(got, 0.5), torch.full_like(got, 9.0))
    assert block[3, 5].isnan() if math.isnan(bad) else block[3, 5] == 9.0
    assert int((~block.isfinite()).sum()) == (1 if math.isnan(bad) else 0)


@by(*KERNELS)
def test_nothing_asked_is_neither_read_nor_written(language):
    """Its address is 0, so that either would end the process."""
    blocks = [guarded((20, 24), torch.float32, 0, seed)[0] for seed in range(2)]
    want = [blocks[0].clone(), blocks[1] * 0.5]
    scale_U = torch.cat([torch.ones(20), torch.full((20,), 0.5)])
    block_table(blocks, [(0,), (0,)], [20, 20], CPU, language.units._programs).address_RS[0] = 0
    language.units.unit_apply_(blocks, [(0,), (0,)], [20, 20], scale_U, None)
    assert all(map(torch.equal, blocks, want))


def test_nothing_asked_writes_nothing_in_plain_torch():
    from hf_gradclip.kernels.eager import units as kernels

    block, _ = guarded((20, 24), torch.float32, 0)
    before = block._version
    kernels.unit_apply_([block], [(0,)], [20], torch.ones(20), torch.full((20,), math.inf))
    assert block._version == before
    kernels.unit_apply_([block], [(0,)], [20], torch.linspace(0.5, 1, 20), None)
    assert block._version > before


@by(*KERNELS)
def test_uploaded_only_when_changed(language, monkeypatch):
    block, _ = guarded((20, 24), torch.float32, 0)
    language.units.unit_sums([block], [(0,)], [20], torch.float64, CPU)
    monkeypatch.setattr(table, "upload", lambda *_: pytest.fail("uploaded"))
    language.units.unit_sums([block], [(0,)], [20], torch.float64, CPU)
    language.units.unit_apply_([block], [(0,)], [20], torch.ones(20), None)


def test_served(language):
    """Plain torch takes every block, and of what the others do not take it gives the right sums."""
    block, _ = guarded((4, 6), torch.float32, 0)
    everything = language.name == "torch"
    assert language.units.serves([block, None, block], [(0,), (0,), (1,)])
    assert language.units.serves([block], [(0, 1)])
    assert language.units.serves([block, block.half()], [(0,), (0,)]) == (language.name != "C")
    for other, kept in ((block.t(), (0,)), (block.double(), (0,)), (block.view(2, 2, 6), (1,)), (block[:, ::2], (0,))):
        assert language.units.serves([block, other], [(0,), kept]) == everything
        if everything:
            want = other.double().square().sum([axis for axis in range(other.ndim) if axis not in kept]).view(-1)
            got = language.units.unit_sums([other], [kept], [len(want)], torch.float64, CPU)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


SHORT = [
    (5, 1), (70_000, 2), (40, 3), (9, 4), (1, 7), (33_000, 8), (70_000, 8), (21, 16), (2, 63), (3000, 64), (7, 65),
]  # fmt: skip
"""Lines too short for torch's own norm of each."""


@each("C", "C in threads", "torch")
def test_short_lines_small_and_large_together(language, dtype) -> None:
    noise = torch.Generator().manual_seed(0)
    blocks = [torch.randn(shape, generator=noise).to(dtype) for shape in SHORT]
    before = [block.clone() for block in blocks]
    counts = [*map(len, blocks), 3]
    want = torch.cat([block.double().square().sum(1) for block in blocks] + [torch.zeros(3, dtype=torch.float64)])
    got = language.units.unit_sums([*blocks, None], [(0,)] * len(counts), counts, torch.float64, CPU)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert all(map(same_bits, blocks, before))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("lines", [20, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_line(language, dtype, lines, bad) -> None:
    """The square of 1e30 overflows, and is measured again with a divisor; see View.measure."""
    lines = min(lines, 100) if language.name == "Triton" else lines
    block = torch.ones(lines, 8, dtype=dtype)
    block[7, 3] = bad
    found = language.units.unit_sums([block], [(0,)], [lines], torch.float64, CPU)
    assert found[7].isnan() if math.isnan(bad) else found[7].isposinf()
    found[7] = 8
    assert found.tolist() == [8] * lines

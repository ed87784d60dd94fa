"""However a parameter is cut, in flat runs or in shards, the parts of its units add up to the whole."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gradclip.strategy import Needs
from hf_gradclip.types import ClipPlan
from hf_gradclip.views.cuts import Cuts
from hf_gradclip.views.division import Division, boxes

CPU = torch.device("cpu")
KEPT = {1: [None, ()], 2: [None, (0,), (1,)], 3: [(0,), (0, 1), (0, 2)], 4: [(0,), (1,)]}

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def numpy_sums(array: np.ndarray, kept: tuple[int, ...] | None) -> np.ndarray:
    others = tuple(axis for axis in range(array.ndim) if axis not in (kept or ()))
    return (array**2).sum(axis=others).reshape(-1)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shape=shapes, data=st.data())
def test_boxes_cover_a_run_in_order(shape, data) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers = np.arange(size).reshape(shape)
    found = []
    for offsets, sizes in boxes(shape, start, stop):
        found += numbers[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].reshape(-1).tolist()
    assert found == list(range(start, stop))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_flat_runs_add_up_and_are_scaled_as_the_whole(data) -> None:
    """Two parameters, each cut anywhere into as many runs as wanted, as ZeRO does on its ranks."""
    both = [data.draw(shapes) for _ in range(2)]
    axes = [data.draw(st.sampled_from(KEPT[len(shape)])) for shape in both]
    division = Division(["a", "b"], both, axes, CPU)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape) for shape in both]
    expected = np.concatenate([numpy_sums(a, kept) for a, kept in zip(arrays, axes, strict=True)])
    assert division.layout.numel_S.sum() == sum(a.size for a in arrays)

    memory, cuts = [], []
    for i, array in enumerate(arrays):
        ends = sorted({0, array.size, *data.draw(st.lists(st.integers(0, array.size), max_size=3))})
        for start, stop in itertools.pairwise(ends):
            cuts += division.run(i, len(memory), start, stop - start)
            memory.append(torch.from_numpy(array.reshape(-1)[start:stop].copy()))
    here = Cuts(division.layout, cuts)
    stats = here.measure(memory, memory, Needs(max_abs=True, weights=True), rescale=False)
    np.testing.assert_allclose(stats.sumsq_S.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(stats.weight_sumsq_S.numpy(), expected, rtol=1e-12)
    again = here.measure(memory, None, Needs(), rescale=True)
    np.testing.assert_allclose(again.sumsq_S.numpy(), expected, rtol=1e-6)

    scale = rng.uniform(0.1, 1, len(expected))
    bound = rng.uniform(0.1, 1, len(expected))
    here.apply_(memory, ClipPlan(torch.from_numpy(scale), torch.from_numpy(bound)))
    found = torch.cat(memory).numpy()
    wanted, first = [], 0
    for array, kept in zip(arrays, axes, strict=True):
        spread = [n if axis in (kept or ()) else 1 for axis, n in enumerate(array.shape)]
        here = slice(first, first := first + math.prod(spread))
        limit = bound[here].reshape(spread)
        wanted.append((array * scale[here].reshape(spread)).clip(-limit, limit).reshape(-1))
    np.testing.assert_allclose(found, np.concatenate(wanted), rtol=1e-6)


def test_the_largest_element_of_each_unit() -> None:
    division = Division(["a"], [(3, 4)], [(1,)], CPU)
    array = torch.tensor([[1.0, -5, 2, 0], [3, 4, -2, 0], [0, 0, float("nan"), 0]])
    here = Cuts(division.layout, [division.box(0, 0, (0, 0), (3, 4))])
    stats = here.measure([array], None, Needs(max_abs=True), rescale=False)
    assert stats.max_abs_S.tolist() == [3.0, 5.0, math.inf, 0.0]


@pytest.mark.parametrize("kept", [(0,), (1,)])
def test_a_shard_and_a_missing_gradient(kept) -> None:
    division = Division(["a", "b"], [(4, 6), (4, 6)], [kept, kept], CPU)
    array = torch.arange(24.0, dtype=torch.float64).view(4, 6)
    here = Cuts(division.layout, [division.box(0, 0, (2, 3), (2, 3)), division.box(1, 1, (0, 0), (4, 6))])
    stats = here.measure([array[2:, 3:].contiguous(), None], None, Needs(), rescale=False)
    shard = np.zeros((4, 6))
    shard[2:, 3:] = array[2:, 3:]
    expected = np.concatenate([numpy_sums(shard, kept), np.zeros(4 if kept == (0,) else 6)])
    np.testing.assert_allclose(stats.sumsq_S.numpy(), expected)

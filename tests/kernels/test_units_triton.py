"""The Triton kernels by unit against float64, run by Triton's interpreter; see test_triton.py for what it rounds."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import tensors
from tests.kernels.tensors import CPU, Axes, guarded, units

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from hf_gradclip.kernels import table, units_triton
    from hf_gradclip.kernels.units import unit_table

    assert_right = functools.partial(tensors.assert_right, units_triton, truncated=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.skipif(INTERPRETED, reason="this is the run it starts")
def test_under_the_interpreter():
    if importlib.util.find_spec("triton") is None:
        pytest.fail("triton is missing, and its kernels untested: pip install -c constraints.txt -e '.[test]'")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr


class TestBlocks:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("start", [0, 1, 8])
    def test_shapes(self, dtype, start):
        """Rows longer and shorter than a program's, columns, rows and columns of experts, elements, one row."""
        kinds: list[tuple[tuple[int, ...], Axes]] = [
            ((33, 264), (0,)), ((17, 7), (0,)), ((20, 264), (1,)), ((40, 3), (1,)), ((3, 20, 136), (0, 2)),
            ((3, 4, 16), (0, 1)), ((9,), (0,)), ((4, 5), (0, 1)), ((1, 1000), (0,)), ((5, 1), (0,)), ((5, 1), (1,)),
        ]  # fmt: skip
        blocks = [guarded(shape, dtype, start, seed) for seed, (shape, _) in enumerate(kinds)]
        assert_right(blocks, [axes for _, axes in kinds], [units(*kind) for kind in kinds])

    def test_mixed_missing_and_empty(self):
        empty, whole = guarded((0, 9), torch.float32, 0), guarded((5, 16), torch.float32, 0)
        assert_right(
            [None, guarded((5, 9), torch.float16, 3), empty, whole],
            [(0,), (1,), (0,), (0,)],
            [4, 9, 0, 5],
        )
        nothing = units_triton.sumsq([None], [(0,)], [3], torch.float64, CPU)
        assert nothing.tolist() == [0.0] * 3
        units_triton.apply_([None], [(0,)], [3], torch.zeros(3), None)

    @settings(deadline=None, max_examples=6, database=None, derandomize=True)
    @given(st.data())
    def test_any_set(self, data):
        kinds = data.draw(
            st.lists(
                st.tuples(
                    st.sampled_from(DTYPES),
                    st.integers(0, 9),
                    st.lists(st.integers(1, 40), min_size=2, max_size=3).map(tuple),
                    st.booleans(),
                ),
                min_size=1,
                max_size=4,
            )
        )
        blocks = [guarded(shape, dtype, start, seed) for seed, (dtype, start, shape, _) in enumerate(kinds)]
        kept = [(0,) if rows else ((1,) if len(shape) == 2 else (0, 2)) for _, _, shape, rows in kinds]
        assert_right(blocks, kept, [units(shape, axes) for (_, _, shape, _), axes in zip(kinds, kept, strict=True)])

    @pytest.mark.parametrize("kept", [(0,), (1,)])
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_nan_and_inf_stay_in_their_unit(self, kept, bad):
        tensors.assert_nan_stays_in_its_unit(units_triton, kept, bad)

    def test_nothing_asked_is_neither_read_nor_written(self):
        """Its address is 0, so that either would end the process."""
        blocks = [guarded((20, 24), torch.float32, 0, seed)[0] for seed in range(2)]
        want = [blocks[0].clone(), blocks[1] * 0.5]
        scale_U = torch.cat([torch.ones(20), torch.full((20,), 0.5)])
        unit_table(blocks, [(0,), (0,)], [20, 20], CPU, units_triton._programs).address_RS[0] = 0
        units_triton.apply_(blocks, [(0,), (0,)], [20, 20], scale_U, None)
        assert all(map(torch.equal, blocks, want))

    def test_uploaded_only_when_changed(self, monkeypatch):
        block, _ = guarded((20, 24), torch.float32, 0)
        units_triton.sumsq([block], [(0,)], [20], torch.float64, CPU)
        monkeypatch.setattr(table, "upload", lambda *_: pytest.fail("uploaded"))
        units_triton.sumsq([block], [(0,)], [20], torch.float64, CPU)
        units_triton.apply_([block], [(0,)], [20], torch.ones(20), None)

    def test_not_served(self):
        block, _ = guarded((4, 6), torch.float32, 0)
        assert not units_triton.serves(block.t(), (0,))
        assert not units_triton.serves(block.double(), (0,))
        assert not units_triton.serves(block.view(2, 2, 6), (1,))

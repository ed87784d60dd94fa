"""What Triton compiles the kernels to for an H100 or H200 (sm_90): 16-byte loads and stores. No GPU is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

TABLE = {"numel_S": "*i64", "kind_S": "*i32", "first_S": "*i32", "segment_C": "*i32"}
PLAN = {"scale_S": "*fp64", "scale_stride": "i32", "bound_S": "*fp64", "bound_stride": "i32"}
POINTERS = {
    "fused_triton._measure": {"address_S": "*i64", **TABLE, "sumsq_C": "*fp64", "max_C": "*fp32"},
    "fused_triton._scale_and_clamp": {"address_S": "*i64", **TABLE, **PLAN},
    "units_triton._measure": {"address_S": "*i64", **TABLE, "place_S": "*i64", "sums_U": "*fp64"},
    "units_triton._write": {"address_S": "*i64", **TABLE, "place_S": "*i64", "scale_U": "*fp64", "bound_U": "*fp64"},
}

SCRIPT = f"""
import json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_gradclip.kernels import fused_triton, units_triton

def ptx(name, pointers, dtypes):
    module, _, kernel = name.partition(".")
    module = globals()[module]
    constants = {{name: getattr(module, name) for name in ("CHUNK", "BLOCK", "ROWS", "COLS") if hasattr(module, name)}}
    constants["DTYPES"] = tuple(getattr(tl, name) for name in dtypes)
    source = ASTSource(getattr(module, kernel), pointers | dict.fromkeys(constants, "constexpr"), constants)
    options = {{"num_warps": module.WARPS}}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

sets = (["float32"], ["bfloat16"], ["float16"], ["float32", "bfloat16", "float16"])
print(json.dumps({{f"{{kernel}} {{' '.join(dtypes)}}": ptx(kernel, pointers, dtypes)
                  for kernel, pointers in {POINTERS!r}.items() for dtypes in sets}}))
"""


@cache
def compiled() -> dict[str, str]:
    """The PTX of every kernel; in a process of its own, where nothing has put Triton in the interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=root, env=env)
    if done.returncode and "No module named 'triton'" in done.stderr:
        pytest.fail("triton is missing, and its kernels untested: pip install -c constraints.txt -e '.[test]'")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def loops(ptx: str) -> list[str]:
    """The text between every label and the last jump back to it."""
    found = []
    for label in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE):
        jumps = list(re.finditer(rf"\bbra(?:\.uni)?\s+{re.escape(label[1])};", ptx[label.end() :]))
        if jumps:
            found.append(ptx[label.end() : label.end() + jumps[-1].start()])
    return found


def widths(text: str, move: str) -> set[int]:
    """Bytes that each global `move` (ld or st) in this text transfers at once."""
    moves = re.findall(rf"\b{move}\.global(?:\.(?!v\d)[\w:]+?)*?(?:\.v(\d))?\.[bfsu](\d+)\b", text)
    assert len(moves) == len(re.findall(rf"\b{move}\.global", text))
    return {int(lanes or 1) * int(bits) // 8 for lanes, bits in moves}


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float16", "float32 bfloat16 float16"])
class TestWidth:
    def test_statistics(self, dtypes):
        """One loop per dtype, and one more that reads a chunk of extreme numbers again."""
        bodies = loops(compiled()[f"fused_triton._measure {dtypes}"])
        assert len(bodies) == 2 * len(dtypes.split())
        for body in bodies:
            assert widths(body, "ld") == {16}
            assert widths(body, "st") == set()

    def test_apply(self, dtypes):
        bodies = loops(compiled()[f"fused_triton._scale_and_clamp {dtypes}"])
        assert len(bodies) == len(dtypes.split())
        for body in bodies:
            assert widths(body, "ld") == {16}
            assert widths(body, "st") == {16}
            assert "bar.sync" not in body

    def test_by_unit(self, dtypes):
        """Per dtype one loop along lines and one across them in 16 bytes, and one each where lines begin anywhere."""
        for kernel, moves in (("_measure", ["ld"]), ("_write", ["ld", "st"])):
            bodies = [body for body in loops(compiled()[f"units_triton.{kernel} {dtypes}"]) if "bra" not in body]
            for move in moves:
                found = [widths(body, move) for body in bodies]
                sizes = [4 if dtype == "float32" else 2 for dtype in dtypes.split()]
                assert sorted(map(sorted, found)) == sorted([[16]] * 2 * len(sizes) + [[size] for size in sizes * 2])


def test_numbers_are_rounded_to_nearest_and_small_ones_kept():
    for name, ptx in compiled().items():
        assert ".ftz" not in ptx, name
    assert re.findall(r"cvt\.(\w+)\.bf16(?:x2)?\.f32", compiled()["fused_triton._scale_and_clamp bfloat16"])
    for rounding in re.findall(r"cvt\.(\w+)\.(?:bf|f)16(?:x2)?\.f32", "".join(compiled().values())):
        assert rounding == "rn"


def test_nan_survives():
    """PTX's own minimum and maximum give the other operand; the interpreter's give NaN, and so cannot tell."""
    for name, ptx in compiled().items():
        assert not re.search(r"\b(min|max)(\.ftz)?\.f32", ptx), name


def test_no_float_is_added_atomically():
    for name, ptx in compiled().items():
        assert not re.search(r"\b(atom|red)\.", ptx), name

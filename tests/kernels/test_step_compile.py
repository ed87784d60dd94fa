"""What Triton compiles the fused step to for an H100 or H200 (sm_90). No GPU is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.kernels.test_triton_compile import loops, widths

SCRIPT = """
import json
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_gradclip.kernels import step_triton

POINTERS = {"address_RS": "i64", "numel_S": "i64", "kind_S": "i32", "first_S": "i32", "segment_C": "i32",
            "place_S": "i64", "term_S": "fp32", "scale_S": "fp64", "bound_S": "fp64", "after_S": "fp64",
            "limit_S": "fp64", "sumsq_C": "fp64", "max_C": "fp32"}
NUMBERS = ("lr", "keep", "decay", "sign", "past", "fresh", "past2", "fresh2", "eps")
KINDS = {"adam": "ggkk.", "amsgrad": "ggkkk", "rmsprop": "ggk.k", "sgd": "gg...", "nesterov": "ggk.."}

def ptx(rule, weights, moments, measures):
    name = "adam" if rule == "amsgrad" else rule
    kinds = [{"g": weights, "k": moments, ".": "int1"}[letter] for letter in KINDS[rule]]
    constants = {"RULE": name, "DECAY": "coupled", "KINDS": tuple(getattr(tl, kind) for kind in kinds),
                 "CHUNK": step_triton.CHUNK, "STEP": step_triton.STEP}
    if not measures:
        constants |= {"sumsq_C": None, "max_C": None}
    signature = {}
    for argument in step_triton._step.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in POINTERS:
            signature[argument] = "*" + POINTERS[argument]
        else:
            signature[argument] = "fp32" if argument in NUMBERS else "i32"
    source = ASTSource(step_triton._step, signature, constants)
    options = {"num_warps": step_triton.WARPS}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

dtypes = {"float32": ("float32", "float32"), "bfloat16": ("bfloat16", "bfloat16"), "mixed": ("bfloat16", "float32")}
cases = [(rule, name, "step") for rule in KINDS for name in ("float32", "bfloat16")]
cases += [(rule, "bfloat16", "measure") for rule in KINDS] + [("adam", "mixed", "step")]
print(json.dumps({" ".join(case): ptx(case[0], *dtypes[case[1]], case[2] == "measure") for case in cases}))
"""
TENSORS = {"adam": 4, "amsgrad": 5, "rmsprop": 4, "sgd": 2, "nesterov": 3}


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


def moves(text: str, move: str) -> int:
    return len(re.findall(rf"\b{move}\.global", text))


def elements(text: str, move: str, size: int) -> int:
    """How many elements all moves of this text transfer, if each is of `size` bytes."""
    return sum(int(lanes or 1) * int(bits) // 8 // size for lanes, bits in _found(text, move))


def _found(text: str, move: str) -> list[tuple[str, str]]:
    return re.findall(rf"\b{move}\.global(?:\.(?!v\d)[\w:]+?)*?(?:\.v(\d))?\.[bfsu](\d+)\b", text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", TENSORS)
class TestMoves:
    def test_whole_words(self, rule, dtype):
        """The first loop moves 16 bytes at a time, the second one what cannot be moved so."""
        words, ones = loops(compiled()[f"{rule} {dtype} step"])
        size = 2 if dtype == "bfloat16" else 4
        assert widths(words, "ld") == widths(words, "st") == {16}
        assert widths(ones, "ld") == widths(ones, "st") == {size}

    def test_every_tensor_is_read_once_and_the_gradient_is_not_written(self, rule, dtype):
        size = 2 if dtype == "bfloat16" else 4
        for body in loops(compiled()[f"{rule} {dtype} step"]):
            assert elements(body, "ld", size) == 8 * TENSORS[rule]
            assert elements(body, "st", size) == 8 * (TENSORS[rule] - 1)


@pytest.mark.parametrize("rule", TENSORS)
def test_nothing_is_written_where_the_update_is_measured(rule):
    ptx = compiled()[f"{rule} bfloat16 measure"]
    words, ones = loops(ptx)
    assert widths(words, "ld") == {16}
    assert moves(words + ones, "st") == 0
    assert moves(ptx, "st") == 2


@pytest.mark.parametrize("rule", TENSORS)
def test_the_gradients_pointer_is_not_stored_to(rule):
    """Each store's address comes from the base of a load that is not the gradient's, the second of the table."""
    for dtype in ("float32", "bfloat16"):
        for body in loops(compiled()[f"{rule} {dtype} step"]):
            read, written = _bases(body, "ld"), _bases(body, "st")
            assert len(written) == TENSORS[rule] - 1
            assert written < read
            assert len(read) == TENSORS[rule]


def _bases(body: str, move: str) -> set[str]:
    """The registers that hold the beginning of a tensor and from which the moves of this loop count."""
    made = dict(re.findall(r"(?:add\.s64|mad\.wide\.[su]32)\s+(%rd\d+), (?:%r\d+, -?\w+, )?(%rd\d+)", body))
    found = set()
    for address in re.findall(rf"\b{move}\.global[^\[]*\[\s*(%rd\d+)", body):
        while address in made:
            address = made[address]
        found.add(address)
    return found


def test_weights_in_16_bits_and_moments_in_32_move_in_words_too():
    words, _ = loops(compiled()["adam mixed step"])
    assert widths(words, "ld") == widths(words, "st") == {16}


def test_numbers_are_rounded_to_nearest_and_small_ones_kept():
    for name, ptx in compiled().items():
        assert ".ftz" not in ptx, name
        assert not re.search(r"\b(div|sqrt|rcp)\.(approx|full)", ptx), name
    for rounding in re.findall(r"cvt\.(\w+)\.(?:bf|f)16(?:x2)?\.f32", "".join(compiled().values())):
        assert rounding == "rn"


def test_nothing_is_added_atomically_nor_spilled():
    for name, ptx in compiled().items():
        assert not re.search(r"\b(atom|red)\.", ptx), name
        assert ".local" not in ptx, name

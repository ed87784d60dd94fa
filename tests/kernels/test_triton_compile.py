"""What Triton compiles the kernels to for an H100 or H200 (sm_90): 16-byte loads and stores. No GPU is needed."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.kernels.compiled import compiled

SCRIPT = """
from hf_gradclip.kernels.triton import units, whole

for name in ("float32", "bfloat16", "float16", "float32 bfloat16 float16"):
    grads = [torch.zeros(64, 512, dtype=getattr(torch, dtype)) for dtype in name.split()]
    for plan, shape, bounded in (
        (torch.float64, (len(grads),), True), (torch.float64, (), False),
        (torch.float32, (len(grads),), False), (torch.float32, (), True),
    ):
        case = f"{name}, plan {plan} of shape {shape}, {'bounded' if bounded else 'not bounded'}"
        scale, bound = torch.ones(2, *shape, dtype=plan)
        whole.statistics(grads, plan, CPU, True)
        whole.apply_(grads, scale, bound if bounded else None)

        kept = [(int(bounded),)] * len(grads)
        counts = [grad.shape[axis] for grad, (axis,) in zip(grads, kept)]
        scale_U, bound_U = torch.ones(2, sum(counts), dtype=plan)
        units.unit_sums(grads, kept, counts, plan, CPU)
        units.unit_apply_(grads, kept, counts, scale_U, bound_U if bounded else None)
"""
DTYPES = ["float32", "bfloat16", "float16", "float32 bfloat16 float16"]


def forms(kernel: str, dtypes: str | None = None) -> list[str]:
    """The PTX of a kernel in every form that its launcher asks for, of gradients of these dtypes; None takes all."""
    cases = compiled(SCRIPT).items()
    found = [made[kernel] for case, made in cases if kernel in made and dtypes in (None, case.split(",")[0])]
    assert found
    return sorted(set(found))


@cache
def loops(ptx: str) -> list[str]:
    """The text between every label and the last jump back to it."""
    last = {jump[1]: jump.start() for jump in re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx)}
    labels = re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)
    return [ptx[label.end() : last[label[1]]] for label in labels if last.get(label[1], 0) > label.end()]


def widths(text: str, move: str) -> set[int]:
    """Bytes that each global `move` (ld or st) in this text transfers at once."""
    moves = re.findall(rf"\b{move}\.global(?:\.(?!v\d)[\w:]+?)*?(?:\.v(\d))?\.[bfsu](\d+)\b", text)
    assert len(moves) == len(re.findall(rf"\b{move}\.global", text))
    return {int(lanes or 1) * int(bits) // 8 for lanes, bits in moves}


@pytest.mark.parametrize("dtypes", DTYPES)
class TestWidth:
    def test_statistics(self, dtypes):
        """One loop per dtype, and one more that reads a chunk of extreme numbers again."""
        for ptx in forms("whole._measure", dtypes):
            bodies = loops(ptx)
            assert len(bodies) == 2 * len(dtypes.split())
            for body in bodies:
                assert widths(body, "ld") == {16}
                assert widths(body, "st") == set()

    def test_apply(self, dtypes):
        for ptx in forms("whole._scale_and_clamp", dtypes):
            bodies = loops(ptx)
            assert len(bodies) == len(dtypes.split())
            for body in bodies:
                assert widths(body, "ld") == {16}
                assert widths(body, "st") == {16}
                assert "bar.sync" not in body

    @pytest.mark.parametrize(("kernel", "moves"), [("units._measure", ["ld"]), ("units._write", ["ld", "st"])])
    def test_by_unit(self, kernel, moves, dtypes):
        """Per dtype one loop along lines and one across them in 16 bytes, and one each where lines begin anywhere."""
        for ptx in forms(kernel, dtypes):
            bodies = [body for body in loops(ptx) if "bra" not in body]
            for move in moves:
                found = [widths(body, move) for body in bodies]
                sizes = [4 if dtype == "float32" else 2 for dtype in dtypes.split()]
                assert sorted(map(sorted, found)) == sorted([[16]] * 2 * len(sizes) + [[size] for size in sizes * 2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_thread_writes_few_units_at_a_time(dtype):
    """Eight elements of words and four of others: with twice as many, registers leave a fifth of the warps."""
    size = 4 if dtype == "float32" else 2
    for ptx in forms("units._write", dtype):
        for body in [body for body in loops(ptx) if "bra" not in body]:
            moves = re.findall(r"\bst\.global(?:\.(?!v\d)[\w:]+?)*?(?:\.v(\d))?\.[bfsu](\d+)\b", body)
            moved = sum(int(lanes or 1) * int(bits) // 8 for lanes, bits in moves)
            assert moved == (8 if widths(body, "st") == {16} else 4) * size


KERNELS = [
    "whole._measure",
    "whole.finish",
    "whole._scale_and_clamp",
    "units._measure",
    "units._write",
]


@pytest.mark.parametrize("kernel", KERNELS)
class TestEveryForm:
    def test_numbers_are_rounded_to_nearest_and_small_ones_kept(self, kernel):
        for ptx in forms(kernel):
            assert ".ftz" not in ptx
            assert set(re.findall(r"cvt\.(\w+)\.(?:bf|f)16(?:x2)?\.f32", ptx)) <= {"rn"}

    def test_nan_survives(self, kernel):
        """PTX's own minimum and maximum give the other operand; the interpreter's give NaN, and so cannot tell.

        No NaN comes to `finish`: the kernel before it stores the largest bits as inf.
        """
        for ptx in forms(kernel):
            assert bool(re.search(r"\b(min|max)(\.ftz)?\.f32", ptx)) == (kernel == "whole.finish")

    def test_no_float_is_added_atomically(self, kernel):
        for ptx in forms(kernel):
            assert not re.search(r"\b(atom|red)\.", ptx)


def test_sixteen_bits_are_written_from_32():
    for dtype in ("bf16", "f16"):
        for ptx in forms("whole._scale_and_clamp", "bfloat16" if dtype == "bf16" else "float16"):
            assert re.search(rf"cvt\.rn\.{dtype}(x2)?\.f32", ptx)


NUMBERS = """
from hf_gradclip.kernels.rule import Memory, Places, Rule
from hf_gradclip.kernels.triton import step, whole
from hf_gradclip.types import ClipPlan

case = "numbers"
ones = [torch.ones(40)]
for number in (0.5, 1.0, 0.0, 3.0):
    host = torch.tensor(number, dtype=torch.float64)
    whole.apply_(ones, host, host)
    rule = Rule("adam", 0.1, 0.0, True, False, eps=1e-8, terms=[(1 + number, 1.0)])
    step.step_(rule, Memory(ones, ones, ones, ones, [None]), Places((0,), (0,)), ClipPlan(host), None)
for kernel in (whole._scale_and_clamp, step._step):
    found[kernel.__name__] = len(kernel.device_caches[0][0])
"""


def test_numbers_of_the_host_are_not_compiled_in():
    """A plan's one number for all, and the bias corrections where all parameters have the same: arguments."""
    found = compiled(NUMBERS)
    assert found["_scale_and_clamp"] == found["_step"] == 1
    for kernel, floats in (("whole._scale_and_clamp", 2), ("step._step", 11)):
        assert len(re.findall(r"\.param \.f32", found["numbers"][kernel])) == floats

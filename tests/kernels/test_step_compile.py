"""What Triton compiles the fused step to for an H100 or H200 (sm_90). No GPU is needed."""

from __future__ import annotations

import re

import pytest

from tests.kernels.compiled import compiled
from tests.kernels.test_triton_compile import loops, widths

SCRIPT = """
from dataclasses import replace
from hf_gradclip.kernels.rule import Memory, Places, Rule
from hf_gradclip.kernels.triton import step
from hf_gradclip.types import ClipPlan

KEPT = {"adam": "kk.", "amsgrad": "kkk", "rmsprop": "k.k", "sgd": "...", "nesterov": "k.."}
PLANS = {
    "bounded": ClipPlan(*torch.ones(2, 2, dtype=torch.float64)),
    "scaled": ClipPlan(torch.ones(2)),
    "one number": ClipPlan(torch.ones((), dtype=torch.float64)),
    "unclipped": None,
}

def launch(rule, weights, moments, plan, after, decay, decoupled, terms, eps=1e-8):
    global case
    def column(dtype):
        return [torch.zeros(n, dtype=getattr(torch, dtype)) for n in (40, 2**14)]
    kept = [column(moments) if letter == "k" else [None] * 2 for letter in KEPT[rule]]
    memory, places = Memory(column(weights), column(weights), *kept), Places((0, 1), (0, 1))
    name = {"amsgrad": "adam"}.get(rule, rule)
    numbers = Rule(name, 1e-3, decay, decoupled, False, 0.9, 0.1, 0.99, 0.01, eps, terms)
    what = f"{rule} {weights}" if weights == moments else f"{rule} mixed"
    form = f"{plan}, {after} update, decay {decay} decoupled {decoupled}, terms {terms is not None}"
    case = f"{what} step: {form}" if eps else f"small {what}"
    step.step_(numbers, memory, places, PLANS[plan], PLANS[after])
    if weights == "bfloat16" and after == "unclipped":
        case = f"{what} measure: {form}"
        step.measure_update(numbers, memory, places, PLANS[plan])
    if weights == moments == "bfloat16" and terms and decay:
        case = f"{what} step: unread {form}"
        known = torch.ones(2, 2, dtype=torch.float64) if name in ("adam", "rmsprop") else None
        away = replace(numbers, terms=None, inverse_P2=known)
        step.step_(away, memory, places, PLANS[plan], PLANS[after], None, torch.tensor(False))

terms = [(2.0, 0.5)] * 2
for rule in KEPT:
    for weights, moments in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):
        launch(rule, weights, moments, "bounded", "bounded", 0.1, False, terms)
        launch(rule, weights, moments, "scaled", "unclipped", 0.1, True, None)
        launch(rule, weights, moments, "unclipped", "one number", 0.0, True, terms)
        launch(rule, weights, moments, "unclipped", "unclipped", 0.1, False, None)
    launch(rule, "float32", "float32", "unclipped", "unclipped", 0.1, True, terms, eps=0.0)
"""
TENSORS = {"adam": 4, "amsgrad": 5, "rmsprop": 4, "sgd": 2, "nesterov": 3}


def forms(what: str, kernel: str = "step._step") -> list[str]:
    """The PTX of a kernel in every form that the launcher asked for; `what` begins the names of the cases."""
    found = [made[kernel] for case, made in compiled(SCRIPT).items() if case.startswith(what) and kernel in made]
    assert found
    return sorted(set(found))


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
        size = 2 if dtype == "bfloat16" else 4
        for ptx in forms(f"{rule} {dtype} step"):
            words, ones = loops(ptx)
            assert widths(words, "ld") == widths(words, "st") == {16}
            assert widths(ones, "ld") == widths(ones, "st") == {size}

    def test_every_tensor_is_read_once_and_the_gradient_is_not_written(self, rule, dtype):
        """A thread moves a word of each."""
        size = 2 if dtype == "bfloat16" else 4
        for ptx in forms(f"{rule} {dtype} step"):
            for body in loops(ptx):
                assert elements(body, "ld", size) == 16 // size * TENSORS[rule]
                assert elements(body, "st", size) == 16 // size * (TENSORS[rule] - 1)


@pytest.mark.parametrize("rule", TENSORS)
class TestMeasure:
    def test_nothing_is_written_where_the_update_is_measured(self, rule):
        for ptx in forms(f"{rule} bfloat16 measure"):
            words, ones = loops(ptx)
            assert widths(words, "ld") == {16}
            assert moves(words + ones, "st") == 0
            assert moves(ptx, "st") == 2

    def test_weights_are_read_only_where_the_update_holds_them(self, rule):
        for decoupled in (True, False):
            for ptx in forms(f"{rule} bfloat16 measure: {'scaled' if decoupled else 'unclipped'}, unclipped update"):
                for body in loops(ptx):
                    assert elements(body, "ld", 2) == 8 * (TENSORS[rule] - decoupled)


@pytest.mark.parametrize("rule", TENSORS)
def test_the_gradients_pointer_is_not_stored_to(rule):
    """Each store's address comes from the base of a load that is not the gradient's, the second of the table."""
    for dtype in ("float32", "bfloat16"):
        for ptx in forms(f"{rule} {dtype} step"):
            for body in loops(ptx):
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


@pytest.mark.parametrize("rule", TENSORS)
def test_a_flag_of_the_device_is_one_byte_that_is_read_before_the_loops(rule):
    for ptx in forms(f"{rule} bfloat16 step: unread"):
        assert len(re.findall(r"ld\.global\.b8", ptx)) == 1
        assert not any("ld.global.b8" in body for body in loops(ptx))
    for ptx in forms(f"{rule} bfloat16 step: scaled"):
        assert "ld.global.b8" not in ptx


@pytest.mark.parametrize("rule", TENSORS)
def test_weights_in_16_bits_and_moments_in_32_move_in_words_too(rule):
    for ptx in forms(f"{rule} mixed step"):
        words, _ = loops(ptx)
        assert widths(words, "ld") == widths(words, "st") == {16}


FAST = {"sqrt.approx.ftz.f32", "rsqrt.approx.ftz.f32"}
"""What takes subnormal numbers for 0, in a quotient whose eps is not small."""


def test_numbers_are_rounded_to_nearest_and_small_ones_kept():
    """But in a quotient, of which test_quotient.py knows what its fast instructions are off by."""
    for ptx in [ptx for rule in TENSORS for ptx in forms(f"{rule} ")]:
        fast = re.findall(r"\b[a-z]+(?:\.\w+)*\.ftz[.\w]*", ptx) + re.findall(r"\b\w+\.(?:approx|full)[.\w]*", ptx)
        assert set(fast) <= FAST
        assert not re.search(r"\b(div|sqrt|rcp)\.rn", ptx)  # which leave the loop
        assert set(re.findall(r"cvt\.(\w+)\.(?:bf|f)16(?:x2)?\.f32", ptx)) <= {"rn"}


def test_no_number_is_lost_where_eps_is_small():
    """Division is then that of all numbers, and what root and reciprocal take for 0 is scaled before."""
    for case in ("small adam", "small rmsprop"):
        for ptx in forms(case):
            fast = set(re.findall(r"\b\w+\.(?:approx|full)[.\w]*", ptx))
            assert fast == FAST | {"div.full.f32"}


def test_registers_leave_room_for_as_many_warps():
    """Where the compiler would take more for a thread of eight elements."""
    for rule in ("adam", "amsgrad", "rmsprop"):
        for ptx in forms(f"{rule} bfloat16"):
            assert ".maxnreg 72" in ptx


def test_nothing_is_added_atomically_nor_spilled():
    for ptx in forms("") + forms("", "whole.finish"):
        assert not re.search(r"\b(atom|red)\.", ptx)
        assert ".local" not in ptx

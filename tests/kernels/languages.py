"""The languages that kernels are written in, for tests of what all of them do: C, plain torch, Triton's interpreter.

The fixture `language` of conftest.py gives each in turn, C also with threads.

Triton reads TRITON_INTERPRET while its kernels are imported (tests/conftest.py has imported Triton itself so). The
interpreter truncates float32 to bfloat16 where a GPU rounds to nearest, so bfloat16 may be one unit in the last place
away, and it misreads bfloat16 below 2^-126.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hf_gradclip.kernels import choice
from hf_gradclip.kernels.operations import Language

NAMES = ("C", "torch", "Triton")
WORDS = {"C": "auto", "torch": "eager", "Triton": "triton"}
"""What HF_GRADCLIP_KERNELS asks for them by, on a CPU."""
WAYS = ("C", "C in threads", "torch", "Triton")
KERNELS = ("C", "C in threads", "Triton")
"""Those that read addresses."""
DTYPES = {
    "C": (torch.float32, torch.bfloat16),
    "torch": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "Triton": (torch.float32, torch.bfloat16, torch.float16),
}
"""The memory that each takes."""
OTHER = {"C": torch.bfloat16, "torch": torch.float16, "Triton": torch.float16}
"""A dtype beside float32, in which sums and products are exact."""


def each(*ways: str) -> pytest.MarkDecorator:
    """These ways with every dtype that they take, for a test of `language` and `dtype`."""
    pairs = [(way, dtype) for way in ways for dtype in DTYPES[way.split()[0]]]
    names = [f"{way}-{str(dtype).removeprefix('torch.')}" for way, dtype in pairs]
    return pytest.mark.parametrize(("language", "dtype"), pairs, ids=names, indirect=["language"])


def by(*ways: str) -> pytest.MarkDecorator:
    """These ways alone, for a test of `language`."""
    return pytest.mark.parametrize("language", ways, indirect=True)


@functools.cache
def language(name: str) -> Language:
    """The kernels in this language.

    Where there is a compiler, or Triton could be installed, their absence is a fault and not a reason to skip.
    """
    if name == "torch":
        return choice.torch_language()
    if name == "C":
        if shutil.which("cc") is None and shutil.which("gcc") is None:
            pytest.skip("needs a C compiler when the package is installed")
        return choice.c_language()
    if torch.cuda.is_available():
        pytest.skip("Triton compiles for the GPU here; its interpreter is tested where there is none")
    if importlib.util.find_spec("triton") is None:
        pytest.fail("triton is missing, and its kernels untested: pip install -c constraints.txt -e '.[test]'")
    with interpreted():
        quicken()
        return choice.triton_language()


def quicken() -> None:
    """Let Triton's interpreter prepare its language once for a kernel, and not again for each function that this calls.

    It then takes two thirds of the time. A version that goes about it otherwise is left as it is.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_LangPatchScope"):
        return
    prepare, prepared = interpreter._patch_lang, set()

    @functools.cache
    def seen(function: Any) -> frozenset[int]:
        known = (interpreter.tl, interpreter.tl.core)
        return frozenset(id(value) for value in function.__globals__.values() if any(value is one for one in known))

    def once(function: Any) -> Any:
        scope = interpreter._LangPatchScope() if seen(function) <= prepared else prepare(function)
        if not prepared:  # a kernel's own scope: the interpreter restores it when the kernel is done
            restore = scope.restore
            scope.restore = lambda: (restore(), prepared.clear())
        prepared.update(seen(function))
        return scope

    interpreter._patch_lang = once


@contextmanager
def interpreted() -> Iterator[None]:
    """TRITON_INTERPRET=1, under which a kernel that is imported runs on the CPU."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


@contextmanager
def serving(name: str) -> Iterator[Language]:
    """Let kernels of this language serve, whatever has been chosen or given up before; then go on as before.

    What was checked in a language stays checked: the interpreter takes seconds for it.
    """
    found = language(name)
    before = choice._checked.copy(), choice._given_up.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(choice.VARIABLE, WORDS[name])
        if name == "Triton":
            patch.setenv("TRITON_INTERPRET", "1")
        else:
            patch.delenv("TRITON_INTERPRET", raising=False)
        choice.forget()
        choice._checked.update(_known)
        try:
            yield found
        finally:
            if not choice._given_up:
                _known.update(choice._checked)
            choice.forget()
    choice._checked.update(before[0])
    choice._given_up.update(before[1])


_known: set[Any] = set()


@contextmanager
def using(way: str) -> Iterator[Language]:
    """The kernels of one of WAYS; in C one program is worth a thread, and there are three."""
    found = language(way.split()[0])
    if way == "Triton":
        with interpreted():  # Triton imports more of itself at the first call
            yield found
        return
    if way != "C in threads":
        yield found
        return
    from hf_gradclip.kernels.c import library

    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "SHARE", 1)
        torch.set_num_threads(3)
        try:
            yield found
        finally:
            torch.set_num_threads(before)


def set_chunk(patch: pytest.MonkeyPatch, file: object, elements: int) -> None:
    """Let a program take so many elements; plain torch has none."""
    if hasattr(file, "CHUNK"):
        patch.setattr(file, "CHUNK", elements)

"""The compiled library: its functions, how tensors are handed to them, and how threads share a call.

`whole.c`, `units.c` and `step.c` are compiled where the package is installed, and loaded as a library of plain
functions; it knows no torch and no Python. Its functions take a range of the programs of a table, each of which writes
a place of its own, so threads share a call and any number of them gives the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from hf_gradclip.kernels.operations import WrittenError
from hf_gradclip.kernels.table import Kind, MisfitError, Table

INTERFACE = 3  # of the C files, with which it changes
MODULE = "hf_gradclip.kernels.c._compiled"
CHUNK = 1 << 16  # elements that a program takes
SHARE = 64  # programs that are worth a thread
BYTES = {torch.float32: 4, torch.bfloat16: 2}
"""The dtypes that are taken, and how the library tells them apart."""
FUNCTIONS = {
    "gradclip_measure": "nn aaaaaa n aa",
    "gradclip_finish": "n aaaaa",
    "gradclip_apply": "nn aaaaaa n an an",
    "gradclip_unit_sums": "nn aaaaa a a",
    "gradclip_unit_apply": "nn aaaaa a aa",
    "gradclip_step": "nn aaaaaa nn aa an an an an na aa",
}
"""The arguments of each: a number, or an address."""

Argument = Tensor | int | None


def arguments(table: Table) -> tuple[Tensor, ...]:
    """What every function is told of the memory.

    Raises:
        MisfitError: for a device or a dtype that is not taken, or tensors of one parameter with several dtypes.
    """
    if table.address_RS.device.type != "cpu":
        raise MisfitError(f"{table.address_RS.device}: the kernels in C take memory of a CPU.")
    return *table.arguments, _bytes(table.kinds)


@functools.cache
def _bytes(kinds: tuple[Kind, ...]) -> Tensor:
    of_kinds = []
    for kind in kinds:
        dtypes = {dtype for dtype in kind if dtype is not None}
        if len(dtypes) != 1 or not dtypes.issubset(BYTES):
            raise MisfitError(f"{', '.join(map(str, dtypes))}: the kernels in C take {', '.join(map(str, BYTES))}.")
        of_kinds.append(BYTES[dtypes.pop()])
    return torch.tensor(of_kinds, dtype=torch.int32, device="cpu")


def share(name: str, programs: int, *given: Argument, writes: bool = False) -> None:
    """Call a function for all programs, a range of them in each of as many threads as torch has.

    The threads are of this call: what they cost is little beside SHARE programs, and nothing is left for a fork.

    Args:
        name: of FUNCTIONS.
        programs: how many there are.
        *given: its arguments after the range.
        writes: whether it writes the tensors of the table.

    Raises:
        WrittenError: where `writes`, for an error in one of the threads; else, and for an interrupt, that itself rises.
    """
    threads = min(torch.get_num_threads(), programs // SHARE)
    failed: list[BaseException] = []

    def some(first: int, last: int) -> None:
        try:
            call(name, first, last, *given)
        except BaseException as error:
            failed.append(error)

    if threads <= 1:
        some(0, programs)
    else:
        _in_threads(some, [programs * i // threads for i in range(threads + 1)])
    for error in failed:
        if not writes or not isinstance(error, Exception):
            raise error
    if failed:
        raise WrittenError(f"{name} failed, and a part of the memory may be written: {failed[0]}") from failed[0]


def _in_threads(some: Callable[[int, int], None], cuts: list[int]) -> None:
    """The first range here, each other one in a thread; here too where the system has no thread left."""
    others: list[threading.Thread] = []
    try:
        for ends in pairwise(cuts[1:]):
            other = threading.Thread(target=some, args=ends)
            try:
                other.start()
                others.append(other)
            except RuntimeError:
                some(*ends)
        some(*cuts[:2])
    finally:
        for other in others:
            other.join()


def call(name: str, *given: Argument) -> None:
    """Call a function of the library; tensors are handed in as addresses."""
    getattr(library(), name)(*[value.data_ptr() if isinstance(value, Tensor) else value for value in given])


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions.

    Raises:
        ImportError: if the package was installed where no C compiler could make them, or they are of another version.
    """
    found = importlib.util.find_spec(MODULE)
    if found is None or found.origin is None:
        raise ImportError("hf_gradclip was installed without a C compiler, or with one that is neither GCC nor Clang")
    compiled = ctypes.CDLL(found.origin)
    if ctypes.c_int32.in_dll(compiled, "gradclip_interface").value != INTERFACE:
        raise ImportError("the C files have changed since they were compiled: install hf_gradclip again")
    kinds = {"n": ctypes.c_int64, "a": ctypes.c_void_p}
    for name, arguments in FUNCTIONS.items():
        function = getattr(compiled, name)
        function.argtypes = [kinds[kind] for kind in arguments.replace(" ", "")]
        function.restype = None
    return compiled

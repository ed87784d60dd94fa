"""The kernels in C, for memory of a CPU: one read measures every gradient, one write changes those that clip.

`native.c` is compiled where the package is installed, and loaded as a library of plain functions; it knows no torch and
no Python. Its functions take a range of the programs of a table, each of which writes a place of its own, so threads
share a call and any number of them gives the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hf_gradclip.kernels.table import Kind, Table, table_of

INTERFACE = 2  # of native.c, with which it changes
CHUNK = 1 << 16  # elements that a program takes
SHARE = 64  # programs that are worth a thread
BYTES = {torch.float32: 4, torch.bfloat16: 2}
"""The dtypes that are taken, and how the library tells them apart."""

Argument = Tensor | int | None


def statistics(grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sum of squares and largest absolute element per gradient, from one read of the gradients.

    Squares neither overflow nor vanish in float32: those of a chunk of very large or very small elements are taken
    again in float64. Everything is added in rows of 1024 elements in float32, and these in float64.

    Args:
        grads: float32 or bfloat16, contiguous (of any shape) at any alignment; None where missing.
        dtype: of the results.
        device: of the results and of every gradient, a CPU.

    Returns:
        The sums and the largest elements, each of shape (len(grads),). A missing or empty gradient gives 0 in both;
        NaN gives NaN in the sum and inf in the largest element.

    Raises:
        ValueError: if a gradient is not contiguous.
    """
    table = table_of([grads], device, CHUNK)
    sumsq_S, max_S = torch.empty(2, len(grads), dtype=torch.float64, device=device)
    sumsq_C = torch.empty(table.chunks, dtype=torch.float64, device=device)
    max_C = torch.empty(table.chunks, dtype=torch.float32, device=device)
    share("gradclip_measure", table.chunks, *arguments(table), CHUNK, sumsq_C, max_C)
    call("gradclip_finish", len(grads), table.first_S, sumsq_C, max_C, sumsq_S, max_S)
    return sumsq_S.to(dtype), max_S.to(dtype)


def apply_(grads: Sequence[Tensor | None], scale_S: Tensor, bound_S: Tensor | None) -> None:
    """g <- clamp(g * scale, -bound, +bound), in float32 and rounded once; NaN stays NaN.

    A gradient with scale 1 and bound inf is neither read nor written.

    Args:
        grads: as for `statistics`.
        scale_S: factor per gradient, any float dtype, shape (len(grads),), or 0-d for one factor that serves all.
        bound_S: largest absolute element per gradient, of the same shapes; inf or None bounds nothing.

    Raises:
        ValueError: if a gradient is not contiguous.
    """
    table = table_of([grads], scale_S.device, CHUNK)
    plan = (*_plan(scale_S, len(grads)), *_plan(bound_S, len(grads)))
    share("gradclip_apply", table.chunks, *arguments(table), CHUNK, *plan)


def _plan(number_S: Tensor | None, count: int) -> tuple[Tensor | None, int]:
    """So many numbers in float32, and the distance between two of them, which is 0 where one serves all."""
    if number_S is None:
        return None, 0
    number_S = number_S.float().expand(count)
    return number_S, number_S.stride(0)


def arguments(table: Table) -> tuple[Tensor, ...]:
    """What every function is told of the memory."""
    return *table.arguments, _bytes(table.kinds)


@functools.cache
def _bytes(kinds: tuple[Kind, ...]) -> Tensor:
    return torch.tensor([BYTES[kind[0]] for kind in kinds if kind[0] is not None], dtype=torch.int32, device="cpu")


def share(name: str, programs: int, *given: Argument) -> None:
    """Call a function for all programs, a range of them in each of as many threads as torch has.

    The threads are of this call: what they cost is little beside SHARE programs, and nothing is left for a fork.
    """
    threads = min(torch.get_num_threads(), programs // SHARE)
    if threads <= 1:
        call(name, 0, programs, *given)
        return
    cuts = [programs * i // threads for i in range(threads + 1)]
    others: list[threading.Thread] = []
    try:
        for ends in pairwise(cuts[1:]):
            other = threading.Thread(target=call, args=(name, *ends, *given))
            try:
                other.start()
                others.append(other)
            except RuntimeError:  # the system has no thread left
                call(name, *ends, *given)
        call(name, *cuts[:2], *given)
    finally:
        for other in others:
            other.join()


def call(name: str, *given: Argument) -> None:
    """Call a function of the library; tensors are handed in as addresses."""
    getattr(library(), name)(*map(_passed, given))


def _passed(value: Argument) -> ctypes.c_int64 | ctypes.c_void_p:
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions.

    Raises:
        ImportError: if the package was installed where no C compiler could make them, or they are of another version.
    """
    found = importlib.util.find_spec("hf_gradclip.kernels._native")
    if found is None or found.origin is None:
        raise ImportError("hf_gradclip was installed without a C compiler, or with one that is neither GCC nor Clang")
    compiled = ctypes.CDLL(found.origin)
    if ctypes.c_int32.in_dll(compiled, "gradclip_interface").value != INTERFACE:
        raise ImportError("native.c has changed since it was compiled: install hf_gradclip again")
    return compiled

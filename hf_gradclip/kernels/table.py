"""Where tensors are, as a kernel reads it: a table of addresses, sizes, dtypes and chunks, kept between calls.

Shape letters: S segments, R tensors of each (its gradient; or its weight, gradient and moments), C chunks. Every
segment is cut into chunks and one program takes one chunk, so the number of launches does not depend on the model.
"""

from __future__ import annotations

import operator
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_gradclip.device import upload

TABLES = 64  # tables that are kept; an optimizer needs one per group
KNOWN = 2  # sets of addresses that are kept in each
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = {Tensor, nn.Parameter}  # no wrapper, whose memory is elsewhere


class MisfitError(ValueError):
    """Memory, counts and numbers that a kernel was handed do not fit each other; nothing was read or written."""


Column = Sequence[Tensor | None]
"""One tensor of every segment; None where it is missing."""
Kind = tuple[torch.dtype | None, ...]
"""The dtypes of the tensors of a segment."""


class Table(NamedTuple):
    """What a kernel is given. Only `address_RS` depends on more than sizes and dtypes."""

    address_RS: Tensor
    numel_S: Tensor
    kind_S: Tensor  # index into `kinds`
    first_S: Tensor  # first chunk of each segment; shape (S + 1,)
    segment_C: Tensor  # the segment that each chunk belongs to
    place_S: Tensor  # what the caller gave
    kinds: tuple[Kind, ...]
    known: list[tuple[list[int], Tensor]]  # addresses, and where they were uploaded

    @property
    def chunks(self) -> int:
        """How many programs to launch."""
        return self.segment_C.numel()

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The first arguments of a kernel."""
        return self[:5]


_tables: OrderedDict[tuple[object, ...], Table] = OrderedDict()
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # a child has no thread that would give back a lock that another one held
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_is_on_cpu = operator.attrgetter("is_cpu")
_dtype_of = operator.attrgetter("dtype")


def table_of(
    columns: Sequence[Column],
    device: torch.device,
    chunk: int | tuple[int, ...],
    places: tuple[int, ...] = (),
    what: str = "gradient",
) -> Table:
    """The table of these tensors; what has not changed since the last call is not built or uploaded again.

    Two sets of tensors of the same sizes, gradients and weights say, have a place each. One table per stream: addresses
    are replaced only in the order of the launches that read them.

    Args:
        columns: R of them, of equal length; the tensors of a segment are of one size. Without its first, it is empty.
        device: where all of them are.
        chunk: elements that a program takes, or programs per segment.
        places: a number per segment that the kernel reads; () where it reads none.
        what: the tensors are called in an error.

    Raises:
        MisfitError: if a tensor has a dtype that is not in DTYPES, another device, another size than its segment, gaps
            in its memory, or none.
    """
    tensors = [tensor for column in columns for tensor in column if tensor is not None]
    if len(tensors) == sum(map(len, columns)):  # nothing is missing: no Python runs per tensor
        addresses = [*map(Tensor.data_ptr, tensors)]
        sizes = tuple([tuple(map(Tensor.numel, column)) for column in columns])  # type: ignore[arg-type]
        dtypes = tuple([tuple(map(_dtype_of, column)) for column in columns])
    else:
        addresses = [0 if tensor is None else tensor.data_ptr() for column in columns for tensor in column]
        sizes = tuple([tuple([-1 if tensor is None else tensor.numel() for tensor in column]) for column in columns])
        dtypes = tuple([tuple([None if tensor is None else tensor.dtype for tensor in column]) for column in columns])
    stream = 0 if device.type == "cpu" else torch.get_device_module(device).current_stream(device).stream_id
    key = (device, stream, chunk, places, sizes, dtypes)
    with _lock:  # threads with tensors of the same sizes share a table, and have addresses of their own
        table = _tables.get(key)
        there = None if table is None else next((known for seen, known in table.known if seen == addresses), None)
        if there is None or not all(map(Tensor.is_contiguous, tensors)):  # what was there before may have been
            _check(columns, what, device)
        if there is None:
            there = upload(addresses, torch.int64, device)
        if table is None:
            kinds = list(zip(*dtypes, strict=True))
            table = _tables[key] = _build([max(size, 0) for size in sizes[0]], kinds, there, chunk, places)
            if len(_tables) > TABLES:
                _tables.popitem(last=False)
        others = [kept for kept in table.known if kept[1] is not there]
        table.known[:] = [(addresses, there), *others[: KNOWN - 1]]
        _tables.move_to_end(key)
        return table._replace(address_RS=there)


def _build(
    sizes: list[int],
    dtypes: list[Kind],
    address_RS: Tensor,
    chunk: int | tuple[int, ...],
    places: tuple[int, ...],
) -> Table:
    device = address_RS.device
    kinds = sorted({kind for kind in dtypes if kind[0] is not None}, key=str)
    codes = [0 if kind[0] is None else kinds.index(kind) for kind in dtypes]
    chunks = [-(-size // chunk) for size in sizes] if isinstance(chunk, int) else list(chunk)
    chunks_S = torch.tensor(chunks, dtype=torch.int64, device="cpu")
    owner_C = torch.arange(len(sizes), device="cpu").repeat_interleave(chunks_S)
    return Table(
        address_RS=address_RS,
        numel_S=upload(sizes, torch.int64, device),
        kind_S=upload(codes, torch.int32, device),
        first_S=upload([0, *accumulate(chunks)], torch.int32, device),
        segment_C=upload(owner_C, torch.int32, device),
        place_S=upload(places, torch.int64, device),
        kinds=tuple(kinds),
        known=[],
    )


def _check(columns: Sequence[Column], what: str, device: torch.device) -> None:
    """Stop before an address is read of which the table would say what is not true."""
    tensors = [tensor for column in columns for tensor in column if tensor is not None]
    counts = [-1 if tensor is None else tensor.numel() for tensor in columns[0]]
    in_one_size = all(
        len(column) == len(counts) and all(t is None or t.numel() == n for t, n in zip(column, counts, strict=True))
        for column in columns[1:]
    )
    if in_one_size and all(map(Tensor.is_contiguous, tensors)) and _are_usual(tensors, device):
        return
    for column in columns:
        if len(column) != len(columns[0]):
            raise MisfitError(f"columns of {len(columns[0])} and of {len(column)} tensors: must be of one length.")
        for i, (tensor, first) in enumerate(zip(column, columns[0], strict=True)):
            if tensor is None or (tensor is first and _is_usual(tensor, device)):
                continue
            if first is None or not (_is_usual(tensor, device) and _are_alike(tensor, first)):
                _explain(f"{what} {i}", tensor, first, device)


def _are_usual(tensors: list[Tensor], device: torch.device) -> bool:
    """`_is_usual` of contiguous tensors, all at once: hundreds of them would feel a call for each."""
    if not are_on(device, tensors) or not {t.dtype for t in tensors}.issubset(DTYPES):
        return False
    held = [storage.nbytes() for storage in map(Tensor.untyped_storage, tensors)]
    ends = map(operator.add, map(Tensor.storage_offset, tensors), map(Tensor.numel, tensors))
    return all(end * t.itemsize <= size or not t.numel() for t, end, size in zip(tensors, ends, held, strict=True))


def _is_usual(tensor: Tensor, device: torch.device) -> bool:
    return tensor.dtype in DTYPES and tensor.device == device and allocated(tensor) and dense(tensor)


def _are_alike(tensor: Tensor, first: Tensor) -> bool:
    """Whether two without gaps have as many elements in one order."""
    both = tensor.is_contiguous() and first.is_contiguous()
    return tensor.numel() == first.numel() and (both or tensor.stride() == first.stride())


def _explain(name: str, tensor: Tensor, first: Tensor | None, device: torch.device) -> None:
    """Why it does not fit."""
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise MisfitError(
            f"{name} is {tensor.dtype}: the kernels take {known}. Plain torch (hf_gradclip.kernels.eager) takes others."
        )
    if tensor.device != device:
        raise MisfitError(f"{name} is on {tensor.device}, not on {device}. Call once per device.")
    if first is None or tensor.numel() != first.numel():
        beside = 0 if first is None else first.numel()
        raise MisfitError(f"{name} has {tensor.numel()} elements beside {beside} of its segment: must be as many.")
    insist_on_memory(name, tensor, written=False)
    layout = f"shape {tuple(tensor.shape)} and strides {tensor.stride()}"
    if not dense(tensor):
        raise MisfitError(
            f"{name} has {layout}: it must be contiguous. Pass hf_gradclip.kernels.eager.whole.flat of it."
        )
    raise MisfitError(f"{name} has {layout} beside strides {first.stride()}: must have one order of elements.")


def insist_on_memory(name: str, tensor: Tensor, written: bool) -> None:
    """Stop before memory is read that is not there, where torch itself would end the process.

    Args:
        name: of the tensor, for the message.
        tensor: any; of a wrapper nothing is known.
        written: whether it will be, so that each element must have a place of its own.

    Raises:
        MisfitError: for a tensor whose storage was freed, or made too small for it; one that is no floating-point
            number; one that is to be written and whose elements share memory.
    """
    if not tensor.is_floating_point():
        raise MisfitError(f"{name} is {tensor.dtype}: must be real floating-point numbers.")
    if type(tensor) in PLAIN and not allocated(tensor):
        raise MisfitError(f"{name} has {tensor.numel()} elements and no memory: its storage was freed.")
    if (
        written
        and tensor.numel()
        and any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    ):
        raise MisfitError(f"{name} has strides {tensor.stride()}: its elements share memory.")


def allocated(tensor: Tensor) -> bool:
    """Whether the storage holds every element; the address of a freed one tells nothing where it has an offset."""
    if tensor.is_contiguous():
        size = tensor.numel()
    else:
        size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return not tensor.numel() or (
        tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + size) * tensor.itemsize
    )


def are_on(device: torch.device, tensors: Sequence[Tensor]) -> bool:
    """Whether all are on this device; without the object that `Tensor.device` makes for each."""
    if device.type == "cpu":
        return all(map(_is_on_cpu, tensors))
    return {*map(Tensor.get_device, tensors)} <= {device.index} and not any(map(_is_on_cpu, tensors))


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the memory of all is what they stand for: not of a wrapper, a fake tensor, or one with a sign to take."""
    return set(map(type, tensors)) <= PLAIN and not any(map(Tensor.is_neg, tensors))


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in whatever order."""
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))

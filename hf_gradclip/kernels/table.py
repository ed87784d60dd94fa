"""Where tensors are, as a kernel reads it: a table of addresses, sizes, dtypes and chunks, kept between calls.

Shape letters: S segments, R tensors of each (its gradient; or its weight, gradient and moments), C chunks. Every
segment is cut into chunks and one program takes one chunk, so the number of launches does not depend on the model.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

TABLES = 64  # tables that are kept; an optimizer needs one per group
KNOWN = 2  # sets of addresses that are kept in each
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Column = Sequence[Tensor | None]
"""One tensor of every segment; None where it is missing."""
Kind = tuple[torch.dtype | None, ...]
"""The dtypes of the tensors of a segment."""


@dataclass
class Table:
    """What a kernel is given. Only `address_RS` depends on more than sizes and dtypes."""

    address_RS: Tensor
    numel_S: Tensor
    kind_S: Tensor  # index into `kinds`
    first_S: Tensor  # first chunk of each segment; shape (S + 1,)
    segment_C: Tensor  # the segment that each chunk belongs to
    place_S: Tensor  # what the caller gave
    kinds: tuple[Kind, ...]
    known: list[tuple[list[int], Tensor]] = field(default_factory=list)  # addresses, and where they were uploaded

    @property
    def chunks(self) -> int:
        """How many programs to launch."""
        return self.segment_C.numel()

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The first arguments of a kernel."""
        return self.address_RS, self.numel_S, self.kind_S, self.first_S, self.segment_C


_tables: OrderedDict[tuple[object, ...], Table] = OrderedDict()
_lock = threading.Lock()


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
        ValueError: if a tensor has a dtype that is not in DTYPES, another device, or gaps in its memory.
    """
    addresses = [0 if tensor is None else tensor.data_ptr() for column in columns for tensor in column]
    sizes = tuple([-1 if tensor is None else tensor.numel() for tensor in columns[0]])
    dtypes = tuple([tuple([None if tensor is None else tensor.dtype for tensor in column]) for column in columns])
    stream = 0 if device.type == "cpu" else torch.get_device_module(device).current_stream(device).stream_id
    key = (device, stream, chunk, places, sizes, dtypes)
    with _lock:  # threads with tensors of the same sizes share a table, and have addresses of their own
        table = _tables.get(key)
        known = None if table is None else next((there for seen, there in table.known if seen == addresses), None)
        if table is None or known is None:
            for column in columns:
                for i, tensor in enumerate(column):
                    _check(f"{what} {i}", tensor, device)
            known = upload(addresses, torch.int64, device)
            if table is None:
                kinds = list(zip(*dtypes, strict=True))
                table = _tables[key] = _build([max(size, 0) for size in sizes], kinds, known, chunk, places)
                if len(_tables) > TABLES:
                    _tables.popitem(last=False)
            table.known = [(addresses, known), *table.known[: KNOWN - 1]]
        _tables.move_to_end(key)
        return replace(table, address_RS=known)


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
    )


def _check(name: str, tensor: Tensor | None, device: torch.device) -> None:
    if tensor is None:
        return
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"{name} is {tensor.dtype}: the kernels take {known}. Use kernels.eager.")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, not on {device}. Call once per device.")
    if not dense(tensor):
        layout = f"shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        raise ValueError(f"{name} has {layout}: it must be contiguous. Pass eager.flat of it.")


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether the memory of all is what they stand for: not of a wrapper, a fake tensor, or one with a sign to take."""
    return set(map(type, tensors)) <= {Tensor, nn.Parameter} and not any(map(Tensor.is_neg, tensors))


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, each once, in whatever order."""
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def upload(values: Sequence[float] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy to the device without waiting; torch keeps pinned memory from reuse until its copy has ended."""
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    return host.to(device) if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """On another device, without waiting; only the host waits, which would read the copy before it has arrived."""
    return tensor.to(device, dtype or tensor.dtype, non_blocking=device.type != "cpu")


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launch on this device; Triton takes the current one."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)

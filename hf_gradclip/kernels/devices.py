"""Tensors on several devices, as `device_map` leaves them: each device's kernels serve its own.

Their numbers are gathered on the device that asks for them, and handed out from there: one copy per device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hf_gradclip.device import moved
from hf_gradclip.kernels.blocks import of_host
from hf_gradclip.kernels.operations import WrittenError
from hf_gradclip.kernels.table import MisfitError, are_on

Part = tuple[torch.device, list[int]]
"""A device and the places of its tensors among all."""
T = TypeVar("T")


def parts_of(tensors: Sequence[Tensor | None], device: torch.device) -> list[Part]:
    """What lies where, a missing tensor with the first; nothing where all of them are on this device."""
    present = [tensor for tensor in tensors if tensor is not None]
    if are_on(device, present):
        return []
    places: dict[torch.device, list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        places[present[0].device if tensor is None else tensor.device].append(i)
    if len(places) == 1 and present[0].device.type == device.type and device.index is None:
        return []  # the same, by its full name
    return list(places.items())


def picked(values: Sequence[T], part: Part) -> list[T]:
    """Those of a part."""
    return [values[i] for i in part[1]]


def gathered(
    found: Sequence[Tensor], parts: Sequence[Part], counts: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The numbers of all tensors in their order, of each as many as its count says.

    Args:
        found: those of each part, one tensor after another.
        parts: of `parts_of`.
        counts: per tensor.
        dtype: of the result.
        device: of the result.
    """
    pieces: dict[int, Tensor] = {}
    for numbers, part in zip(found, parts, strict=True):
        pieces.update(zip(part[1], moved(numbers, device, dtype).split(picked(counts, part)), strict=True))
    return torch.cat([pieces[i] for i in range(len(counts))])


def numbers_of(numbers: Tensor | None, part: Part, counts: Sequence[int]) -> Tensor | None:
    """The numbers of a part on its device; one that serves all may stay with the host."""
    if numbers is None or of_host(numbers):
        return numbers
    if numbers.ndim:
        pieces = numbers.split(list(counts))
        numbers = torch.cat(picked(pieces, part))
    return moved(numbers, part[0])


def each_written(parts: Sequence[Part], write: Callable[[Part], None]) -> None:
    """Write part after part.

    Raises:
        WrittenError: for memory that is refused after another part was written.
    """
    for i, part in enumerate(parts):
        try:
            write(part)
        except MisfitError as error:
            if i == 0:
                raise
            raise WrittenError(f"Written on {parts[0][0]}, and then refused on {part[0]}: {error}") from error

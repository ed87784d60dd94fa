"""Tensors inside larger buffers, whose other elements a kernel may neither write nor count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GUARD = 1 << 16  # elements on either side, as many as a program takes: what it writes too far is still in the buffer


class Guards:
    """Buffers that are filled with one number outside of the tensors placed in them.

    Args:
        number: NaN shows in a sum that it was read for, a finite one that it was scaled or stepped where it stood.
    """

    def __init__(self, number: float) -> None:
        self.number = number
        self._placed: list[tuple[Tensor, Tensor]] = []

    def place(self, values: Tensor, offset: int) -> Tensor:
        """A contiguous copy that begins this many elements after a multiple of 16 bytes, between two guards."""
        start = GUARD + offset
        buffer = torch.full((start + values.numel() + GUARD,), self.number, dtype=values.dtype)
        assert buffer.data_ptr() % 16 == 0
        inside = buffer[start : start + values.numel()].copy_(values.reshape(-1))
        self._placed.append((buffer, inside))
        return inside.view(values.shape)

    @property
    def placed(self) -> int:
        """How many tensors."""
        return len(self._placed)

    def assert_kept(self) -> None:
        """Every guard still has the bits that it was made with."""
        for i, (buffer, inside) in enumerate(self._placed):
            start, end = inside.storage_offset(), inside.storage_offset() + inside.numel()
            for side, guard in (("before", buffer[:start]), ("after", buffer[end:])):
                fresh = torch.full_like(guard, self.number)
                assert torch.equal(guard.view(torch.uint8), fresh.view(torch.uint8)), f"{side} tensor {i}"


class Torch:
    """torch for a module that makes its results with `empty` and `empty_like`: they come between guards of NaN."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *size: int, **options: Any) -> Tensor:
        return self.guards.place(torch.full(size, self.guards.number, **options), 1)

    def empty_like(self, other: Tensor) -> Tensor:
        return self.guards.place(torch.full_like(other, self.guards.number), 1)

"""A gradient, to know it again: which object it is, and how often its memory was written to."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import Tensor


class Fingerprint(NamedTuple):
    """Of one gradient, which it does not keep alive.

    Args:
        grad: the gradient.
        version: of its memory.
    """

    grad: weakref.ref[Tensor]
    version: int

    def fits(self, grad: Tensor | None, edited: bool = False) -> bool:
        """Whether this is the same gradient; one that was written to since only where `edited` lets it."""
        return grad is not None and grad is self.grad() and (edited or grad._version == self.version)


def fingerprint(grad: Tensor | None) -> Fingerprint | None:
    """That of a gradient now; None where there is none."""
    return None if grad is None else Fingerprint(weakref.ref(grad), grad._version)

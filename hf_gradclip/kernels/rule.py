"""What a fused step computes for one group of parameters, and on which memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.kernels.table import Column, are_plain, dense

Places = tuple[tuple[int, int], ...]
"""Per parameter its segment in the plan for the gradients and in that for the updates."""


class Memory(NamedTuple):
    """The tensors of one group, one entry per parameter in each list; a moment that a rule does not keep is None."""

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    first: Column
    second: Column
    third: Column


@dataclass(frozen=True)
class Rule:
    """An optimizer's arithmetic with its numbers. All of them are arguments of a kernel, none is compiled into it.

    g is the clipped gradient with its sign and coupled decay, w <- w (1 - lr decay) - lr u, and

        adam      a <- past a + fresh g, b <- past2 b + fresh2 g^2, u = a term / (sqrt(b) / root + eps), or with
                  c <- max(c, b) in the place of b
        rmsprop   a <- past2 a + fresh2 g^2, b <- b + fresh2 (g - b), u = g / (sqrt(a - b^2) / root + eps), or
                  c <- past c + u in its place
        sgd       u = g, or a <- past a + term g in its place
        nesterov  a <- past a + term g, u = g + past a

    Args:
        name: of the four.
        lr: learning rate.
        decay: weight decay.
        decoupled: the decay is outside the gradient.
        maximize: the gradient changes its sign.
        past, fresh, past2, fresh2, eps: as above.
        terms: per parameter (term, root); None where both are 1 for all.
        done: called after the step, to count it.
    """

    name: str
    lr: float
    decay: float
    decoupled: bool
    maximize: bool
    done: Callable[[], None]
    past: float = 0.0
    fresh: float = 0.0
    past2: float = 0.0
    fresh2: float = 0.0
    eps: float = 0.0
    terms: Sequence[tuple[float, float]] | None = None


def are_alike(memory: Memory, dtypes: Collection[torch.dtype]) -> bool:
    """Whether all tensors of a parameter are there, to be written, of one size and one order, on one device."""
    device = memory.weights[0].device
    for weight, *others in zip(*memory, strict=True):
        same = [weight, *(tensor for tensor in others if tensor is not None)]
        if not are_plain(same) or any(t.is_inference() or (t.numel() and not t.data_ptr()) for t in same):
            return False
        if not all(t.dtype in dtypes and t.device == device and t.shape == weight.shape for t in same):
            return False
        if not all(t.is_contiguous() for t in same) and not (
            dense(weight) and all(t.stride() == weight.stride() for t in same)
        ):
            return False
    return True

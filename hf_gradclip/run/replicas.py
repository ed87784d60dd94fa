"""Do all replicas of a gradient hold the same numbers? Compared now and then, judged when something is logged."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hf_gradclip.views.view import View

SPREAD = 1e-6


class Replicas:
    """Compares the norms that ranks measure before they are reduced."""

    def __init__(self) -> None:
        self._spread: Tensor | None = None

    def check(self, view: View) -> None:
        """Compare those of the last step; nothing is read to the host."""
        spread = view.spread()
        if spread is not None:
            dist.all_reduce(spread, dist.ReduceOp.MAX)  # a replica group may be a part of the job; all of it must stop
            self._spread = spread if self._spread is None else torch.maximum(self._spread, spread)

    def insist(self) -> None:
        """Stop, on every rank, if a comparison since the last call found different gradients. One host read.

        Raises:
            RuntimeError: with the largest difference of the norms.
        """
        spread, self._spread = self._spread, None
        if spread is not None and float(spread) > SPREAD:  # at a log only, and only after a comparison
            raise RuntimeError(
                f"The ranks measured gradient norms that differ by up to {float(spread):.3g} of the norm. Under DDP "
                "and HSDP they must be equal, so the replicas have come apart: look for a gradient that is changed "
                "after backward, or a parameter that is not reduced. check_every=0 switches this check off."
            )

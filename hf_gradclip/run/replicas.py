"""Do all replicas of a gradient hold the same numbers? Compared now and then, judged when something is logged."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_gradclip.run.refusal import Refusal, refuse
from hf_gradclip.views.view import View
from hf_gradclip.watching import Events

SPREAD = 1e-6
COMPARED = (1, 2, 5)
"""The steps of a run in which the comparison is judged at once."""
_OUT_OF_DATA = "the ranks ask each other in a step, and one that is out of data would not answer."
_EVEN = "Give all ranks as many batches (even_batches=True), or leave it out."


class Replicas:
    """Compares the norms that ranks measure before they are reduced.

    Args:
        every: steps between two comparisons; 0 for none.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._spread: Tensor | None = None
        self._wrappers: weakref.WeakSet[Any] = weakref.WeakSet()

    def meet(self, prepared: Any) -> None:
        """Know the wrappers among what was prepared: one object, or a tuple of them."""
        for thing in prepared if isinstance(prepared, tuple) else (prepared,):
            if hasattr(thing, "_join_config"):
                self._wrappers.add(thing)

    def _joins(self) -> bool:
        """Whether a model of DDP is in its `join()`, where a rank that is out of data answers no collective of ours."""
        return any(getattr(wrapper._join_config, "enable", False) for wrapper in self._wrappers)

    def refuse_join(self, hears_loss: bool, events: Events) -> None:
        """Stop in a `join()`, where the ranks that are left would wait for ever for one that is out of data.

        Args:
            hears_loss: whether the loss of a step is judged, and so reduced.
            events: of the clipper that is asked.

        Raises:
            UnsupportedBackendError: with what to use instead.
        """
        asker = "a strategy that judges the loss" if hears_loss else "a handler of events, or after_spike,"
        asks = hears_loss or (events.agree is not None and bool(events.kinds))
        refuse([Refusal(asks and self._joins(), f"{asker} in model.join()", _OUT_OF_DATA, _EVEN)])

    def compare(self, view: View, step: int) -> None:
        """Look at a step: in the first ones the comparison is judged at once, later it waits for a log.

        Args:
            view: whose norms were measured in it.
            step: counted from 1.
        """
        first = step in COMPARED
        if not self._every or not (first or step % self._every == 0) or self._joins():
            return
        self.check(view)
        if first:
            self.insist()

    def finish(self, views: Iterable[View]) -> None:
        """Compare those of the last step and judge, on every rank.

        Raises:
            RuntimeError: see `insist`.
        """
        if self._every and not self._joins():
            for view in views:
                self.check(view)
            self.insist()

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
                "after backward, a forward around the wrapper (model.module(...)), or a parameter that is not reduced. "
                "Where they shall differ, as under LocalSGD, switch this check off by attach(..., check_every=0) or "
                "clip={'gradient': ..., 'check_every': 0}."
            )

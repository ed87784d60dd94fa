"""The loss of a step, for the strategies that judge it: what `backward` was given, over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from hf_gradclip.run.startup import world_size


class StepLoss:
    """Adds up the losses of a step on the device."""

    def __init__(self) -> None:
        self._sum: Tensor | None
        self._last: Tensor | None
        self._told: set[object]
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        self._sum, self._added, self._last, self._told = None, 0, None, set()

    def drop(self) -> None:
        """The step that was begun is not made: forget what was added to its loss."""
        self._sum, self._added = None, 0

    def add(self, loss: Tensor, micro_batches: int) -> None:
        """One of the micro-batches of a step.

        Args:
            loss: of it.
            micro_batches: of a usual step; the last of an epoch may have fewer. 1 where losses come as parts of the
                step's own, divided by whoever gives them.
        """
        part = loss.detach().float()
        self._sum = part if self._sum is None else self._sum + part
        self._added = self._added + 1 if micro_batches > 1 else 1

    def local(self, who: object = None) -> Tensor | None:
        """The mean over this process's micro-batches, 0-d; the next `add` starts anew.

        Args:
            who: asks. Two models of one backward are told the same loss, and each of them once.

        Returns:
            None if nothing was added since the same one asked.
        """
        return self._tell(who, lambda loss: loss)

    def reduced(self, who: object = None) -> Tensor | None:
        """The same over ranks too. One all-reduce of one number per step where there are several ranks."""
        return self._tell(who, _mean_over_ranks)

    def _tell(self, who: object, mean: Callable[[Tensor], Tensor]) -> Tensor | None:
        if self._sum is not None:
            self._last, self._told = mean(self._sum / self._added), set()
            self.drop()
        if who in self._told:
            return None
        self._told.add(who)
        return self._last


def _mean_over_ranks(loss: Tensor) -> Tensor:
    if world_size() == 1:
        return loss
    loss = loss.clone()
    dist.all_reduce(loss)
    return loss / world_size()

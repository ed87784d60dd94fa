"""The loss of a step, for the strategies that judge it: what `backward` was given, over micro-batches and ranks."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from hf_gradclip.integrations.startup import world_size


class StepLoss:
    """Adds up the losses of a step on the device.

    Args:
        accelerator: whose `backward` they are given to.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._sum: Tensor | None = None

    def add(self, loss: Tensor, **_: Any) -> None:
        """One micro-batch."""
        part = loss.detach().float() / self._accelerator.gradient_accumulation_steps
        self._sum = part if self._sum is None else self._sum + part

    def local(self) -> Tensor | None:
        """The mean over this process's micro-batches, 0-d, and start anew; None if nothing was added."""
        loss, self._sum = self._sum, None
        return loss

    def reduced(self) -> Tensor | None:
        """The mean over micro-batches and ranks, 0-d, and start anew; None if nothing was added.

        One all-reduce of one number where there are several ranks.
        """
        loss = self.local()
        if loss is not None and world_size() > 1:
            loss = loss.clone()
            dist.all_reduce(loss)
            loss = loss / world_size()
        return loss

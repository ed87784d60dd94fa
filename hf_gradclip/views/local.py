"""Gradients that are whole on this process: one device, DDP, DataParallel, a model spread over devices by hand.

Under DDP every rank holds the same reduced gradient, so every rank computes the same numbers and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hf_gradclip.strategy import Needs, Units
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views.parameters import Parameters, Watched, spread_of
from hf_gradclip.views.view import GradientView


class LocalView(GradientView):
    """The `.grad` of every trainable parameter of a model.

    Args:
        model: wrapped or not, or named parameters; a tied one counts once, a frozen one not at all until it is
            unfrozen.
        unscale: called before each measurement, to take a loss scale out of the gradients.
        guarded: True if a GradScaler skips the steps with a non-finite gradient.

    Raises:
        ValueError: if no parameter is trainable.
    """

    def __init__(self, model: Watched, unscale: Callable[[], None] | None = None, guarded: bool = False) -> None:
        self.parameters = Parameters(model)
        self._unscale = unscale
        self._guarded = guarded
        self._norm = torch.zeros((), dtype=self.layout.dtype, device=self.layout.device)

    @property
    def layout(self) -> Layout:
        """The segments of the trainable parameters; rebuilt when one was unfrozen or added."""
        return self.parameters.layout

    @property
    def backend(self) -> str:
        """For the start-up line."""
        return f"local gradients on {self.layout.device.type}"

    @property
    def guarded(self) -> bool:
        """True if a GradScaler skips the steps with a non-finite gradient."""
        return self._guarded

    def divide(self, units: Units) -> None:
        """See GradientView."""
        self.parameters.divide(units)

    def watched(self) -> Sequence[Tensor]:
        """The trainable parameters."""
        return self.parameters.watched()

    def reductions(self, needs: Needs) -> int:
        """None: every rank holds everything."""
        return 0

    @torch.no_grad()
    def measure(self, needs: Needs, rescale: bool = False) -> NormStats:
        """Norms of the local gradients, after the loss scale is taken out."""
        if self._unscale is not None and not rescale:
            self._unscale()
        return self.reduce(self.parameters.measure(needs, rescale))

    def reduce(self, local: NormStats) -> NormStats:
        """Nothing to add up."""
        self._norm = local.total
        return local

    def spread(self) -> Tensor | None:
        """Over all ranks of the job, which under DDP hold the same gradient."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        return spread_of(self._norm, None, self._norm.device)

    @torch.no_grad()
    def apply_(self, plan: ClipPlan, part: int | None = None) -> None:
        """Scale, then bound, the local gradients."""
        self.parameters.apply_(plan)

    def drop_(self) -> None:
        """Set every gradient to None."""
        self.parameters.drop_()

"""A view is the memory that is here times how it adds up over ranks. It owns the loss scale, and decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from hf_gradclip.device import refuse_capture
from hf_gradclip.strategy import Needs, Units
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views.heads import Heads
from hf_gradclip.views.here import Here, Place
from hf_gradclip.views.ranks import Ranks, spread_of


class UnsupportedBackendError(RuntimeError):
    """Clipping would be inactive or wrong here, so training does not start."""


@final
class View:
    """The gradients of one model on one backend, in true units and reduced over ranks.

    `layout`, `watched` and `measure` look anew at what there is to measure; all else is of the last look.

    Args:
        here: the gradients in the memory of this process.
        ranks: the processes whose numbers add up; None where each holds everything.
        unscale: called before each measurement, to take a loss scale out of the gradients.
        loss_scale: gives what the gradients are multiplied by, where nobody takes it out before they are measured.
        guarded: True if somebody else skips a step with a non-finite gradient, as a GradScaler does.

    Attributes:
        skipping: set by `drop_` where the gradients cannot be taken away: whoever steps leaves them alone, and clears
            it.
    """

    def __init__(
        self,
        here: Here,
        ranks: Ranks | None = None,
        unscale: Callable[[], None] | None = None,
        loss_scale: Callable[[], float] | None = None,
        guarded: bool = False,
    ) -> None:
        self.here = here
        self.guarded = guarded
        self.whole_only = here.whole_only
        self.skipping = False
        self.ranks = ranks
        self._unscale = unscale
        self._loss_scale = loss_scale
        self._local_S: Tensor | None = None

    @property
    def layout(self) -> Layout:
        """The segments, equal on every rank; looks anew.

        A new object where other parameters are trainable now, or one has memory of another size.
        """
        return self.here.look()

    @property
    def backend(self) -> str:
        """A few words for the start-up line: where the gradients live."""
        return self.here.backend

    @property
    def known(self) -> Sequence[str]:
        """The names of all parameters, frozen ones too, as far as this view has them; of the last look."""
        return self.here.known()

    @property
    def heads(self) -> Heads:
        """The layers that `divide` leaves whole, since they make the model's output; of the last look."""
        return self.here.heads

    @property
    def adapters(self) -> frozenset[str]:
        """The parameters of adapters that `divide` leaves whole; of the last look."""
        return self.here.adapters

    @property
    def vectors(self) -> frozenset[str]:
        """The parameters that `divide` leaves whole since they have one dimension; of the last look."""
        return self.here.vectors

    @property
    def uncut(self) -> tuple[str, ...]:
        """The parameters that `divide` leaves whole, those of heads and adapters included; of the last look."""
        return self.here.uncut

    @property
    def loss_scale(self) -> float:
        """What the gradients in memory are multiplied by; `measure` takes it out."""
        return 1.0 if self._loss_scale is None else self._loss_scale()

    def divide(self, units: Units) -> None:
        """Measure and scale by unit from here on: the layout's segments are units then.

        Raises:
            UnsupportedBackendError: where the units are not known.
        """
        self.here.divide(units)

    def reductions(self, needs: Needs) -> int:
        """All-reduces over ranks in one measurement."""
        return 0 if self.ranks is None else self.ranks.reductions(needs)

    @torch.no_grad()
    def measure(self, needs: Needs, rescale: bool = False) -> NormStats:
        """Look anew, and read the gradients once: in true units, reduced over ranks.

        Args:
            needs: what to measure beside the norms.
            rescale: divide by the largest element before squaring, for gradients whose squares overflow.
        """
        refuse_capture("Clipping", self.here.layout.device)
        if self._unscale is not None and not rescale:
            self._unscale()
        self.here.look()
        local = self.here.measure(needs, rescale)
        if self._loss_scale is not None:
            scale, largest_S = self._loss_scale(), local.max_abs_S
            local = replace(
                local,
                sumsq_S=local.sumsq_S / scale**2,
                max_abs_S=None if largest_S is None else largest_S / scale,
            )
        return self.reduce(local)

    def reduce(self, local: NormStats) -> NormStats:
        """Add up over ranks what was measured of this process alone, with the reductions of `measure`.

        Args:
            local: in true units; of the gradients, or of the updates in their place.
        """
        self._local_S = local.sumsq_S
        return local if self.ranks is None else self.ranks.reduce(local, self.here.owned_S)

    def watched(self) -> Sequence[Tensor]:
        """The parameters whose `.grad` this view shows, looked at anew; empty where the gradients are not there."""
        self.here.look()
        return self.here.watched()

    def places(self) -> dict[int, Place]:
        """Where each watched parameter finds its numbers in a plan, by its `id`: for a step that clips as it reads.

        Returns:
            Its segment, the first where it has several; and where it is cut into units, the axes that count them and
            the segments of those that are here, int64 on the layout's device, else None. Of the last look, and the
            same object until the layout changes.
        """
        return self.here.places()

    def spread(self) -> Tensor | None:
        """How far apart the replicas of a gradient were in the last measurement, before it was reduced.

        Returns:
            (largest - smallest) / largest norm, 0-d, on the device, the same on all ranks of a replica group; None
            where nothing is held twice, or was measured. Every rank must call it; it costs a reduction of two numbers.
        """
        local_S = self._local_S
        if local_S is None or not (replicas := self.here.replicas()):
            return None
        device = local_S.device if self.ranks is None else self.ranks.device
        spreads = []
        for group, mine_S in replicas:
            sums_S = local_S if mine_S is None else torch.where(mine_S, local_S, 0.0)
            spreads.append(spread_of(sums_S.sum().sqrt(), group, device))
        return torch.stack(spreads).amax()

    @torch.no_grad()
    def rows(self, name: str, count: int) -> list[tuple[int, float]]:
        """Of a gradient that has rows, as a table of embeddings has, the largest and their norms. Reads it once more.

        Raises:
            ValueError: where no process holds all of its rows, or there are none.
        """
        return self.here.rows(name, count)

    @torch.no_grad()
    def apply_(self, plan: ClipPlan, part: int | None = None) -> None:
        """g <- clamp(g * scale, -bound, +bound), in the memory of this process.

        Args:
            plan: of the layout of the last measurement.
            part: which of the parts that a backend steps one after another; None for all gradients.
        """
        self.here.apply_(plan, part)

    def drop_(self) -> None:
        """Make the coming optimizer step do nothing: no weight, moment, decay or counter moves."""
        self.skipping = not self.here.drop_()

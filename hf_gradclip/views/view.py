"""What every view can do. A view owns the loss scale and the reductions over ranks; it decides nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from hf_gradclip.strategy import Needs, Units
from hf_gradclip.types import ClipPlan, Layout, NormStats


class UnsupportedBackendError(RuntimeError):
    """Clipping would be inactive or wrong here, so training does not start."""


class GradientView(ABC):
    """The gradients of one model on one backend. `whole_only`: it knows no parameters, only the whole gradient."""

    whole_only: ClassVar[bool] = False

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The segments, equal on every rank. A new object when the set of trainable parameters has changed."""

    @property
    @abstractmethod
    def backend(self) -> str:
        """A few words for the start-up line: where the gradients live."""

    @property
    @abstractmethod
    def guarded(self) -> bool:
        """True if somebody else skips a step with a non-finite gradient (a GradScaler)."""

    def divide(self, units: Units) -> None:
        """Measure and scale by unit from here on: the layout's segments are units then.

        Raises:
            UnsupportedBackendError: where the units are not known.
        """
        raise UnsupportedBackendError(f"{self.backend}: its memory is not known by unit. Use FSDP2 or DDP.")

    @abstractmethod
    def reductions(self, needs: Needs) -> int:
        """All-reduces over ranks in one measurement."""

    @abstractmethod
    def measure(self, needs: Needs, rescale: bool = False) -> NormStats:
        """Read the gradients once, in true units, reduced over ranks.

        Args:
            needs: what to measure beside the norms.
            rescale: divide by the largest element before squaring, for gradients whose squares overflow.
        """

    def reduce(self, local: NormStats) -> NormStats:
        """Add up over ranks what was measured of this process's memory elsewhere, with the reductions of `measure`.

        Raises:
            UnsupportedBackendError: where nobody else can measure.
        """
        raise UnsupportedBackendError(f"{self.backend}: nobody else measures here.")

    def watched(self) -> Sequence[Tensor]:
        """The parameters whose `.grad` this view shows; empty where the gradients are not there."""
        return ()

    def spread(self) -> Tensor | None:
        """How far apart the replicas of a gradient were in the last measurement, before it was reduced.

        Returns:
            (largest - smallest) / largest norm, 0-d, on the device, the same on all ranks of a replica group; None
            where nothing is held twice. Every rank must call it; it costs a reduction of two numbers.
        """
        return None

    @abstractmethod
    def apply_(self, plan: ClipPlan, part: int | None = None) -> None:
        """g <- clamp(g * scale, +-bound). `part` names one piece where a backend steps piece by piece."""

    @abstractmethod
    def drop_(self) -> None:
        """Make the coming optimizer step do nothing: no gradient, so no weight, moment, decay or counter moves."""

"""What a view shows: the gradients that are in the memory of this process, whatever keeps them there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from hf_gradclip.kernels.rule import ByAxes
from hf_gradclip.strategy import Needs, Units
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views.adapters import adapters_of
from hf_gradclip.views.heads import Heads, heads_of
from hf_gradclip.views.units import Shape, axes_of, is_vector

Place = tuple[int, ByAxes | None]
"""Of a parameter its first segment and, where it is cut into units, those of them that are here."""


class Replica(NamedTuple):
    """A group of processes that hold the same gradients.

    Args:
        group: None for all processes of the job.
        mine_S: of which segments, bool, shape (S,); None for all.
    """

    group: dist.ProcessGroup | None
    mine_S: Tensor | None


class Here(ABC):
    """The gradients of one model in the memory of this process: measured alone, scaled alone, by segment.

    Attributes:
        whole_only: True where nothing is known of single parameters.
        layout: the segments, equal on every process, as they were when somebody looked last.
        owned_S: of which segments this process adds its numbers to a sum over ranks, bool, shape (S,); None for all.
        heads: the layers that `divide` leaves whole since they make the model's output.
        adapters: the parameters of adapters that it leaves whole.
        vectors: the parameters that it leaves whole since they have one dimension.
        uncut: the names of the parameters that it leaves whole, those of heads and adapters included.
    """

    whole_only: ClassVar[bool] = False
    layout: Layout
    owned_S: Tensor | None = None
    heads: Heads = MappingProxyType({})
    adapters: frozenset[str] = frozenset()
    vectors: frozenset[str] = frozenset()
    uncut: tuple[str, ...] = ()

    @property
    @abstractmethod
    def backend(self) -> str:
        """A few words for the start-up line: where the gradients live."""

    @abstractmethod
    def look(self) -> Layout:
        """Look anew at what there is; the layout, a new object where that has changed. It costs microseconds."""

    @abstractmethod
    def divide(self, units: Units) -> None:
        """Measure and scale by unit from here on.

        Args:
            units: which parameters are cut, and along which axes.

        Raises:
            UnsupportedBackendError: where the units are not known.
        """

    def _axes(
        self, model: nn.Module | None, named: Sequence[tuple[str, Tensor]], shapes: Sequence[Shape], units: Units
    ) -> list[tuple[int, ...] | None]:
        """Find the heads and the adapters, and of each parameter the axes that count units; see `axes_of` for both."""
        asked = {name: its for name, _ in named if (its := units.of(name)) is not None}
        self.heads = {
            layer: names
            for layer, names in heads_of(model, named).items()
            if any(name in asked and not asked[name].head for name in names)
        }
        self.adapters = frozenset(
            name for name in adapters_of(model, named) if name in asked and not asked[name].adapters
        )
        shape_of = {name: shape for (name, _), shape in zip(named, shapes, strict=True)}
        self.vectors = frozenset(
            name for name, its in asked.items() if not its.vectors and is_vector(name, shape_of[name])
        )
        axes = axes_of(model, named, shapes, units, self.heads, self.adapters)
        self.uncut = tuple(name for (name, _), kept in zip(named, axes, strict=True) if kept is None)
        return axes

    def known(self) -> Sequence[str]:
        """The names of all parameters, frozen ones too."""
        return self.layout.names

    @abstractmethod
    def watched(self) -> Sequence[Tensor]:
        """The parameters whose `.grad` is shown, at the last look; empty where the gradients are not there."""

    @abstractmethod
    def places(self) -> dict[int, Place]:
        """Where each of `watched()` finds its numbers, by its `id`; the same object until the layout changes."""

    @abstractmethod
    def measure(self, needs: Needs, rescale: bool) -> NormStats:
        """The statistics of what is here alone; see View.measure for the arguments."""

    @abstractmethod
    def apply_(self, plan: ClipPlan, part: int | None) -> None:
        """g <- clamp(g * scale, -bound, +bound); see View.apply_ for the arguments."""

    def rows(self, name: str, count: int) -> list[tuple[int, float]]:
        """See View.rows."""
        raise ValueError(f"event.rows({name!r}): no process holds all rows of a gradient here ({self.backend}).")

    @abstractmethod
    def drop_(self) -> bool:
        """Make the coming step do nothing; False where that is left to whoever steps."""

    def replicas(self) -> Sequence[Replica]:
        """What other processes hold too; nothing, as a rule."""
        return ()

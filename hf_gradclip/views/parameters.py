"""The gradients of a model's parameters, each in `.grad`: what plain tensors and DTensor shards have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_gradclip import kernels
from hf_gradclip.device import upload
from hf_gradclip.kernels.eager import whole
from hf_gradclip.strategy import Needs, Units
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views.cuts import Cuts
from hf_gradclip.views.division import Division
from hf_gradclip.views.gradients import blocks_of, gradients_of, measure, shaped
from hf_gradclip.views.here import Here, Place
from hf_gradclip.views.trainable import Trainable, Watched
from hf_gradclip.views.units import Shape
from hf_gradclip.views.view import UnsupportedBackendError


class Parameters(Here):
    """The trainable parameters of a model.

    Args:
        source: a model, wrapped by DDP or torch.compile, or not; or a part of one; or named parameters, of which names
            and shapes alone tell the heads, the adapters and the units.

    Raises:
        ValueError: if no parameter is trainable.
        UnsupportedBackendError: for a parameter that is kept in another way, by name.
    """

    _unsettled: Sequence[Tensor] = ()

    def __init__(self, source: Watched) -> None:
        self._trainable = Trainable(source)
        named = zip(self._trainable.names, self._trainable.parameters, strict=True)
        if (name := next((name for name, p in named if p.is_meta), None)) is not None:
            raise UnsupportedBackendError(
                f"{name} is on the meta device, where it has no memory. Make the clipper, or an optimizer that clips, "
                "after the model has its weights: after to_empty() or loading them."
            )
        self._units: Units | None = None
        self._read()

    @abstractmethod
    def _take(self, names: Sequence[str], parameters: Sequence[Tensor]) -> list[bool] | None:
        """Look at parameters that are new here.

        Returns:
            Which of them this process adds to a sum over ranks; None for all.

        Raises:
            UnsupportedBackendError: for one that is kept in another way, by name.
        """

    @abstractmethod
    def _box(self, parameter: Tensor) -> tuple[Shape, Shape]:
        """Where this process's part of a parameter lies in the whole: (offsets, sizes)."""

    def _settle_(self, parameter: Tensor) -> None:
        """Before a measurement: finish the gradient of a shard that is not yet what the shard is."""

    def look(self) -> Layout:
        """See Here. A parameter may also have got memory of another size, as resize_token_embeddings gives it."""
        size = Tensor.numel if self._cuts is None else Tensor.size
        changed = self._trainable.look()
        parameters = self._trainable.parameters
        if changed or [*map(size, parameters)] != self._sizes or parameters[0].device != self._home:
            self._read()
        return self.layout

    def _read(self) -> None:
        """Make the layout."""
        names, parameters = self._trainable.names, self._trainable.parameters
        self._sizes: list[Any] = []  # where this fails, so does the next look
        owned_P = self._take(names, parameters)
        device = parameters[0].device
        if self._units is None:
            self._sizes = [*map(Tensor.numel, parameters)]
            self._cuts = None
            self._first = list(range(len(parameters)))
            self.layout = Layout.of_parameters(names, self._sizes, device)
        else:
            self._sizes = [*map(Tensor.size, parameters)]
            named = list(zip(names, parameters, strict=True))
            axes = self._axes(self._trainable.model, named, self._sizes, self._units)
            division = Division(names, self._sizes, axes, device)
            self._first = division.first[:-1]
            self.layout = division.layout
            self._cuts = Cuts(self.layout, [division.box(i, i, *self._box(p)) for i, p in enumerate(parameters)])
        self._home = device
        self._dtype, self._device = self.layout.dtype, self.layout.device
        self._places: dict[int, Place] | None = None
        self.owned_S = None if owned_P is None else upload(owned_P, torch.bool, device)[self.layout.param_S]

    def divide(self, units: Units) -> None:
        """See Here."""
        self._units = units
        self._trainable.look()
        self._read()

    def known(self) -> Sequence[str]:
        """See Here."""
        return self._trainable.known

    def watched(self) -> Sequence[Tensor]:
        """See Here."""
        return self._trainable.parameters

    def places(self) -> dict[int, Place]:
        """See Here."""
        if self._places is None:
            axes = {} if self._cuts is None else self._cuts.by_axes()
            last = len(self.layout) - 1  # an empty matrix has no units, and so no segment of its own
            numbered = enumerate(zip(self._trainable.parameters, self._first, strict=True))
            self._places = {id(p): (min(first, last), axes.get(i)) for i, (p, first) in numbered}
        return self._places

    def measure(self, needs: Needs, rescale: bool) -> NormStats:
        """See Here."""
        for parameter in self._unsettled:
            self._settle_(parameter)
        names, parameters = self._trainable.names, self._trainable.parameters
        weights = [shaped(p.detach()) for p in parameters] if needs.weights else None
        if self._cuts is not None:
            return self._cuts.measure(blocks_of(names, parameters), weights, needs, rescale)
        sums_S, largest_S = measure(gradients_of(parameters), self._dtype, self._device, needs.max_abs, rescale)
        if weights is None:
            return NormStats(sums_S, self.layout, largest_S)
        flat = [whole.flat(weight) for weight in weights]
        return NormStats(
            sums_S,
            self.layout,
            largest_S,
            weight_sumsq_S=kernels.statistics(flat, self._dtype, self._device, max_abs=False)[0],
        )

    def apply_(self, plan: ClipPlan, part: int | None) -> None:
        """See Here; there are no parts."""
        names, parameters = self._trainable.names, self._trainable.parameters
        if self._cuts is None:
            kernels.apply_(gradients_of(parameters), plan.scale_S, plan.bound_S)
        else:
            self._cuts.apply_(blocks_of(names, parameters), plan)

    def drop_(self) -> bool:
        """See Here: every gradient becomes None."""
        for parameter in self._trainable.parameters:
            parameter.grad = None
        return True

"""Gradients inside DeepSpeed ZeRO: flat partitions, of which each rank holds pieces of some parameters.

A ZeRO optimizer steps part by part (a parameter group, or a sub-group of stage 3), so all parts are measured at once,
and a plan is applied to one part when its turn comes. The pieces are found once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from hf_gradclip.strategy import Needs, Units
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views.cuts import Cuts
from hf_gradclip.views.division import Cut, Division
from hf_gradclip.views.here import Here, Place
from hf_gradclip.views.partitions import Kind, Moved, Partition, Piece
from hf_gradclip.views.ranks import Ranks
from hf_gradclip.views.trainable import named_parameters
from hf_gradclip.views.view import View


def zero_view(module: nn.Module, zero: Any, kind: type[Kind], device: torch.device, guarded: bool) -> View:
    """The view of the gradients that a ZeRO optimizer holds.

    Args:
        module: the model, for the parameters' names.
        zero: its ZeRO optimizer.
        kind: of that, see KINDS.
        device: where the job's collectives and the statistics are.
        guarded: True if the optimizer's dynamic loss scale explains a skipped step.
    """
    named = [(name, p) for name, p in named_parameters(module) if p.requires_grad]
    partition = kind(zero, {id(p): i for i, (_, p) in enumerate(named)})
    ranks = None if kind.is_whole else Ranks(device, zero.dp_process_group)
    loss_scale = partition.loss_scale if kind.is_scaled else None
    return View(Pieces(module, named, partition, device), ranks, loss_scale=loss_scale, guarded=guarded)


def of_updates(view: View) -> tuple[View, Moved]:
    """A view of the same pieces of the updates, and the memory to put them in.

    Args:
        view: made by `zero_view`.
    """
    pieces = view.here
    assert isinstance(pieces, Pieces)
    assert isinstance(pieces.partition, Kind)
    moved = Moved(pieces.partition)
    return View(Pieces(pieces.module, pieces.named, moved, pieces.layout.device), view.ranks), moved


@final
class Pieces(Here):
    """The pieces of all gradients that this rank holds under ZeRO. The layout is of the parameters as if whole.

    Args:
        module: the model, whose layers say what makes one output.
        named: its trainable parameters.
        partition: where the pieces are.
        device: of the statistics.
    """

    def __init__(
        self, module: nn.Module, named: Sequence[tuple[str, Tensor]], partition: Partition, device: torch.device
    ) -> None:
        self.module = module
        self.named = named
        self.partition = partition
        self._shapes = [tuple(getattr(p, "ds_shape", p.shape)) for _, p in named]
        self._cut(None, device)

    def _cut(self, axes: list[tuple[int, ...] | None] | None, device: torch.device) -> None:
        division = Division([name for name, _ in self.named], self._shapes, axes, device)
        parts = self.partition.parts
        self.layout = division.layout
        self._cuts = Cuts(self.layout, _cuts_of(division, [piece for part in parts for piece in part]))
        self._cuts_by_part = [Cuts(self.layout, _cuts_of(division, part)) for part in parts]

    @property
    def backend(self) -> str:
        """See Here."""
        return f"{self.partition.words}, {len(self.partition.parts)} part(s) to step, {self.layout.device.type}"

    def look(self) -> Layout:
        """See Here; DeepSpeed itself takes no other parameters once it has begun."""
        return self.layout

    def divide(self, units: Units) -> None:
        """See Here."""
        self._cut(self._axes(self.module, self.named, self._shapes, units), self.layout.device)

    def known(self) -> Sequence[str]:
        """See Here."""
        return [name for name, _ in named_parameters(self.module)]

    def watched(self) -> Sequence[Tensor]:
        """None: no gradient is in `.grad`."""
        return ()

    def places(self) -> dict[int, Place]:
        """None, as `watched`."""
        return {}

    def measure(self, needs: Needs, rescale: bool) -> NormStats:
        """See Here."""
        weights = self.partition.all_weights() if needs.weights and isinstance(self.partition, Kind) else None
        return self._cuts.measure(self.partition.measured(), weights, needs, rescale)

    def apply_(self, plan: ClipPlan, part: int | None) -> None:
        """See Here; one part in its float32 memory, or all gradients before the step."""
        partition = self.partition
        if part is None:
            self._cuts.apply_(partition.measured(), plan)
        else:
            self._cuts_by_part[part].apply_(partition.pieces_of(part, partition.flat(part)), plan)

    def drop_(self) -> bool:
        """Whoever steps the parts leaves them alone."""
        return False


def _cuts_of(division: Division, pieces: Sequence[Piece]) -> list[Cut]:
    """The cuts of pieces that lie in one flat tensor each."""
    return [
        cut for i, piece in enumerate(pieces) for cut in division.run(piece.parameter, i, piece.offset, piece.length)
    ]

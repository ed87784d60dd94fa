"""Gradients inside DeepSpeed ZeRO: flat partitions, of which each rank holds pieces of some parameters.

A ZeRO optimizer steps part by part (a parameter group, or a sub-group of stage 3), so the view measures all parts at
once and applies a plan to one part when its turn comes. The pieces are found once; every number is in units of the
loss after DeepSpeed's loss scale is taken out. This file reads the optimizer's attributes and imports nothing of it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_gradclip.strategy import Needs, Units
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views.parameters import named_parameters
from hf_gradclip.views.units import Cut, Division, Held, axes_of
from hf_gradclip.views.view import GradientView


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's elements: `length` from `offset` in the parameter, from `start` in a part's memory."""

    parameter: int
    start: int
    length: int
    offset: int


class Partition(ABC):
    """What this rank holds of the gradients under one kind of ZeRO optimizer.

    Args:
        zero: the ZeRO optimizer.
        places: the number of each trainable parameter, by `id`.
    """

    parts: list[list[Piece]]
    kind: str

    def __init__(self, zero: Any, places: dict[int, int]) -> None:
        self.zero = zero
        self.parts = self._find_parts(places)

    @abstractmethod
    def _find_parts(self, places: dict[int, int]) -> list[list[Piece]]:
        """The pieces of every part, in the order in which they are stepped."""

    @abstractmethod
    def measured(self) -> list[Tensor | None]:
        """The memory of every piece of every part before the step, flat, in the order of `parts`."""

    @abstractmethod
    def flat(self, part: int) -> Tensor:
        """The float32 gradient of a part while it is being stepped, 1-D."""

    def weights(self, part: int) -> Tensor:
        """The float32 weights of a part on this rank, 1-D.

        Raises:
            NotImplementedError: where updates cannot be clipped.
        """
        raise NotImplementedError

    def pieces_of(self, part: int, flat: Tensor) -> list[Tensor]:
        """The pieces of a part in flat memory of its size."""
        return [flat.narrow(0, piece.start, piece.length) for piece in self.parts[part]]

    def all_weights(self) -> list[Tensor]:
        """The float32 weights of every piece of every part, flat, in the order of `parts`."""
        return [piece for i, there in enumerate(self.parts) if there for piece in self.pieces_of(i, self.weights(i))]

    def group_of(self, part: int) -> int:
        """The optimizer's parameter group of a part."""
        return part

    def publish(self, part: int) -> None:
        """Copy a part's float32 weights to where the model has its own, again."""
        raise NotImplementedError

    @property
    def loss_scale(self) -> float:
        """What the gradients are multiplied by before the unscale seam."""
        return float(self.zero.loss_scale)

    @property
    def group(self) -> Any:
        """The ranks over which the pieces add up to the whole; None where each rank holds everything."""
        return self.zero.dp_process_group


class Stage12(Partition):
    """DeepSpeedZeroOptimizer: stages 1 and 2, with or without CPU offload."""

    kind = "ZeRO-1/2 partitions"

    def _find_parts(self, places: dict[int, int]) -> list[list[Piece]]:
        # Not through p._hp_mapping, which does not follow round_robin_gradients.
        zero, parts = self.zero, []
        for i, params in enumerate(zero.params_in_partition):
            rank = dist.get_rank(group=zero.real_dp_process_group[i])
            size = int(zero.partition_size[i])
            pieces = []
            for p in params:
                key = zero.get_param_id(p)
                start = int(zero.grad_partition_insertion_offset[i][rank][key])
                skipped = int(zero.grad_start_offset[i][rank][key])
                pieces.append(Piece(places[id(p)], start, min(p.numel() - skipped, size - start), skipped))
            parts.append([piece for piece in pieces if piece.length > 0])
        return parts

    def measured(self) -> list[Tensor | None]:
        """See Partition."""
        memory: list[Tensor | None] = []
        for i, pieces in enumerate(self.parts):
            if not pieces:
                continue  # a small group leaves some ranks with padding only
            if self.zero.cpu_offload:
                memory += self.pieces_of(i, self.flat(i))
            else:
                grads = [g for g in self.zero.averaged_gradients[i] if not getattr(g, "_zero_padding", False)]
                memory += [_exactly(g, piece) for g, piece in zip(grads[: len(pieces)], pieces, strict=True)]
        return memory

    def flat(self, part: int) -> Tensor:
        """See Partition."""
        return self.zero.single_partition_of_fp32_groups[part].grad

    def weights(self, part: int) -> Tensor:
        """See Partition."""
        return self.zero.single_partition_of_fp32_groups[part].data

    def publish(self, part: int) -> None:
        """See Partition."""
        rank = dist.get_rank(group=self.zero.real_dp_process_group[part])
        self.zero.parallel_partitioned_bit16_groups[part][rank].data.copy_(self.weights(part))


def _exactly(grad: Tensor, piece: Piece) -> Tensor:
    """The flat memory of a piece, which DeepSpeed's list may follow with padding that it does not mark."""
    if grad.numel() != piece.length:
        raise RuntimeError(
            f"DeepSpeed holds {grad.numel()} elements where parameter {piece.parameter} has {piece.length}."
        )
    return grad.reshape(-1)


class Stage3(Partition):
    """DeepSpeedZeroOptimizer_Stage3, with or without CPU offload."""

    kind = "ZeRO-3 partitions"

    def _find_parts(self, places: dict[int, int]) -> list[list[Piece]]:
        zero = self.zero
        rank = dist.get_rank(group=zero.dp_process_group)
        parts = []
        for group in zero.fp16_groups:
            pieces = []
            for p in group:
                _, start, size = zero.grad_position[zero.get_param_id(p)]
                real = max(0, min(size, p.ds_numel - rank * size))  # the last shard is padded
                pieces.append(Piece(places[id(p)], int(start), int(real), rank * int(size)))
            parts.append(pieces)
        return parts

    def measured(self) -> list[Tensor | None]:
        """See Partition."""
        memory: list[Tensor | None] = []
        for i, pieces in enumerate(self.parts):
            if self.zero.offload_optimizer:
                memory += self.pieces_of(i, self.flat(i))
            else:
                grads = self.zero.averaged_gradients[i]
                memory += [g.reshape(-1)[: piece.length] for g, piece in zip(grads, pieces, strict=True)]
        return memory

    def flat(self, part: int) -> Tensor:
        """See Partition."""
        return self.zero.fp32_partitioned_groups_flat[part].grad

    def weights(self, part: int) -> Tensor:
        """See Partition."""
        return self.zero.fp32_partitioned_groups_flat[part].data

    def group_of(self, part: int) -> int:
        """See Partition."""
        return int(self.zero.sub_group_to_group_id[part])

    def publish(self, part: int) -> None:
        """See Partition."""
        self.zero._reassign_or_swap_out_partitioned_parameters(part)


class Bf16(Partition):
    """BF16_Optimizer: stage 1 with float32 accumulation, where every rank holds the whole reduced gradient."""

    kind = "whole float32 gradients under ZeRO-1"

    def _find_parts(self, places: dict[int, int]) -> list[list[Piece]]:
        return [[Piece(places[id(p)], 0, p.numel(), 0) for p in group] for group in self.zero.bf16_groups]

    def measured(self) -> list[Tensor | None]:
        """See Partition."""
        memory: list[Tensor | None] = []
        for grads, there in zip(self.zero.fp32_groups_gradients, self.zero.fp32_groups_has_gradients, strict=True):
            memory += [g.view(-1) if has else None for g, has in zip(grads, there, strict=True)]
        return memory

    def flat(self, part: int) -> Tensor:
        """There is none."""
        raise AssertionError("BF16_Optimizer has no part-wise seam: its gradients are scaled all at once")

    def all_weights(self) -> list[Tensor]:
        """The weights of the model, which every rank holds whole."""
        return [p.detach().view(-1) for group in self.zero.bf16_groups for p in group]

    @property
    def loss_scale(self) -> float:
        """Gradients in float32 are never scaled."""
        return 1.0

    @property
    def group(self) -> Any:
        """Every rank holds everything, so nothing is added up."""
        return None


class Moved(Partition):
    """The same pieces of what a step did to the weights: memory that is put here part by part.

    Args:
        of: where the gradients are.
    """

    def __init__(self, of: Partition) -> None:
        self.of = of
        self.zero = of.zero
        self.parts = of.parts
        self.kind = of.kind
        self.memory: dict[int, Tensor] = {}

    def _find_parts(self, places: dict[int, int]) -> list[list[Piece]]:
        return self.parts

    def measured(self) -> list[Tensor | None]:
        """See Partition."""
        return [
            self.memory[i].narrow(0, piece.start, piece.length) if i in self.memory else None
            for i, pieces in enumerate(self.parts)
            for piece in pieces
        ]

    def flat(self, part: int) -> Tensor:
        """See Partition."""
        return self.memory[part]

    @property
    def loss_scale(self) -> float:
        """Weights are never scaled."""
        return 1.0


class ZeroView(GradientView):
    """The pieces of all gradients that this rank holds under ZeRO.

    Args:
        module: the model, for the parameters' names.
        zero: its ZeRO optimizer.
        partition: where that kind of optimizer keeps the pieces.
        device: where the job's collectives and the statistics are.
        guarded: True if the optimizer's dynamic loss scale explains a skipped step.
    """

    def __init__(
        self, module: nn.Module, zero: Any, partition: type[Partition], device: torch.device, guarded: bool
    ) -> None:
        self._module = module
        self._named = [(name, p) for name, p in named_parameters(module) if p.requires_grad]
        self._shapes = [tuple(getattr(p, "ds_shape", p.shape)) for _, p in self._named]
        self._partition = partition(zero, {id(p): i for i, (_, p) in enumerate(self._named)})
        self._device = device
        self._guarded = guarded
        self.skipping = False
        self._cut(None)

    def _cut(self, axes: list[tuple[int, ...] | None] | None) -> None:
        division = Division([name for name, _ in self._named], self._shapes, axes, self._device)
        parts = self._partition.parts
        pieces = [piece for part in parts for piece in part]
        self._layout = division.layout
        self._held = Held(self._layout, _cuts(division, pieces))
        self._held_by_part = [Held(self._layout, _cuts(division, part)) for part in parts]

    def divide(self, units: Units) -> None:
        """See GradientView."""
        self._cut(axes_of(self._module, self._named, self._shapes, units))

    @property
    def layout(self) -> Layout:
        """The segments of the trainable parameters, sized as if they were whole."""
        return self._layout

    @property
    def backend(self) -> str:
        """For the start-up line."""
        return f"{self._partition.kind}, {len(self._partition.parts)} part(s) to step, {self._layout.device.type}"

    @property
    def loss_scale(self) -> float:
        """What DeepSpeed has multiplied the gradients by."""
        return self._partition.loss_scale

    @property
    def guarded(self) -> bool:
        """True if DeepSpeed's dynamic loss scale explains a skipped step."""
        return self._guarded

    def reductions(self, needs: Needs) -> int:
        """One, and one more with `max_abs`; none where every rank holds everything."""
        return 0 if self._partition.group is None else 2 if needs.max_abs else 1

    @torch.no_grad()
    def measure(self, needs: Needs, rescale: bool = False) -> NormStats:
        """Norms of the whole gradients, from local pieces and one all-reduce (two with `max_abs`)."""
        scale, group = self._partition.loss_scale, self._partition.group
        weights = self._partition.all_weights() if needs.weights else None
        local = self._held.measure(self._partition.measured(), weights, needs, rescale)
        sums = [local.sumsq_S / scale**2]
        if local.weight_sumsq_S is not None:
            sums.append(local.weight_sumsq_S)
        sums_S = torch.stack(sums)
        max_abs_S = None if local.max_abs_S is None else local.max_abs_S / scale
        if group is not None:
            dist.all_reduce(sums_S, group=group)
            if max_abs_S is not None:
                dist.all_reduce(max_abs_S, dist.ReduceOp.MAX, group=group)
        return NormStats(sums_S[0], self._layout, max_abs_S, weight_sumsq_S=sums_S[1] if len(sums) > 1 else None)

    @torch.no_grad()
    def apply_(self, plan: ClipPlan, part: int | None = None) -> None:
        """Scale, then bound, one part in its float32 memory, or all gradients before the step."""
        if part is None:
            self._held.apply_(self._partition.measured(), plan)
        else:
            self._held_by_part[part].apply_(self._partition.pieces_of(part, self._partition.flat(part)), plan)

    def of_updates(self) -> tuple[ZeroView, Moved]:
        """A view of the same pieces of the updates, and the memory to put them in."""
        view = copy.copy(self)
        view._partition = moved = Moved(self._partition)
        view._guarded = False
        return view, moved

    def drop_(self) -> None:
        """Let the coming parts be left alone; whoever steps them reads `skipping`."""
        self.skipping = True


def _cuts(division: Division, pieces: Sequence[Piece]) -> list[Cut]:
    """The cuts of pieces that lie in one flat tensor each."""
    return [
        cut for i, piece in enumerate(pieces) for cut in division.run(piece.parameter, i, piece.offset, piece.length)
    ]

"""Where each kind of DeepSpeed's ZeRO optimizers keeps its pieces of the gradients and weights on this rank.

A kind is one class: what DeepSpeed calls it, which of its attributes are used, and what they mean. This file reads them
and imports nothing of DeepSpeed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's elements: `length` from `offset` in the parameter, from `start` in a part's memory."""

    parameter: int
    start: int
    length: int
    offset: int


class Partition(ABC):
    """Pieces of parameters on this rank, in parts that are stepped one after another.

    Attributes:
        words: a few, for the start-up line.
        parts: the pieces of every part, in the order in which they are stepped.
    """

    words: str
    parts: list[list[Piece]]

    @abstractmethod
    def measured(self) -> list[Tensor | None]:
        """The memory of every piece of every part before the step, flat, in the order of `parts`."""

    @abstractmethod
    def flat(self, part: int) -> Tensor:
        """The float32 memory of a part while it is being stepped, 1-D."""

    def pieces_of(self, part: int, flat: Tensor) -> list[Tensor]:
        """The pieces of a part in flat memory of its size."""
        return [flat.narrow(0, piece.start, piece.length) for piece in self.parts[part]]


class Kind(Partition):
    """The gradients under one kind of ZeRO optimizer.

    Args:
        zero: the ZeRO optimizer.
        numbers: the number of each trainable parameter, by `id`.
    """

    of: ClassVar[str]
    """The name of DeepSpeed's class."""
    needed: ClassVar[str]
    """The attributes of it that clipping gradients uses, here and where it is hooked into."""
    is_whole: ClassVar[bool] = False
    """Whether every rank holds everything, so that nothing is added up."""
    is_scaled: ClassVar[bool] = True
    """Whether a loss scale is in the gradients before the step."""

    def __init__(self, zero: Any, numbers: dict[int, int]) -> None:
        self.zero = zero
        self.parts = self._find_parts(numbers)

    @classmethod
    def missing(cls, zero: Any) -> list[str]:
        """Which of the attributes that are used an optimizer does not have."""
        return [word for word in cls.needed.split() if not hasattr(zero, word)]

    @abstractmethod
    def _find_parts(self, numbers: dict[int, int]) -> list[list[Piece]]:
        """The pieces of every part, in the order in which they are stepped."""

    @abstractmethod
    def weights(self, part: int) -> Tensor:
        """The float32 weights of a part on this rank, 1-D."""

    @abstractmethod
    def publish(self, part: int) -> None:
        """Copy a part's float32 weights to where the model has its own, again."""

    def group_of(self, part: int) -> int:
        """The optimizer's parameter group of a part."""
        return part

    def all_weights(self) -> list[Tensor]:
        """The float32 weights of every piece of every part, flat, in the order of `parts`."""
        return [piece for i, there in enumerate(self.parts) if there for piece in self.pieces_of(i, self.weights(i))]

    def loss_scale(self) -> float:
        """What the gradients are multiplied by before the unscale seam."""
        return float(self.zero.loss_scale)


@final
class Stage12(Kind):
    """Stages 1 and 2, with or without CPU offload."""

    of = "DeepSpeedZeroOptimizer"
    words = "ZeRO-1/2 partitions"
    needed = (
        "scaled_global_norm unscale_and_clip_grads _optimizer_step step params_in_partition averaged_gradients "
        "grad_partition_insertion_offset grad_start_offset partition_size single_partition_of_fp32_groups clip_grad "
        "real_dp_process_group dp_process_group get_param_id cpu_offload loss_scale"
    )

    def _find_parts(self, numbers: dict[int, int]) -> list[list[Piece]]:
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
                pieces.append(Piece(numbers[id(p)], start, min(p.numel() - skipped, size - start), skipped))
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
                continue
            grads = [g for g in self.zero.averaged_gradients[i] if not getattr(g, "_zero_padding", False)]
            grads = grads[: len(pieces)]  # padding may follow that is not marked
            held, known = [*map(Tensor.numel, grads)], [piece.length for piece in pieces]
            if held != known:
                raise RuntimeError(f"DeepSpeed holds {held} elements of parameters that have {known} here.")
            memory += [g.reshape(-1) for g in grads]
        return memory

    def flat(self, part: int) -> Tensor:
        """See Partition."""
        return self.zero.single_partition_of_fp32_groups[part].grad

    def weights(self, part: int) -> Tensor:
        """See Kind."""
        return self.zero.single_partition_of_fp32_groups[part].data

    def publish(self, part: int) -> None:
        """See Kind."""
        rank = dist.get_rank(group=self.zero.real_dp_process_group[part])
        self.zero.parallel_partitioned_bit16_groups[part][rank].data.copy_(self.weights(part))


@final
class Stage3(Kind):
    """Stage 3, with or without CPU offload."""

    of = "DeepSpeedZeroOptimizer_Stage3"
    words = "ZeRO-3 partitions"
    needed = (
        "_get_norm_groups unscale_and_clip_grads _optimizer_step step grad_position fp16_groups averaged_gradients "
        "fp32_partitioned_groups_flat clip_grad dp_process_group get_param_id offload_optimizer loss_scale"
    )

    def _find_parts(self, numbers: dict[int, int]) -> list[list[Piece]]:
        zero = self.zero
        rank = dist.get_rank(group=zero.dp_process_group)
        parts = []
        for group in zero.fp16_groups:
            pieces = []
            for p in group:
                _, start, size = zero.grad_position[zero.get_param_id(p)]
                real = max(0, min(size, p.ds_numel - rank * size))  # the last shard is padded
                pieces.append(Piece(numbers[id(p)], int(start), int(real), rank * int(size)))
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
        """See Kind."""
        return self.zero.fp32_partitioned_groups_flat[part].data

    def publish(self, part: int) -> None:
        """See Kind."""
        self.zero._reassign_or_swap_out_partitioned_parameters(part)

    def group_of(self, part: int) -> int:
        """See Kind."""
        return int(self.zero.sub_group_to_group_id[part])


@final
class Bf16(Kind):
    """Stage 1 with float32 accumulation, where every rank holds the whole reduced gradient, without a loss scale."""

    of = "BF16_Optimizer"
    words = "whole float32 gradients under ZeRO-1"
    needed = "step bf16_groups fp32_groups_gradients fp32_groups_has_gradients clear_hp_grads clear_lp_grads clip_grad"
    is_whole = True
    is_scaled = False

    def _find_parts(self, numbers: dict[int, int]) -> list[list[Piece]]:
        return [[Piece(numbers[id(p)], 0, p.numel(), 0) for p in group] for group in self.zero.bf16_groups]

    def measured(self) -> list[Tensor | None]:
        """See Partition."""
        memory: list[Tensor | None] = []
        for grads, there in zip(self.zero.fp32_groups_gradients, self.zero.fp32_groups_has_gradients, strict=True):
            memory += [g.view(-1) if has else None for g, has in zip(grads, there, strict=True)]
        return memory

    def all_weights(self) -> list[Tensor]:
        """The weights of the model, which every rank holds whole."""
        return [p.detach().view(-1) for group in self.zero.bf16_groups for p in group]

    def flat(self, part: int) -> Tensor:
        """There is none."""
        raise AssertionError("BF16_Optimizer has no part-wise seam: its gradients are scaled all at once")

    def weights(self, part: int) -> Tensor:
        """Not looked for: updates are refused."""
        raise NotImplementedError

    def publish(self, part: int) -> None:
        """Not looked for: updates are refused."""
        raise NotImplementedError


KINDS: dict[str, type[Kind]] = {kind.of: kind for kind in (Stage12, Stage3, Bf16)}
"""The kinds that are known, by the name of DeepSpeed's class."""


@final
class Moved(Partition):
    """The same pieces of what a step did to the weights: memory that is put here part by part.

    Args:
        gradients: where the gradients are.

    Attributes:
        memory: the update of each part that has been stepped, 1-D, by its number.
    """

    def __init__(self, gradients: Kind) -> None:
        self.gradients = gradients
        self.words = gradients.words
        self.parts = gradients.parts
        self.memory: dict[int, Tensor] = {}

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

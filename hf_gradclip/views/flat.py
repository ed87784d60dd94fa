"""FSDP1: gradients flattened into shards whose cuts do not follow the parameters, so only the whole has a norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from hf_gradclip.strategy import Needs, Units
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views.here import Here, Place
from hf_gradclip.views.plain import Plain
from hf_gradclip.views.ranks import Ranks
from hf_gradclip.views.view import UnsupportedBackendError


@final
class Flat(Here):
    """The whole gradient of an FSDP1 model as one segment, from this rank's flat shards.

    Args:
        model: wrapped by FullyShardedDataParallel, with one process group and one sharding strategy throughout.

    Attributes:
        ranks: over which the shards add up; None where nothing is sharded.

    Raises:
        ValueError: if no parameter is trainable.
    """

    whole_only = True

    def __init__(self, model: nn.Module) -> None:
        self._shards = Plain(model, flattened=True)
        numel = self._shards.layout.numel_S.sum()
        root = next(m for m in model.modules() if isinstance(m, FullyShardedDataParallel))
        sharded = root.sharding_strategy != ShardingStrategy.NO_SHARD
        self.ranks = Ranks(root.compute_device or numel.device, root.process_group) if sharded else None
        if self.ranks is not None:  # ranks hold unequal parts of the original parameters
            numel = self.ranks.all_reduce(numel, dist.ReduceOp.SUM)
        self._places: dict[int, Place] = {}
        self.layout = Layout.of_parameters(("all parameters",), [int(numel)], numel.device)

    @property
    def backend(self) -> str:
        """See Here."""
        return f"flat FSDP1 shards as one whole, {self.layout.device.type}"

    def look(self) -> Layout:
        """See Here; whatever is trained, it is one segment."""
        self._shards.look()
        return self.layout

    def divide(self, units: Units) -> None:
        """See Here."""
        raise UnsupportedBackendError(f"{self.backend}: its memory is not known by unit. Use FSDP2 or DDP.")

    def watched(self) -> Sequence[Tensor]:
        """See Here."""
        return self._shards.watched()

    def places(self) -> dict[int, Place]:
        """See Here."""
        shards = self._shards.places()
        if self._places.keys() != shards.keys():
            self._places = dict.fromkeys(shards, (0, None))
        return self._places

    def measure(self, needs: Needs, rescale: bool) -> NormStats:
        """See Here."""
        local = self._shards.measure(needs, rescale)
        largest_S, weights_S = local.max_abs_S, local.weight_sumsq_S
        return NormStats(
            local.sumsq_S.sum().view(1),
            self.layout,
            None if largest_S is None else largest_S.amax().view(1),
            weight_sumsq_S=None if weights_S is None else weights_S.sum().view(1),
        )

    def apply_(self, plan: ClipPlan, part: int | None) -> None:
        """See Here; there are no parts."""
        bound_S = None if plan.bound_S is None else plan.bound_S.expand(len(self._shards.layout))
        self._shards.apply_(replace(plan, scale_S=plan.scale_S.expand(1)[0], bound_S=bound_S), part)

    def drop_(self) -> bool:
        """See Here."""
        return self._shards.drop_()

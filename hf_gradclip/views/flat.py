"""FSDP1: gradients flattened into shards whose cuts do not follow the parameters, so only the whole has a norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from hf_gradclip.strategy import Needs
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views.parameters import Parameters
from hf_gradclip.views.view import GradientView


class FlatView(GradientView):
    """The whole gradient of an FSDP1 model as one segment, from this rank's flat shards.

    Args:
        model: wrapped by FullyShardedDataParallel, with one process group and one sharding strategy throughout.
        unscale: called before each measurement, to take a loss scale out of the gradients.
        guarded: True if a GradScaler skips the steps with a non-finite gradient.

    Raises:
        ValueError: if no parameter is trainable.
    """

    whole_only = True

    def __init__(self, model: nn.Module, unscale: Callable[[], None] | None = None, guarded: bool = False) -> None:
        self.parameters = Parameters(model)
        self._unscale = unscale
        self._guarded = guarded
        root = next(m for m in model.modules() if isinstance(m, FullyShardedDataParallel))
        self._sharded = root.sharding_strategy != ShardingStrategy.NO_SHARD
        self._group = root.process_group
        parts = self.parameters.layout
        numel = parts.numel_S.sum()
        if self._sharded:
            dist.all_reduce(numel, group=self._group)  # ranks hold unequal parts of the original parameters
        self._layout = Layout.of_parameters(("all parameters",), [int(numel)], parts.device)

    @property
    def layout(self) -> Layout:
        """One segment: everything."""
        return self._layout

    @property
    def backend(self) -> str:
        """For the start-up line."""
        return f"flat FSDP1 shards as one whole, {self._layout.device.type}"

    @property
    def guarded(self) -> bool:
        """True if a GradScaler skips the steps with a non-finite gradient."""
        return self._guarded

    def watched(self) -> Sequence[Tensor]:
        """The trainable parameters."""
        return self.parameters.watched()

    def reductions(self, needs: Needs) -> int:
        """One, and one more with `max_abs`; none where nothing is sharded."""
        return 0 if not self._sharded else 2 if needs.max_abs else 1

    @torch.no_grad()
    def measure(self, needs: Needs, rescale: bool = False) -> NormStats:
        """The norm of everything, from local shards."""
        if self._unscale is not None and not rescale:
            self._unscale()
        local = self.parameters.measure(needs, rescale)
        sumsq_S = local.sumsq_S.sum().view(1)
        max_abs_S = None if local.max_abs_S is None else local.max_abs_S.amax().view(1)
        if self._sharded:
            dist.all_reduce(sumsq_S, group=self._group)
            if max_abs_S is not None:
                dist.all_reduce(max_abs_S, dist.ReduceOp.MAX, group=self._group)
        return NormStats(sumsq_S, self._layout, max_abs_S)

    @torch.no_grad()
    def apply_(self, plan: ClipPlan, part: int | None = None) -> None:
        """Scale, then bound, the local shards."""
        count = len(self.parameters.trainable)
        bound_S = None if plan.bound_S is None else plan.bound_S.expand(count)
        self.parameters.apply_(ClipPlan(plan.scale_S.expand(1)[0], bound_S))

    def drop_(self) -> None:
        """Set every gradient to None."""
        self.parameters.drop_()

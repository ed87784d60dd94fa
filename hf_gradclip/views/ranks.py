"""How what is here adds up over ranks: by one all-reduce of sums, and a second, declared one of largest elements."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hf_gradclip.device import moved
from hf_gradclip.strategy import Needs
from hf_gradclip.types import NormStats


@dataclass(frozen=True)
class Ranks:
    """Processes of which each holds some of the numbers that add up to those of the whole model.

    Args:
        device: where their collectives run; the gradients may be offloaded from it.
        group: of these processes; None for all of the job.
    """

    device: torch.device
    group: dist.ProcessGroup | None = None

    def reductions(self, needs: Needs) -> int:
        """How many all-reduces `reduce` costs: one, and one more with `max_abs`."""
        return 2 if needs.max_abs else 1

    def reduce(self, local: NormStats, owned_S: Tensor | None) -> NormStats:
        """The statistics of all ranks, the same on each.

        Args:
            local: of this process alone; left as it is.
            owned_S: which segments this process adds to the sums, bool, shape (S,), so that what several ranks hold
                counts once; None for all.
        """
        sums, largest_S = [local.sumsq_S], local.max_abs_S
        if local.weight_sumsq_S is not None:
            sums.append(local.weight_sumsq_S)
        sums_KS = torch.stack(sums)
        if owned_S is not None:
            sums_KS = torch.where(owned_S, sums_KS, 0.0)
        sums_KS = self.all_reduce(sums_KS, dist.ReduceOp.SUM)
        return NormStats(
            sums_KS[0],
            local.layout,
            None if largest_S is None else self.all_reduce(largest_S.clone(), dist.ReduceOp.MAX),
            weight_sumsq_S=sums_KS[1] if len(sums) > 1 else None,
        )

    def all_reduce(self, numbers: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """Numbers of all ranks together, on the device they came from; `numbers` itself may be written."""
        there = moved(numbers, self.device)
        dist.all_reduce(there, op, group=self.group)
        return moved(there, numbers.device)


def spread_of(norm: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """(largest - smallest) / largest of a number >= 0 over the ranks of a group, 0-d; NaN and inf compare equal.

    Args:
        norm: the number of this process, 0-d.
        group: the ranks; None for all of the job.
        device: where their collectives run, and the result is.
    """
    number = norm.nan_to_num(nan=1.0, posinf=1.0).to(device)
    ends = torch.stack([number, -number])
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=group)
    return ends.sum() / ends[0].clamp(min=torch.finfo(ends.dtype).tiny)

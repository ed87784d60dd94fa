"""Sharded gradients as DTensors: FSDP2, HSDP, tensor parallel, both, and plain tensors beside them.

Each rank measures its own shards. Of several ranks that hold the same numbers one contributes and the others give
zeros, so one SUM all-reduce of S floats over the whole job gives every rank the same statistics. No gradient is
gathered. Scaling is local.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from hf_gradclip.kernels.table import upload
from hf_gradclip.strategy import Needs, Units
from hf_gradclip.types import ClipPlan, Layout, NormStats
from hf_gradclip.views.parameters import Parameters, Watched, spread_of
from hf_gradclip.views.view import GradientView


class DTensorView(GradientView):
    """The shards of every trainable parameter's gradient, on this rank.

    Args:
        model: or named parameters, with DTensors of one mesh or several; plain ones count as replicated over the job.
        unscale: called before each measurement, to take a loss scale out of the gradients.
        guarded: True if a GradScaler skips the steps with a non-finite gradient.

    Raises:
        ValueError: if a parameter is placed in a way whose norm cannot be added up from shards.
    """

    def __init__(self, model: Watched, unscale: Callable[[], None] | None = None, guarded: bool = False) -> None:
        self.parameters = Parameters(model, place)
        self._unscale = unscale
        self._guarded = guarded
        self._owned_for: Layout | None = None
        self._owned_S = self._find_owned()
        self._local_S = torch.zeros(len(self.layout), dtype=self.layout.dtype, device=self.layout.device)

    @property
    def layout(self) -> Layout:
        """The segments of the trainable parameters, sized as if they were whole."""
        return self.parameters.layout

    @property
    def backend(self) -> str:
        """For the start-up line."""
        meshes = {p.device_mesh for p in self.parameters.trainable if isinstance(p, DTensor)}
        shapes = " and ".join(sorted("x".join(str(n) for n in mesh.shape) for mesh in meshes))
        return f"DTensor shards on a {shapes} mesh, {self.layout.device.type}"

    @property
    def guarded(self) -> bool:
        """True if a GradScaler skips the steps with a non-finite gradient."""
        return self._guarded

    def divide(self, units: Units) -> None:
        """See GradientView."""
        self.parameters.divide(units)

    def watched(self) -> Sequence[Tensor]:
        """The trainable parameters."""
        return self.parameters.watched()

    def reductions(self, needs: Needs) -> int:
        """One, and one more with `max_abs`."""
        return 2 if needs.max_abs else 1

    @torch.no_grad()
    def measure(self, needs: Needs, rescale: bool = False) -> NormStats:
        """Norms of the whole gradients, from local shards and one all-reduce (two with `max_abs`)."""
        if self._unscale is not None and not rescale:
            self._unscale()
        for parameter in self.parameters.trainable:
            settle_placements(parameter)
        return self.reduce(self.parameters.measure(needs, rescale))

    def reduce(self, local: NormStats) -> NormStats:
        """One all-reduce of the sums, and one of the largest elements."""
        layout = self.layout
        if layout is not self._owned_for:
            self._owned_S = self._find_owned()
        self._local_S = local.sumsq_S
        sums = [local.sumsq_S] if local.weight_sumsq_S is None else [local.sumsq_S, local.weight_sumsq_S]
        owned = torch.where(self._owned_S, torch.stack(sums), 0.0)
        _reduce(owned, dist.ReduceOp.SUM, self._device)
        if local.max_abs_S is not None:
            _reduce(local.max_abs_S, dist.ReduceOp.MAX, self._device)
        return NormStats(owned[0], layout, local.max_abs_S, weight_sumsq_S=owned[1] if len(sums) > 1 else None)

    def spread(self) -> Tensor | None:
        """Over the mesh dimensions that replicate a sharded parameter (HSDP): gradients are reduced along them."""
        spreads = []
        for mesh, dim in self._replicated():
            mine_P = [
                isinstance(p, DTensor) and p.device_mesh == mesh and p.placements[dim].is_replicate()
                for p in self.parameters.trainable
            ]
            mine_S = upload(mine_P, torch.bool, self._local_S.device)[self.layout.param_S]
            norm = torch.where(mine_S, self._local_S, 0.0).sum().sqrt()
            spreads.append(spread_of(norm, mesh.get_group(dim), self._device))
        return torch.stack(spreads).amax() if spreads else None

    def _replicated(self) -> list[tuple[DeviceMesh, int]]:
        """The mesh dimensions that replicate what another one shards, in the order of the parameters."""
        found: list[tuple[DeviceMesh, int]] = []
        for p in self.parameters.trainable:
            if not isinstance(p, DTensor) or all(place.is_replicate() for place in p.placements):
                continue
            here = [(p.device_mesh, dim) for dim, place in enumerate(p.placements) if place.is_replicate()]
            found += [pair for pair in here if pair not in found]
        return found

    def apply_(self, plan: ClipPlan, part: int | None = None) -> None:
        """Scale, then bound, the local shards."""
        with torch.no_grad():
            self.parameters.apply_(plan)

    def drop_(self) -> None:
        """Set every gradient to None."""
        self.parameters.drop_()

    @property
    def _device(self) -> torch.device:
        """Where the job's collectives run; the gradients may be offloaded from it."""
        mesh = next(p.device_mesh for p in self.parameters.trainable if isinstance(p, DTensor))
        kind = mesh.device_type
        return (
            torch.device(kind, torch.get_device_module(kind).current_device()) if kind != "cpu" else torch.device("cpu")
        )

    def _find_owned(self) -> Tensor:
        self._owned_for = self.layout
        named = zip(self.layout.names, self.parameters.trainable, strict=True)
        owned_P = torch.tensor([owns(name, p) for name, p in named], device=self.layout.device)
        return owned_P[self.layout.param_S]


def owns(name: str, parameter: Tensor) -> bool:
    """Whether this rank is the one that contributes the parameter's local numbers to the sum.

    A shard belongs to its rank. Along a mesh dimension that replicates, the first coordinate contributes. A plain
    tensor, or a mesh that covers a part of the job, is held by others too: rank 0 or its mesh contributes.

    Raises:
        ValueError: for a placement that is neither Shard nor Replicate.
    """
    if not isinstance(parameter, DTensor):
        return dist.get_rank() == 0
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None or not bool((mesh.mesh == 0).any()):
        return False
    for place, here in zip(parameter.placements, coordinate, strict=True):
        if isinstance(place, Replicate):
            if here != 0:
                return False
        elif not isinstance(place, (Shard, _StridedShard)):
            raise ValueError(
                f"{name} is placed as {place} on {mesh}: its norm cannot be added up from shards. "
                "Use Shard or Replicate placements."
            )
    return True


def place(parameter: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Where this rank's shard lies in the whole parameter: (offsets, sizes)."""
    if not isinstance(parameter, DTensor):
        return [0] * parameter.ndim, parameter.shape
    sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offsets, sizes


def settle_placements(parameter: Tensor) -> None:
    """Bring a gradient whose placement differs from its parameter's (Partial, say) to the parameter's."""
    grad = parameter.grad
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(parameter.device_mesh, parameter.placements)


def _reduce(vector_S: Tensor, op: dist.ReduceOp.RedOpType, device: torch.device) -> None:
    """All-reduce in place over the whole job, through the device that the job's collectives run on."""
    moved = vector_S.to(device)
    dist.all_reduce(moved, op)
    if moved is not vector_S:
        vector_S.copy_(moved)

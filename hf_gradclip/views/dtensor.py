"""Sharded gradients as DTensors: FSDP2, HSDP, tensor parallel, both, and plain tensors beside them.

Each rank measures its own shards. Of several ranks that hold the same numbers one adds them and the others give zeros,
so one SUM all-reduce of S floats over the whole job gives every rank the same statistics. No gradient is gathered.
Scaling is local.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from hf_gradclip.device import upload
from hf_gradclip.views.here import Replica
from hf_gradclip.views.parameters import Parameters
from hf_gradclip.views.ranks import Ranks
from hf_gradclip.views.units import Shape


@final
class Shards(Parameters):
    """The shards of every trainable parameter's gradient, on this rank.

    Parameters are DTensors of one mesh or several; plain ones count as replicated over the job. The layout is of the
    parameters as if they were whole.

    Args:
        source: see Parameters.

    Raises:
        ValueError: if a parameter is placed in a way whose norm cannot be added up from shards.
    """

    @property
    def backend(self) -> str:
        """See Here."""
        meshes = {p.device_mesh for p in self._sharded}
        shapes = " and ".join(sorted("x".join(str(n) for n in mesh.shape) for mesh in meshes))
        return f"DTensor shards on a {shapes} mesh, {self._device.type}"

    @property
    def ranks(self) -> Ranks:
        """The whole job, whose collectives run on the device of the meshes: gradients may be offloaded from it."""
        if not self._sharded:  # those that are trained are plain, beside frozen shards
            return Ranks(self._device)
        kind = self._sharded[0].device_mesh.device_type
        if kind == "cpu":
            return Ranks(torch.device("cpu"))
        return Ranks(torch.device(kind, torch.get_device_module(kind).current_device()))

    def replicas(self) -> Sequence[Replica]:
        """The mesh dimensions that replicate what another one shards (HSDP): gradients are reduced along them."""
        found: dict[tuple[DeviceMesh, int], Replica] = {}
        parameters = self._trainable.parameters
        for p in self._sharded:
            replicating = [dim for dim, placement in enumerate(p.placements) if placement.is_replicate()]
            for dim in replicating if len(replicating) < len(p.placements) else ():
                if (p.device_mesh, dim) not in found:
                    mine_P = [_replicates(other, p.device_mesh, dim) for other in parameters]
                    mine_S = upload(mine_P, torch.bool, self._device)[self.layout.param_S]
                    found[p.device_mesh, dim] = Replica(p.device_mesh.get_group(dim), mine_S)
        return list(found.values())

    def _take(self, names: Sequence[str], parameters: Sequence[Tensor]) -> list[bool]:
        self._sharded: list[DTensor] = [p for p in parameters if isinstance(p, DTensor)]
        self._unsettled = self._sharded
        return [owns(name, p) for name, p in zip(names, parameters, strict=True)]

    def _box(self, parameter: Tensor) -> tuple[Shape, Shape]:
        if not isinstance(parameter, DTensor):
            return [0] * parameter.ndim, parameter.shape
        mesh, placements = parameter.device_mesh, parameter.placements
        sizes, offsets = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
        return offsets, sizes

    def _settle_(self, parameter: Tensor) -> None:
        """Sequence parallelism leaves gradients that are parts of a sum."""
        settle_placements(parameter)


def owns(name: str, parameter: Tensor) -> bool:
    """Whether this rank is the one that adds the parameter's local numbers to the sum.

    A shard belongs to its rank. Along a mesh dimension that replicates, the first coordinate adds them. A plain tensor,
    or a mesh that covers some ranks of the job, is held by others too: rank 0 or its mesh adds them.

    Raises:
        ValueError: for a placement that is neither Shard nor Replicate.
    """
    if not isinstance(parameter, DTensor):
        return dist.get_rank() == 0
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None or not bool((mesh.mesh == 0).any()):
        return False
    for placement, here in zip(parameter.placements, coordinate, strict=True):
        if isinstance(placement, Replicate):
            if here != 0:
                return False
        elif not isinstance(placement, (Shard, _StridedShard)):
            raise ValueError(
                f"{name} is placed as {placement} on {mesh}: its norm cannot be added up from shards. "
                "Use Shard or Replicate placements."
            )
    return True


def settle_placements(parameter: Tensor) -> None:
    """Bring a gradient whose placement differs from its parameter's (Partial, say) to the parameter's."""
    grad = parameter.grad
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(parameter.device_mesh, parameter.placements)


def _replicates(parameter: Tensor, mesh: DeviceMesh, dim: int) -> bool:
    """Whether a parameter lies on this mesh and is replicated along this dimension of it."""
    if not isinstance(parameter, DTensor):
        return False
    return parameter.device_mesh == mesh and parameter.placements[dim].is_replicate()

"""Gradients that are whole on this process: one device, DDP, DataParallel, a model spread over devices by hand.

Under DDP every rank holds the same reduced gradient, so every rank computes the same numbers and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from hf_gradclip.views.here import Replica
from hf_gradclip.views.parameters import Parameters
from hf_gradclip.views.trainable import Watched
from hf_gradclip.views.units import Shape
from hf_gradclip.views.view import UnsupportedBackendError


@final
class Plain(Parameters):
    """The `.grad` of every trainable parameter, a plain tensor.

    Args:
        source: see Parameters.
        flattened: take the flat shards of FSDP1, of which only all ranks' sums together mean something.

    Raises:
        ValueError: if no parameter is trainable.
        UnsupportedBackendError: for a shard, whose numbers on one rank are not those of the parameter.
    """

    def __init__(self, source: Watched, flattened: bool = False) -> None:
        self._flattened = flattened
        super().__init__(source)

    @property
    def backend(self) -> str:
        """See Here."""
        return f"local gradients on {self._device.type}"

    def replicas(self) -> Sequence[Replica]:
        """All ranks of the job, which under DDP hold the same gradients."""
        alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
        return () if alone else (Replica(None, None),)

    def rows(self, name: str, count: int) -> list[tuple[int, float]]:
        """See View.rows."""
        names = self._trainable.names
        grad = self._trainable.parameters[names.index(name)].grad if name in names else None
        if grad is None or grad.ndim != 2:
            raise ValueError(f"event.rows({name!r}): must name a trained matrix with a gradient.")
        if grad.is_sparse:
            grad = grad.coalesce()
            numbers, norms = grad.indices()[0], grad.values().double().norm(dim=1)
        else:
            norms = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float64)
            numbers = torch.arange(len(norms), device=norms.device)
        found = norms.topk(min(count, len(norms)))
        return list(zip(numbers[found.indices].tolist(), found.values.tolist(), strict=True))

    def _take(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        """Every rank holds everything."""
        for name, p in zip(names, parameters, strict=True):
            if getattr(p, "_fsdp_flattened", False) and not self._flattened:  # set on flat and on original parameters
                raise UnsupportedBackendError(
                    f"{name} is a shard of FSDP1, which does not tell which elements it holds: each rank would clip by "
                    "a norm of its own. Use FSDP2 (fsdp_version: 2), or give the model that is wrapped by "
                    "FullyShardedDataParallel to Clipper.for_model, attach or GradClipTrainer."
                )
            if hasattr(p, "device_mesh"):
                raise UnsupportedBackendError(
                    f"{name} became a DTensor after its clipper was made, so its norm is not known. Make the clipper "
                    "after fully_shard(), parallelize_module() or accelerator.prepare()."
                )

    def _box(self, parameter: Tensor) -> tuple[Shape, Shape]:
        return [0] * parameter.ndim, parameter.shape

"""Memory and the device it is on: copies that nobody waits for, and this process's part of a tensor.

torch itself orders such copies on a device's stream. What must not happen is that the host reads one before it has
arrived; so a copy to the host waits, and every other does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[float] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on a device, without waiting; torch keeps pinned memory from reuse until its copy has ended.

    Args:
        values: numbers, or a tensor of the host; any shape.
        dtype: of the result.
        device: of the result.
    """
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    return host.to(device) if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on another device (and of another dtype), without waiting; only a copy to the host waits."""
    return tensor.to(device, dtype or tensor.dtype, non_blocking=device.type != "cpu")


def number_on(device: torch.device, number: Tensor) -> Tensor:
    """One number, 0-d, on a device; one of the host is filled in there, so that nobody waits for a copy."""
    if number.device == device or not number.is_cpu:
        return number
    return torch.full((), float(number), dtype=number.dtype, device=device)


def refuse_capture(call: str, device: torch.device) -> None:
    """Stop where a CUDA graph is captured: what changes from step to step would be frozen in it, without a word.

    Args:
        call: as a message says it.
        device: of the work.

    Raises:
        RuntimeError: while the current stream captures.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{call} in a CUDA graph: a capture would freeze learning rate, bias corrections and the addresses of the "
            "gradients, which change from step to step. Capture forward and backward, and clip and step outside."
        )


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context in which kernels are launched on this device; Triton takes the current one."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: of a DTensor its shard, of any other the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

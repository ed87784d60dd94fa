"""Gradients of parameters as memory of this process that may be scaled in place, and their statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_gradclip import kernels
from hf_gradclip.device import local
from hf_gradclip.kernels.eager import whole
from hf_gradclip.views.view import UnsupportedBackendError


def gradients_of(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each as contiguous memory that may be scaled in place, see `writable`.

    In the usual case no Python runs per gradient, a quarter of the time where there are hundreds of small ones.
    """
    grads = _usual(parameters)
    return [writable(parameter) for parameter in parameters] if grads is None else grads


def blocks_of(names: Sequence[str], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of each in its logical shape, without gaps; of a DTensor the local shard.

    A complex one is shown as its real numbers, along one more axis.

    Raises:
        UnsupportedBackendError: for a sparse gradient, by the name of its parameter.
    """
    grads = _usual(parameters)
    if grads is not None:
        return grads
    for name, parameter in zip(names, parameters, strict=True):
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise UnsupportedBackendError(
                f"{name} has a sparse gradient, which has no units. Use sparse=False in nn.Embedding, or a "
                "strategy of whole parameters."
            )
        writable(parameter)  # one with gaps is replaced
    return [None if p.grad is None else shaped(p.grad) for p in parameters]


def _usual(parameters: Sequence[Tensor]) -> list[Tensor | None] | None:
    """The gradients of this process where each is real, dense and contiguous; else None."""
    grads = [parameter.grad for parameter in parameters]
    present = [grad for grad in grads if grad is not None]
    if not set(map(type, present)) <= {Tensor}:
        grads = [None if grad is None else local(grad) for grad in grads]
        present = [grad for grad in grads if grad is not None]
        if not set(map(type, present)) <= {Tensor}:
            return None
    if not all(map(Tensor.is_contiguous, present)) or any(map(Tensor.is_complex, present)):  # a sparse one is not
        return None
    return grads


def writable(parameter: Tensor) -> Tensor | None:
    """The gradient as contiguous memory that may be scaled in place; None where it is missing.

    A sparse gradient is coalesced first, one whose elements share memory or leave gaps is made contiguous. Of a
    DTensor it is the local shard.
    """
    grad = parameter.grad
    if grad is None:
        return None
    if hasattr(grad, "to_local"):
        return whole.flat(grad.to_local())
    if grad.is_sparse:
        if not grad.is_coalesced():
            parameter.grad = grad = grad.coalesce()
        grad = grad._values()
    memory = whole.flat(grad)
    if memory is None:
        parameter.grad = grad.contiguous()
        memory = whole.flat(parameter.grad)
    return memory


def shaped(tensor: Tensor) -> Tensor:
    """This process's part of a tensor in its logical shape; of a complex one the real numbers, along one more axis."""
    tensor = local(tensor)
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def measure(
    grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device, max_abs: bool, rescale: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of squares and, if asked for or for `rescale`, largest absolute element of each gradient, this process's.

    Args:
        grads: contiguous, or None where missing.
        dtype: of the results.
        device: of the results.
        max_abs: whether the largest elements are asked for.
        rescale: divide by the largest element before squaring, for gradients whose squares overflow.

    Returns:
        Each of shape (len(grads),); a missing gradient gives 0.
    """
    if not rescale:
        return kernels.statistics(grads, dtype, device, max_abs)
    largest_S = whole.largest(grads, dtype, device)
    divisor_S = whole.divisors(largest_S)
    return whole.sumsq(grads, divisor_S, dtype, device) * divisor_S.square(), largest_S

"""A drop-in for `torch.nn.utils.clip_grad_norm_` on this package's kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hf_gradclip import kernels
from hf_gradclip.misuse import listed
from hf_gradclip.strategy import torch_scale
from hf_gradclip.types import statistics_dtype
from hf_gradclip.views.gradients import gradients_of, measure


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the norm of all gradients together, in place.

    Same signature and results as `torch.nn.utils.clip_grad_norm_`, with three differences. The norm is taken in
    float32 rows and float64 sums whatever the gradients' dtype. On the CPU, float32 elements whose squares overflow
    (1e20) do not turn it into inf. On the CPU nothing is written when nothing is clipped. Other norm types than 2 and
    inf, sharded gradients, and complex ones with inf, are handed to torch.

    Args:
        parameters: tensors with `.grad`, or one tensor; missing gradients count as zero.
        max_norm: the limit.
        norm_type: order of the norm.
        error_if_nonfinite: raise instead of scaling by a NaN or inf norm. Reads the norm to the host.
        foreach: handed to torch for the orders it computes.

    Returns:
        The norm before clipping, 0-d, float32 (float64 if a gradient is float64), on the first gradient's device.

    Raises:
        TypeError: for a model, or named parameters, in the place of its parameters.
        RuntimeError: if `error_if_nonfinite` and the norm is NaN or inf.
    """
    given, parameters = parameters, listed(parameters, "clip_grad_norm_")
    if isinstance(given, Iterator) and not parameters:  # torch warns of a generator, not of a filter or a chain
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
    order = float(norm_type)
    present = [p for p in parameters if p.grad is not None]
    if order not in (2.0, float("inf")) or any(_is_torchs(p.grad, order) for p in present if p.grad is not None):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    if not present:
        return torch.tensor(0.0)

    grads = gradients_of(present)
    device = next(p.grad.device for p in present if p.grad is not None)
    dtype = statistics_dtype(device)
    if order == 2.0:
        norm = measure(grads, dtype, device, max_abs=False, rescale=False)[0].sum().sqrt()
        if device.type == "cpu" and not norm.isfinite():
            norm = measure(grads, dtype, device, max_abs=False, rescale=True)[0].sum().sqrt()
    else:
        norm = _largest(grads, dtype, device).amax()
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {order} for gradients from `parameters` is non-finite, so it cannot be clipped: "
            f"it is {float(norm)}. Set error_if_nonfinite=False to scale them by it anyway."
        )
    scale = torch_scale(float(max_norm), norm)
    if not scale.is_cpu or float(scale) != 1.0:  # on a CPU the number is there to look at
        kernels.apply_(grads, scale, None)
    wide = any(grad is not None and grad.dtype == torch.float64 for grad in grads)
    return norm.to(torch.float64 if wide else torch.float32)


def _is_torchs(grad: Tensor, order: float) -> bool:
    """Whether a gradient is handed to torch: a sharded one, and the largest of complex numbers."""
    return hasattr(grad, "device_mesh") or (grad.is_complex() and order != 2.0)


def _largest(grads: list[Tensor | None], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Largest absolute element per gradient, shape (len(grads),), where NaN stays NaN as in torch."""
    sumsq_S, max_S = kernels.statistics(grads, dtype, device, max_abs=True)
    assert max_S is not None
    return torch.where(sumsq_S.isnan(), sumsq_S, max_S)

"""What reads and scales memory: plain torch on every device, or Triton on a GPU where it is asked for.

`HF_GRADCLIP_KERNELS=triton` chooses the Triton kernels for gradients on a GPU, `eager` (the default) plain torch. Where
Triton is missing, fails, or does not take a gradient's dtype, plain torch serves; the first two are said once.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from hf_gradclip.kernels import eager

VARIABLE = "HF_GRADCLIP_KERNELS"

logger = logging.getLogger("hf_gradclip")
_given_up: list[str] = []


def statistics(
    grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device, max_abs: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of squares and, if asked for, largest absolute element per gradient; see `eager.sumsq` and `eager.max_abs`.

    Returns:
        Both of shape (len(grads),), of `dtype` on `device`; None for what was not asked for.
    """
    if (fused := _fused(grads, device)) is not None:
        try:
            sums, largest = fused.statistics(grads, dtype, device)
            return sums, largest if max_abs else None
        except Exception as error:
            give_up(error)
    return eager.sumsq(grads, None, dtype, device), eager.max_abs(grads, dtype, device) if max_abs else None


def apply_(grads: Sequence[Tensor | None], scale_S: Tensor, bound_S: Tensor | None) -> None:
    """g <- clamp(g * scale, -bound, +bound), in place; see `eager.scale_` and `eager.clamp_`."""
    if (fused := _fused(grads, scale_S.device)) is not None:
        try:
            fused.apply_(grads, scale_S, bound_S)
            return
        except Exception as error:
            give_up(error)
    eager.scale_(grads, scale_S)
    if bound_S is not None:
        eager.clamp_(grads, bound_S)


def step_kernels(device: torch.device) -> ModuleType | None:
    """The kernels of an optimizer's step, see `step_triton`; None where plain torch serves."""
    return _triton("step_triton", device)


def _fused(grads: Sequence[Tensor | None], device: torch.device) -> ModuleType | None:
    """The Triton kernels, if they are asked for and take these gradients."""
    served = (torch.float32, torch.float16, torch.bfloat16)
    if not _wanted() or any(g is not None and (g.device != device or g.dtype not in served) for g in grads):
        return None
    return _triton("fused_triton", device)


def _wanted() -> bool:
    """Whether Triton is asked for."""
    wanted = os.environ.get(VARIABLE, "eager")
    if wanted not in ("eager", "triton"):
        raise ValueError(f"{VARIABLE}={wanted}: must be eager or triton.")
    return wanted == "triton"


def _triton(name: str, device: torch.device) -> ModuleType | None:
    """A file of this folder that imports Triton, if Triton is asked for and runs on this device."""
    if not _wanted() or _given_up or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
        return None
    try:
        return importlib.import_module(f"hf_gradclip.kernels.{name}")
    except Exception as error:
        give_up(error)
        return None


def give_up(error: Exception) -> None:
    """Plain torch from here on."""
    _given_up.append(str(error))
    logger.warning("%s=triton: %s. Plain torch serves instead.", VARIABLE, " ".join(str(error).split())[:300])

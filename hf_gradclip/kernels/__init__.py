"""What reads and scales memory: Triton on a GPU, plain torch everywhere else.

Before the kernels of a file are trusted, they are checked against plain torch on the device, once. Where Triton is
missing, fails or disagrees, plain torch serves, and this is said once; a dtype that the kernels do not take goes to
plain torch in silence. `HF_GRADCLIP_KERNELS=eager` asks for plain torch; `triton` also takes Triton's interpreter on
the CPU (`TRITON_INTERPRET=1`), which is for tests.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from hf_gradclip.kernels import check, eager
from hf_gradclip.kernels import units as by_unit
from hf_gradclip.kernels.table import DTYPES

VARIABLE = "HF_GRADCLIP_KERNELS"
GPUS = ("cuda", "xpu")

logger = logging.getLogger("hf_gradclip")
_given_up: list[str] = []
_checked: set[tuple[str, torch.device, frozenset[torch.dtype]]] = set()


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


def unit_sums(
    blocks: Sequence[Tensor | None],
    kept: Sequence[by_unit.Axes],
    counts: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Sum of squares per unit of all blocks; see `units.sums`."""
    if (fused := _fused_units(blocks, kept, device)) is not None:
        try:
            return fused.sumsq(blocks, kept, counts, dtype, device)
        except Exception as error:
            give_up(error)
    return by_unit.sums(blocks, kept, counts, dtype, device)


def unit_apply_(
    blocks: Sequence[Tensor | None],
    kept: Sequence[by_unit.Axes],
    counts: Sequence[int],
    scale_U: Tensor,
    bound_U: Tensor | None,
) -> None:
    """g <- clamp(g * scale, -bound, +bound) by unit, in place; see `units.apply_`."""
    if (fused := _fused_units(blocks, kept, scale_U.device)) is not None:
        try:
            fused.apply_(blocks, kept, counts, scale_U, bound_U)
            return
        except Exception as error:
            give_up(error)
    by_unit.apply_(blocks, kept, counts, scale_U, bound_U)


def _fused_units(
    blocks: Sequence[Tensor | None], kept: Sequence[by_unit.Axes], device: torch.device
) -> ModuleType | None:
    """The Triton kernels by unit, where they run and take all of these blocks."""
    fused = _fused(blocks, device, "units_triton")
    if fused is None or not all(b is None or fused.serves(b, axes) for b, axes in zip(blocks, kept, strict=True)):
        return None
    return fused


def step_kernels(params: Sequence[Tensor]) -> ModuleType | None:
    """The kernels of an optimizer's step, see `step_triton`; None where plain torch serves.

    Args:
        params: one at least. Of those with a dtype that the kernels do not take, the caller keeps the step.
    """
    return _fused([p for p in params if p.dtype in DTYPES], params[0].device, "step_triton")


def _fused(grads: Sequence[Tensor | None], device: torch.device, name: str = "fused_triton") -> ModuleType | None:
    """The Triton kernels in a file of this folder, where they run, have been checked, and take these tensors."""
    if not _runs(device):
        return None
    present = [g for g in grads if g is not None]
    dtypes = {g.dtype for g in present}
    elsewhere = set(map(Tensor.get_device, present)) - {-1 if device.type == "cpu" else device.index}
    if not dtypes or not dtypes.issubset(DTYPES) or elsewhere:
        return None
    try:
        found = importlib.import_module(f"hf_gradclip.kernels.{name}")
        kind = (name, device, frozenset(dtypes))
        if kind not in _checked:
            check.check(name, found, device, tuple(dtypes))
            _checked.add(kind)
        return found
    except Exception as error:
        give_up(error)
        return None


def _runs(device: torch.device) -> bool:
    """Whether Triton is to be tried on this device."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "eager", "triton"):
        raise ValueError(f"{VARIABLE}={wanted}: must be auto, eager or triton.")
    if wanted == "eager" or _given_up:
        return False
    interpreted = wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return device.type in GPUS or (device.type == "cpu" and interpreted)


def give_up(error: Exception) -> None:
    """Plain torch from here on."""
    _given_up.append(str(error))
    said = " ".join(str(error).split())[:300]
    logger.warning(
        "Triton's kernels are not used: %s. Plain torch serves instead; %s=eager asks for it.", said, VARIABLE
    )

"""What reads and scales memory: Triton on a GPU, C on a CPU, plain torch everywhere else.

Before the kernels of a file are trusted, they are checked against plain torch on the device, once. Where they fail or
disagree, plain torch serves, and this is said once; a dtype that they do not take goes to plain torch in silence, and
so does a CPU for which nothing was compiled. Nothing here is traced by torch.compile: an address is not a number of a
graph. `HF_GRADCLIP_KERNELS=eager` asks for plain torch; `triton` also takes
Triton's interpreter on the CPU (`TRITON_INTERPRET=1`), which is for tests.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version

from hf_gradclip.kernels import check, eager
from hf_gradclip.kernels import units as by_unit
from hf_gradclip.kernels.table import DTYPES, are_plain

VARIABLE = "HF_GRADCLIP_KERNELS"
GPUS = ("cuda", "xpu")
FILES = {
    "Triton": {"whole": "fused_triton", "units": "units_triton", "step": "step_triton"},
    "C": {"whole": "native", "units": "units_native", "step": "native_step"},
}
"""The files of this folder by language, and by what they do."""
TAKEN = {"Triton": frozenset(DTYPES), "C": frozenset({torch.float32, torch.bfloat16})}

logger = logging.getLogger("hf_gradclip")
_given_up: dict[str, str] = {}
_checked: set[tuple[str, torch.device, frozenset[torch.dtype]]] = set()


@_disable_dynamo
def statistics(
    grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device, max_abs: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of squares and, if asked for, largest absolute element per gradient; see `eager.sumsq` and `eager.max_abs`.

    Returns:
        Both of shape (len(grads),), of `dtype` on `device`; None for what was not asked for.
    """
    if (fused := _fused(grads, device, "whole")) is not None:
        try:
            sums, largest = fused.statistics(grads, dtype, device)
            return sums, largest if max_abs else None
        except Exception as error:
            give_up(error, device)
    return eager.sumsq(grads, None, dtype, device), eager.max_abs(grads, dtype, device) if max_abs else None


@_disable_dynamo
def largest_of(grads: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Largest absolute element per gradient, where NaN stays NaN; see `eager.largest_of`."""
    if (fused := _fused(grads, device, "whole")) is not None:
        try:
            sums, largest = fused.statistics(grads, dtype, device)
            return torch.where(sums.isnan(), sums, largest)
        except Exception as error:
            give_up(error, device)
    return eager.largest_of(grads, dtype, device)


@_disable_dynamo
def apply_(grads: Sequence[Tensor | None], scale_S: Tensor, bound_S: Tensor | None) -> None:
    """g <- clamp(g * scale, -bound, +bound), in place; see `eager.scale_` and `eager.clamp_`."""
    if (fused := _fused(grads, scale_S.device, "whole")) is not None:
        try:
            fused.apply_(grads, scale_S, bound_S)
        except Exception as error:
            give_up(error, scale_S.device)
        else:
            written([grad for grad, some in zip(grads, _asked(grads, scale_S, bound_S), strict=True) if some])
            return
    eager.scale_(grads, scale_S)
    if bound_S is not None:
        eager.clamp_(grads, bound_S)


@_disable_dynamo
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
            give_up(error, device)
    return by_unit.sums(blocks, kept, counts, dtype, device)


@_disable_dynamo
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
        except Exception as error:
            give_up(error, scale_U.device)
        else:
            written(blocks)
            return
    by_unit.apply_(blocks, kept, counts, scale_U, bound_U)


def written(tensors: Sequence[Tensor | None]) -> None:
    """Tell autograd of memory that was written at its address, so that it still finds what may not be used any more."""
    increment_version([tensor for tensor in tensors if tensor is not None])


def _asked(grads: Sequence[Tensor | None], scale_S: Tensor, bound_S: Tensor | None) -> list[bool]:
    """Whether something is asked of each gradient; on a GPU the host does not know, and says so of all."""
    if scale_S.device.type != "cpu":
        return [True] * len(grads)
    asked = scale_S != 1 if bound_S is None else (scale_S != 1) | (bound_S < float("inf"))
    return asked.expand(len(grads)).tolist()


def _fused_units(
    blocks: Sequence[Tensor | None], kept: Sequence[by_unit.Axes], device: torch.device
) -> ModuleType | None:
    """The kernels by unit, where they run and take all of these blocks."""
    fused = _fused(blocks, device, "units")
    if fused is None or not all(b is None or fused.serves(b, axes) for b, axes in zip(blocks, kept, strict=True)):
        return None
    return fused


def step_kernels(params: Sequence[Tensor]) -> ModuleType | None:
    """The kernels of an optimizer's step, see `step_triton`; None where plain torch serves.

    Args:
        params: one at least. Of those with a dtype that the kernels do not take, the caller keeps the step.
    """
    device = params[0].device
    taken = TAKEN.get(language_of(device) or "", frozenset())
    return _fused([p for p in params if p.dtype in taken], device, "step")


def _fused(grads: Sequence[Tensor | None], device: torch.device, what: str) -> ModuleType | None:
    """The kernels in a file of this folder, where they run, have been checked, and take these tensors."""
    language = language_of(device)
    if language is None or what not in FILES[language]:
        return None
    present = [g for g in grads if g is not None]
    dtypes = {g.dtype for g in present}
    elsewhere = set(map(Tensor.get_device, present)) - {-1 if device.type == "cpu" else device.index}
    wrapped = what != "step" and not are_plain(present)  # a step is of the memory in them, and looks at that itself
    if not dtypes or not dtypes.issubset(TAKEN[language]) or elsewhere or wrapped:
        return None
    try:
        name = FILES[language][what]
        found = importlib.import_module(f"hf_gradclip.kernels.{name}")
        kind = (name, device, frozenset(dtypes))
        if kind not in _checked:
            check.check(what, found, device, tuple(dtypes))
            _checked.add(kind)
        return found
    except Exception as error:
        give_up(error, device)
        return None


def language_of(device: torch.device) -> str | None:
    """What the kernels of a device are written in, of FILES; None where plain torch serves."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "eager", "triton"):
        raise ValueError(f"{VARIABLE}={wanted}: must be auto, eager or triton.")
    if wanted == "eager":
        return None
    interpreted = wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type in GPUS or (device.type == "cpu" and interpreted):
        return None if "Triton" in _given_up else "Triton"
    return "C" if device.type == "cpu" and _compiled() and "C" not in _given_up else None


@functools.cache
def _compiled() -> bool:
    return importlib.util.find_spec("hf_gradclip.kernels._native") is not None


def give_up(error: Exception, device: torch.device) -> None:
    """Plain torch from here on, in the place of the kernels of this device.

    Raises:
        OutOfMemoryError: where that is the error.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error  # plain torch needs more; and one rank alone must not go on with other numbers
    language = language_of(device)
    if language is None:
        return
    _given_up[language] = str(error)
    said = " ".join(str(error).split())[:300]
    logger.warning(
        "The kernels in %s are not used: %s. Plain torch serves instead; %s=eager asks for it.",
        language,
        said,
        VARIABLE,
    )

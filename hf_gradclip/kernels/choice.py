"""Which language serves: Triton on a GPU, C on a CPU, plain torch everywhere else.

Before the kernels of a language are trusted, each file is checked against plain torch on the device, once for each set
of dtypes. Where they fail or disagree, plain torch serves from then on, and this is said once; memory that they do not
take goes to plain torch in silence, and so does a CPU for which nothing was compiled. `HF_GRADCLIP_KERNELS=eager` asks
for plain torch; `triton` also takes Triton's interpreter on the CPU (`TRITON_INTERPRET=1`), which is for tests. Both
variables are read at first use.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_gradclip.kernels import check
from hf_gradclip.kernels.blocks import Axes
from hf_gradclip.kernels.operations import Language, WrittenError
from hf_gradclip.kernels.rule import Memory, Places
from hf_gradclip.kernels.table import DTYPES, MisfitError, are_on, are_plain
from hf_gradclip.say import logger

VARIABLE = "HF_GRADCLIP_KERNELS"
GPUS = ("cuda", "xpu")

_given_up: dict[str, str] = {}
_checked: set[tuple[str, str, torch.device, frozenset[torch.dtype]]] = set()


def whole(grads: Sequence[Tensor | None], device: torch.device) -> Language:
    """The language for whole gradients on a device."""
    return _serving("whole", device, [grad for grad in grads if grad is not None])


def by_unit(blocks: Sequence[Tensor | None], kept: Sequence[Axes], device: torch.device) -> Language:
    """The language for blocks on a device."""
    found = _serving("units", device, [block for block in blocks if block is not None])
    return found if found.units.serves(blocks, kept) else torch_language()


def step(memory: Memory, places: Places) -> Language:
    """The language for an optimizer's step on this memory, which has one parameter at least."""
    found = _serving("step", memory.weights[0].device, memory.weights)
    return found if found.step.serves(memory, places) else torch_language()


def still(language: Language) -> Language:
    """The same, or plain torch where it was given up since."""
    return torch_language() if language.name in _given_up else language


def _serving(operation: str, device: torch.device, tensors: Sequence[Tensor]) -> Language:
    """The language of a device, where it runs, has been checked, and takes these tensors; else plain torch."""
    found = language_of(device)
    if found.dtypes is None or not tensors:
        return torch_language()
    dtypes = frozenset([tensor.dtype for tensor in tensors])
    if not dtypes <= found.dtypes or not are_on(device, tensors) or not are_plain(tensors):
        return torch_language()
    kind = (found.name, operation, device, dtypes)
    if kind in _checked:
        return found
    try:
        check.check(operation, found, device, tuple(dtypes))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is: the check reads and writes memory of its own
        _say(found.name, error)
        return torch_language()
    _checked.add(kind)
    return found


@functools.cache
def language_of(device: torch.device) -> Language:
    """The language for the memory of a device, as far as is known before its kernels are checked.

    Raises:
        ValueError: if HF_GRADCLIP_KERNELS is none of its words.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "eager", "triton"):
        raise ValueError(f"{VARIABLE}={wanted}: must be auto, eager or triton.")
    interpreted = wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if wanted == "eager":
        return torch_language()
    if device.type in GPUS or (device.type == "cpu" and interpreted):
        return _loaded("Triton")
    return _loaded("C") if device.type == "cpu" and compiled() else torch_language()


def _loaded(name: str) -> Language:
    """The language of this name, or plain torch where it was given up or cannot be loaded."""
    if name in _given_up:
        return torch_language()
    try:
        return c_language() if name == "C" else triton_language()
    except Exception as error:
        _say(name, error)
        return torch_language()


@functools.cache
def torch_language() -> Language:
    """Plain torch."""
    from hf_gradclip.kernels.eager import step, units, whole

    return Language("torch", None, whole, units, step)


def c_language() -> Language:
    """C."""
    from hf_gradclip.kernels.c import step, units, whole
    from hf_gradclip.kernels.c.library import BYTES, library

    library()
    return Language("C", frozenset(BYTES), whole, units, step)


def triton_language() -> Language:
    """Triton."""
    from hf_gradclip.kernels.triton import step, units, whole

    return Language("Triton", frozenset(DTYPES), whole, units, step)


@functools.cache
def compiled() -> bool:
    """Whether the C files were compiled when the package was installed."""
    return importlib.util.find_spec("hf_gradclip.kernels.c._compiled") is not None


def give_up(language: Language, error: Exception) -> None:
    """Let plain torch serve from here on in the place of a language.

    Raises:
        Exception: the error itself, where plain torch cannot help: it is what failed, what was handed in is at fault,
            memory was written, or there is too little of it, of which plain torch needs more.
    """
    if language.dtypes is None or isinstance(error, (torch.OutOfMemoryError, MisfitError, WrittenError)):
        raise error
    _say(language.name, error)


def _say(name: str, error: Exception) -> None:
    language_of.cache_clear()
    _given_up[name] = str(error)
    logger.warning(
        "The kernels in %s are not used: %s. Plain torch serves instead; %s=eager asks for it.",
        name,
        " ".join(str(error).split())[:300],
        VARIABLE,
    )


def forget() -> None:
    """Ask again what serves, as in a new process: for tests."""
    language_of.cache_clear()
    compiled.cache_clear()
    _given_up.clear()
    _checked.clear()

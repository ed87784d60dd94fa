"""Which of Lightning's two packages is here: a callback must be one of that package's own."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

PACKAGES = ("lightning", "pytorch_lightning")


def bases() -> tuple[type, ...]:
    """Callback of each package that is imported; of the first that is installed, where none is.

    Raises:
        ModuleNotFoundError: where neither is.
    """
    names = [name for name in PACKAGES if f"{name}.callbacks" in sys.modules or f"{name}.pytorch" in sys.modules]
    names = names or [name for name in PACKAGES if find_spec(name) is not None][:1]
    if not names:
        raise ModuleNotFoundError("hf_gradclip.integrations.lightning: pip install lightning, or pytorch-lightning.")
    return tuple(import_module("lightning.pytorch" if n == "lightning" else n).Callback for n in names)

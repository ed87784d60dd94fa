"""Waits for the modules of Trainer and Accelerator, whoever imports them, and opens a door in each.

Until then nothing is imported, so that a script finds everything as if it ran alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DOORS = "hf_gradclip.integrations.doors"


SEAMS = {"transformers.trainer": ("Trainer", "__init__"), "accelerate.accelerator": ("Accelerator", "prepare")}
"""By the module that is waited for: the class, and the method in which DOORS has a say, by its name there."""


def install() -> None:
    """Open the doors: now in what is imported already, else when it is. A second call does nothing."""
    if any(type(finder).__name__ == Waiting.__name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, Waiting())
    for name in SEAMS:
        if name in sys.modules:
            _open(sys.modules[name])


class Waiting(MetaPathFinder):
    """Finds a module as it would be found, and has a door opened in it once it is there."""

    def __init__(self) -> None:
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """That of the other finders, with a loader that does more; None for modules that nobody waits for."""
        if fullname not in SEAMS or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_open(module: ModuleType) -> None:
            execute(module)
            _open(module)

        spec.loader.exec_module = execute_and_open  # type: ignore[method-assign]
        return spec


def _open(module: ModuleType) -> None:
    if module.__name__ not in SEAMS:
        return  # of a loader that loads others too
    try:
        from hf_gradclip.run.wrapping import wrap_class
    except ImportError as error:
        print(f"hf_gradclip: {sys.executable} cannot import it ({error}), so nothing is clipped here.", file=sys.stderr)
        return
    name, method = SEAMS[module.__name__]

    def around(*args: Any, **kwargs: Any) -> Any:
        door = getattr(importlib.import_module(DOORS), f"{name}_{method.strip('_')}".lower())
        return door(*args, **kwargs)

    wrap_class(getattr(module, name), method, around)

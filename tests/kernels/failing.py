"""The operations as the package offers them, each on memory of its own, for tests of what goes wrong in them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_gradclip import kernels
from hf_gradclip.kernels.operations import Language
from hf_gradclip.kernels.rule import Memory, Places, Rule

CPU = torch.device("cpu")
SIZE = 1_000_000  # elements, of several programs
PLACES = Places((0,), (0,))


def sgd(lr: float = 0.5) -> Rule:
    return Rule("sgd", lr, 0.0, True, False)


def itself(weight: Tensor) -> Memory:
    """Of SGD that takes a weight for its own gradient: w <- w - lr w."""
    return Memory([weight], [weight.detach()], [None], [None], [None])


def _units(of: Any, tensor: Tensor) -> list[Tensor]:
    return [of.unit_sums([tensor.view(500, -1)], [(0,)], [500], torch.float64, CPU)]


def _unit_apply(of: Any, tensor: Tensor) -> list[Tensor]:
    of.unit_apply_([tensor.view(500, -1)], [(0,)], [500], torch.full((500,), 0.5), None)
    return [tensor]


def _apply(of: Any, tensor: Tensor) -> list[Tensor]:
    of.apply_([tensor], torch.tensor(0.5), None)
    return [tensor]


def _step(of: Any, tensor: Tensor) -> list[Tensor]:
    of.step_(sgd(), itself(tensor), PLACES, None, None)
    return [tensor]


READS: dict[str, Callable[[Any, Tensor], list[Tensor]]] = {
    "statistics": lambda of, tensor: list(of.statistics([tensor], torch.float64, CPU, True)),
    "unit_sums": _units,
    "measure_update": lambda of, tensor: list(of.measure_update(sgd(), itself(tensor), PLACES, None)),
}
"""By name: called on a file of a language, or on `kernels`."""
WRITES: dict[str, Callable[[Any, Tensor], list[Tensor]]] = {
    "apply_": _apply,
    "unit_apply_": _unit_apply,
    "step_": _step,
}
"""The same; each halves its tensor."""
FILES = {
    "statistics": "whole", "apply_": "whole", "unit_sums": "units", "unit_apply_": "units", "measure_update": "step",
    "step_": "step",
}  # fmt: skip
FUNCTIONS = {
    "statistics": "gradclip_measure", "apply_": "gradclip_apply", "unit_sums": "gradclip_unit_sums",
    "unit_apply_": "gradclip_unit_apply", "measure_update": "gradclip_step", "step_": "gradclip_step",
}  # fmt: skip
"""What each calls of the library in C."""


def call(name: str, language: Language | None = None, size: int = SIZE) -> list[Tensor]:
    """What an operation gives for a tensor of ones, or makes of it.

    Args:
        name: of the operation.
        language: in which; None leaves the choice to the package.
        size: of the tensor.
    """
    of = kernels if language is None else getattr(language, FILES[name])
    return {**READS, **WRITES}[name](of, torch.ones(size))


class Failing:
    """A library in C of which one function fails, but in the range of programs that is the first."""

    def __init__(self, patch: pytest.MonkeyPatch, library: ModuleType, name: str, error: BaseException) -> None:
        self._compiled, self._name, self._error = library.library(), name, error
        self.threads: list[str] = []  # those that failed
        patch.setattr(library, "library", lambda: self)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._compiled, name)
        if name != self._name:
            return function

        def fail(first: int, *rest: int) -> None:
            if first > 0:
                self.threads.append(threading.current_thread().name)
                raise self._error
            function(first, *rest)

        return fail

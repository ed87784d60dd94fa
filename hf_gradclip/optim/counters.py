"""How many steps each parameter has made: numbers of the CPU, as torch keeps them, that are counted up at once."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

KEPT = 64  # sets of parameters, for those without a gradient come and go


class Counters:
    """The `step` of some states as parts of one vector, since torch adds to hundreds of numbers one after another."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Tensor, list[Tensor]]] = {}

    def of(self, params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> Tensor:
        """The steps that these parameters have made, float32, shape (P,); adding to it adds to each state's `step`.

        Args:
            params: which.
            states: of each, with a 0-d `step`, which is replaced by a part of the vector where it is none yet.
        """
        steps = [state["step"] for state in states]
        key = id(params[0]), len(params)
        step_P, parts = self._known.get(key, (None, ()))
        if step_P is not None and len(parts) == len(steps) and all(map(is_, parts, steps)):
            return step_P
        step_P = torch.cat([torch.as_tensor(step, dtype=torch.float32, device="cpu").reshape(1) for step in steps])
        parts = list(step_P.unbind())
        for state, part in zip(states, parts, strict=True):
            state["step"] = part
        if len(self._known) >= KEPT:
            self._known.clear()
        self._known[key] = step_P, parts
        return step_P

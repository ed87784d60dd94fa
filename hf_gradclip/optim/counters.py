"""How many steps each parameter has made, and the corrections of a bias that follow from it.

The numbers are of the CPU, as torch keeps them, where the host knows which steps are skipped. Where only the device
does (`skip_sync=False`) they are there, as torch's fused optimizers keep them, and so is what is computed of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from hf_gradclip.device import moved, upload

KEPT = 64  # sets of parameters, for those without a gradient come and go


class Counters:
    """The `step` of some states as parts of one vector, since torch adds to hundreds of numbers one after another."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Tensor, list[Tensor]]] = {}
        self._pasts: dict[tuple[float, float, torch.device], Tensor] = {}

    def of(self, params: Sequence[Tensor], states: Sequence[dict[str, Any]], read: bool) -> Tensor:
        """The steps that these parameters have made, float32, shape (P,); adding to it adds to each state's `step`.

        Args:
            params: which, of one device.
            states: of each, with a 0-d `step`, which is replaced by a part of the vector where it is none yet.
            read: whether the host reads them, so that they are on the CPU, and else beside the parameters.
        """
        steps = [state["step"] for state in states]
        key = id(params[0]), len(params)
        device = torch.device("cpu") if read else params[0].device
        step_P, parts = self._known.get(key, (None, ()))
        same = len(parts) == len(steps) and all(map(is_, parts, steps))
        if step_P is not None and same and step_P.device == device:
            return step_P
        step_P = _together(steps, device)
        parts = list(step_P.unbind())
        for state, part in zip(states, parts, strict=True):
            state["step"] = part
        if len(self._known) >= KEPT:
            self._known.clear()
        self._known[key] = step_P, parts
        return step_P

    def corrections(self, step_P: Tensor, past: float, past2: float, read: bool) -> dict[str, Any]:
        """Of the coming step of each parameter 1 / (1 - past^t) and sqrt(1 - past2^t), t its number from 1 on.

        Args:
            step_P: what `of` gave.
            past: weight of the past in the first moment; with 0 its number is 1.
            past2: in the second, in the same way.
            read: as for `of`.

        Returns:
            `terms` or `inverse_P2` of a Rule.
        """
        if read:
            counts = [step + 1 for step in step_P.tolist()]
            terms = {count: (1 / (1 - past**count), (1 - past2**count) ** 0.5) for count in set(counts)}
            return {"terms": [terms[count] for count in counts]}
        key = past, past2, step_P.device
        if key not in self._pasts:
            if len(self._pasts) >= KEPT:
                self._pasts.clear()
            self._pasts[key] = upload([past, past2], torch.float64, step_P.device)
        inverse_P2 = 1 - self._pasts[key].pow((step_P + 1)[:, None])
        inverse_P2[:, 1].rsqrt_()
        return {"inverse_P2": inverse_P2}


def count_(step_P: Tensor, made: Tensor | int) -> None:
    """Count a step: 1, or on the device whether it was made, 0-d, since nobody on the host knows."""
    step_P.add_(moved(made, step_P.device) if isinstance(made, Tensor) else made)


def _together(steps: list[Any], device: torch.device) -> Tensor:
    """Numbers of the host or of devices as one vector, float32."""
    of_host = torch.device("cpu")
    numbers = [torch.as_tensor(n, device=n.device if isinstance(n, Tensor) else of_host) for n in steps]
    numbers = [number.to(torch.float32).reshape(1) for number in numbers]
    if all(number.is_cpu for number in numbers):
        return upload(torch.cat(numbers), torch.float32, device)
    return torch.cat([moved(number, device) for number in numbers])


def on_host(entries: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The states of an optimizer with every `step` on the CPU, as torch keeps it: one read of all."""
    steps = {key: step for key, entry in entries.items() if isinstance(step := entry.get("step"), Tensor)}
    away = {key: step for key, step in steps.items() if not step.is_cpu}
    if not away:
        return entries
    device = next(iter(away.values())).device
    here = torch.stack([moved(step, device) for step in away.values()]).cpu().unbind()
    return {**entries, **{key: {**entries[key], "step": step} for key, step in zip(away, here, strict=True)}}

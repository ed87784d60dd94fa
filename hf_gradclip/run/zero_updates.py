"""Clip the updates of whatever optimizer ZeRO steps, in the memory that ZeRO steps part by part."""

from __future__ import annotations

import torch

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.lowered import factor_of
from hf_gradclip.optim.optimizer import PLACES
from hf_gradclip.run.recovery import decay_of, recover_, refuse_recovery
from hf_gradclip.run.updates import Updates
from hf_gradclip.run.weight_difference import clip_moved
from hf_gradclip.views.view import View
from hf_gradclip.views.zero import of_updates
from hf_gradclip.wrappers import innermost


class ZeroUpdates:
    """Clips the updates of the optimizer inside a ZeRO optimizer: one decision after the last part.

    Args:
        view: of the gradients, made by `zero_view`.
        config: of the run.
        updates: of the run, where the clipper is added.

    Raises:
        UnsupportedBackendError: by the optimizer's name, where its update cannot be recovered.
    """

    def __init__(self, view: View, config: ClipConfig, updates: Updates) -> None:
        seen, self._moved = of_updates(view)
        self._gradients = self._moved.gradients
        self._optimizer = innermost(self._gradients.zero)
        self._parts = len(self._moved.parts)
        self._rates: dict[int, tuple[float, float]] = {}
        segments = [piece.parameter for pieces in self._moved.parts for piece in pieces]
        self._segments = torch.tensor(segments, dtype=torch.int64, device=view.layout.device)
        weights = [self._gradients.weights(part) for part in range(self._parts)]
        refuse_recovery(self._optimizer, [weight.dtype for weight in weights])
        self.clipper = Clipper(config.of_update(), seen, PLACES["update"], squared=False)
        updates.add(self._optimizer, self.clipper)
        updates.say_cost(type(self._optimizer).__name__, sum(4 * weight.numel() for weight in weights))

    @torch.no_grad()
    def before(self, part: int) -> None:
        """Copy the weights of a part, into memory that is kept."""
        weight, group = self._gradients.weights(part), self._optimizer.param_groups[self._gradients.group_of(part)]
        if part not in self._moved.memory:
            self._moved.memory[part] = torch.empty_like(weight)
        self._moved.memory[part].copy_(weight)
        lr = float(group["lr"]) * factor_of(self._optimizer)  # its step, in which that is put in, comes later
        self._rates[part] = (lr, decay_of(self._optimizer, group))

    @torch.no_grad()
    def after(self, part: int) -> None:
        """Turn the copy into the update; after the last part clip them all."""
        recover_(self._moved.memory[part], self._gradients.weights(part), *self._rates[part])
        if part < self._parts - 1 or not any(lr for lr, _ in self._rates.values()):
            return
        weights, updates, lrs = [], [], []
        for i, pieces in enumerate(self._moved.parts):
            for piece in pieces:
                weights.append(self._gradients.weights(i).narrow(0, piece.start, piece.length))
                updates.append(self._moved.memory[i].narrow(0, piece.start, piece.length))
                lrs.append(self._rates[i][0])
        if clip_moved(self.clipper, type(self._optimizer).__name__, weights, updates, lrs, self._segments):
            for i in range(self._parts - 1):  # DeepSpeed itself copies the last part, which it is still stepping
                self._gradients.publish(i)

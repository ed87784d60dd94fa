"""The loss scale where several optimizers step the gradients of one backward.

A GradScaler knows of each optimizer whether its gradients are in true units. Its `update`, which Accelerate calls after
the step of each optimizer, forgets that of all of them, so that those of the next one would be divided once more.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.amp.grad_scaler import OptState

from hf_gradclip.run.updates import stepped_by
from hf_gradclip.wrappers import innermost


def unscaling(accelerator: Any, source: nn.Module) -> Callable[[], None]:
    """What takes the loss scale out of a model's gradients, once for each optimizer that steps any of them.

    Args:
        accelerator: with a scaler; it is held weakly.
        source: the model.
    """
    held = weakref.ref(accelerator)

    def unscale() -> None:
        accelerator = held()
        if accelerator is None:
            return
        mine = {*map(id, source.parameters())} if len(accelerator._optimizers) > 1 else None
        for optimizer in accelerator._optimizers:
            inner = innermost(optimizer)
            concerned = mine is None or any(id(p) in mine for p in stepped_by(inner))
            if concerned and id(inner) not in _kept.get(accelerator.scaler, ()):
                accelerator.unscale_gradients(optimizer)

    return unscale


@contextmanager
def kept_unscaled(scaler: Any, optimizer: Any) -> Iterator[None]:
    """Around the step of an optimizer: of the others that are in true units the scaler still knows it after its update.

    Args:
        scaler: that updates itself after the step; None for none.
        optimizer: without wrappers.
    """
    states = {}
    if scaler is not None and scaler.is_enabled():
        of_all = scaler._per_optimizer_states.items()  # nothing public tells
        states = {key: s for key, s in of_all if key != id(optimizer) and s["stage"] is OptState.UNSCALED}
        _kept[scaler] = {*states}
    yield
    if states:
        scaler._per_optimizer_states.update(states)


def forget_unscaled(scaler: Any) -> None:
    """Before a backward, whose gradients are in the scaler's units again."""
    for key in _kept.pop(scaler, ()) if scaler is not None else ():
        scaler._per_optimizer_states.pop(key, None)


_kept: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()
"""Of each scaler the `id` of the optimizers that were told to it again."""

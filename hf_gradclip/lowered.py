"""A learning rate that is lower for a while, around the steps of optimizers."""

from __future__ import annotations

import weakref
from typing import Any

from hf_gradclip.reactions import LowerRate
from hf_gradclip.wrappers import innermost


class Lowered:
    """The factor of LowerRate around the steps of optimizers, as long as somebody keeps this.

    An optimizer that several of these hold is lowered once, by the smallest factor that is in force.

    Args:
        reaction: how far, and how long.

    Attributes:
        factor: of the reaction.
        left: steps that it is still in force for.
    """

    def __init__(self, reaction: LowerRate) -> None:
        self.factor, self._steps = reaction.factor, reaction.steps
        self.left = 0

    def begin(self, ago: int) -> None:
        """A step stands out: the one that is decided on now, or one so many steps before it."""
        self.left = max(self.left, self._steps - ago)

    def advance(self) -> None:
        """Another step is decided on."""
        self.left = max(0, self.left - 1)

    def hold(self, optimizer: Any) -> None:
        """Put the factor in around every step of an optimizer, with wrappers or without."""
        optimizer = innermost(optimizer)  # whose hooks are called, and with it
        if optimizer not in _holders:
            _holders[optimizer] = weakref.WeakSet()
            _hooks[optimizer] = [optimizer.register_step_pre_hook(_lower), optimizer.register_step_post_hook(_raise)]
        _holders[optimizer].add(self)

    def let_go(self) -> None:
        """Leave every optimizer as it would be."""
        for optimizer, holders in list(_holders.items()):
            holders.discard(self)
            if not holders:
                _raise(optimizer)  # a step may have raised
                del _holders[optimizer]
                for hook in _hooks.pop(optimizer):
                    hook.remove()


def factor_of(optimizer: Any) -> float:
    """What the rate of the coming step of an optimizer will be multiplied by; 1 where that is done already."""
    if optimizer in _kept:
        return 1.0
    return min((lowered.factor for lowered in _holders.get(optimizer, ()) if lowered.left), default=1.0)


_holders: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Lowered]] = weakref.WeakKeyDictionary()
"""Who lowers the rate of an optimizer."""
_hooks: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()
"""What is called around the steps of an optimizer for them."""
_kept: weakref.WeakKeyDictionary[Any, list[tuple[dict[str, Any], Any]]] = weakref.WeakKeyDictionary()
"""The groups of an optimizer in the middle of a step that is lowered, and their rates."""


def _lower(optimizer: Any, *_: Any) -> None:
    _raise(optimizer)  # after a step that raised
    factor = factor_of(optimizer)
    if factor != 1:
        _kept[optimizer] = [(group, group["lr"]) for group in optimizer.param_groups]
        for group, lr in _kept[optimizer]:
            group["lr"] = lr * factor


def _raise(optimizer: Any, *_: Any) -> None:
    for group, lr in _kept.pop(optimizer, ()):
        group["lr"] = lr

"""A learning rate that is lower for a while, around the steps of optimizers."""

from __future__ import annotations

import weakref
from typing import Any

from hf_gradclip.reactions import LowerRate


class Lowered:
    """The factor of LowerRate around the steps of optimizers.

    Args:
        reaction: how far, and how long.

    Attributes:
        left: steps that it is still in force for.
    """

    def __init__(self, reaction: LowerRate) -> None:
        self._factor, self._steps = reaction.factor, reaction.steps
        self.left = 0
        self._optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._kept: list[tuple[dict[str, Any], Any]] = []

    def begin(self) -> None:
        """The step that is decided on now stands out."""
        self.left = self._steps

    def advance(self) -> None:
        """Another step is decided on."""
        self.left = max(0, self.left - 1)

    def hold(self, optimizer: Any) -> None:
        """Put the factor in around every step of an optimizer without wrappers."""
        if optimizer not in self._optimizers:
            self._optimizers.add(optimizer)
            optimizer.register_step_pre_hook(self._lower)
            optimizer.register_step_post_hook(self._raise)

    @property
    def holds(self) -> bool:
        """Whether there is an optimizer."""
        return bool(self._optimizers)

    def _lower(self, optimizer: Any, *_: Any) -> None:
        self._raise()  # after a step that raised
        if self.left:
            self._kept = [(group, group["lr"]) for group in optimizer.param_groups]
            for group, lr in self._kept:
                group["lr"] = lr * self._factor

    def _raise(self, *_: Any) -> None:
        for group, lr in self._kept:
            group["lr"] = lr
        self._kept = []

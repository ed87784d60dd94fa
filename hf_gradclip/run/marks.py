"""Which steps are clipped: marks that a clip sets, a step takes, and a new backward makes void."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from hf_gradclip.clipper import Clipper
from hf_gradclip.say import logger


class Mark(NamedTuple):
    """What one clipper did for the coming step.

    Args:
        skips: whether it skips the step.
        taken: the `id` of each optimizer that has stepped with it.
    """

    skips: bool
    taken: set[int]


class Marks:
    """Of each clipper that has clipped, whether it skips the coming step of the optimizers of its model.

    One clip serves all optimizers of its model, each of them once. They may step in turn, so what is left over after
    one of them has stepped is of gradients that the next backward changes. A model that nobody has stepped since its
    clip may wait while another goes backward.
    """

    def __init__(self) -> None:
        self._of: dict[Clipper, Mark] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._of.clear()

    def set(self, clipper: Clipper) -> None:
        """A clipper has clipped."""
        self._of[clipper] = Mark(clipper.step_was_skipped, set())

    def missing(self, optimizer: Any, clippers: Sequence[Clipper]) -> list[Clipper]:
        """Which of an optimizer's clippers have not clipped for its coming step."""
        return [c for c in clippers if c not in self._of or id(optimizer) in self._of[c].taken]

    def take(self, optimizer: Any, clippers: Sequence[Clipper]) -> bool:
        """Use up the marks of an optimizer's clippers for its step; whether one of them skips it."""
        marks = [mark for c in clippers if (mark := self._of.get(c)) is not None and id(optimizer) not in mark.taken]
        for mark in marks:
            mark.taken.add(id(optimizer))
        return any(mark.skips for mark in marks)

    def before_backward(self) -> None:
        """What was clipped for a model that has been stepped since counts no longer."""
        self._of = {clipper: mark for clipper, mark in self._of.items() if not mark.taken}


class Owners:
    """Of each optimizer the clippers of the models whose parameters it steps, as they were found last."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[Any, tuple[int, list[Clipper]]] = weakref.WeakKeyDictionary()
        self._said_stranger = False

    def clear(self) -> None:
        """Find all of them anew."""
        self._of.clear()

    def known(self, optimizer: Any) -> list[Clipper] | None:
        """The clippers of an optimizer; None where it has another number of parameters since, or nobody has looked."""
        size, clippers = self._of.get(optimizer, (-1, None))
        return clippers if size == sum(len(group["params"]) for group in optimizer.param_groups) else None

    def find(self, optimizer: Any, models: Sequence[tuple[nn.Module, Clipper]]) -> list[Clipper]:
        """The same, found among these models with their clippers."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        clippers = [clipper for model, clipper in models if any(id(p) in mine for p in model.parameters())]
        self._of[optimizer] = sum(len(group["params"]) for group in optimizer.param_groups), clippers
        return clippers

    def say_stranger(self, name: str) -> None:
        """Warn, once, of an optimizer of this name that steps without a clipper."""
        if not self._said_stranger:
            self._said_stranger = True
            logger.warning(
                "optimizer.step() of %s: its parameters belong to no prepared model, so nothing of it is clipped. "
                "Prepare the model too; under FSDP1 with flat parameters prepare it before the optimizer is made.",
                name,
            )


def is_idle(clipper: Clipper) -> bool:
    """Whether its model has no gradient: frozen, or not used in this step."""
    return all(p.grad is None for p in clipper.view.watched())

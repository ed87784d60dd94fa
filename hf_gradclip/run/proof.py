"""In the first steps: is what was clipped what an optimizer steps? Does one step before anything is clipped?

A loop that clips before backward, or zeroes gradients after the clip, does so in every step, so that a few of them show
it. Later steps cost nothing. An edit of a gradient between clip and step, such as a mask, is allowed where the gradient
was clipped in its memory; see optim/taken.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_gradclip.clipper import Clipper
from hf_gradclip.device import local
from hf_gradclip.fingerprint import Fingerprint, fingerprint
from hf_gradclip.say import logger

STEPS = 5
"""So many steps of a model are looked at."""


class Seen(NamedTuple):
    """The gradients of a model right after its clip, or after a backward.

    Args:
        backwards: how many there were.
        grads: of each parameter that of its gradient; None where it has none.
    """

    backwards: int
    grads: list[Fingerprint | None]

    def changed(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether any of the gradients is another one now, or was written to."""
        return any(
            grad is not None if old is None else not old.fits(grad) for old, grad in zip(self.grads, grads, strict=True)
        )


def seen_of(clipper: Clipper, backwards: int) -> Seen:
    """The gradients of a clipper's model now, after so many backward passes."""
    return Seen(backwards, [fingerprint(p.grad) for p in clipper.view.watched()])


class Kept(NamedTuple):
    """A weight before a backward.

    Args:
        hooked: how many trainable parameters have hooks.
        parameter: the smallest of them.
        before: a copy of what this process holds of it.
    """

    hooked: int
    parameter: Tensor
    before: Tensor

    def has_changed(self) -> bool:
        """Whether its numbers are others now. Memory of another kind, as DDP may put in its place, is no change."""
        now = local(self.parameter)
        return now.shape == self.before.shape and now.dtype == self.before.dtype and not torch.equal(now, self.before)


class Proof:
    """Compares gradients at the step with those at the clip, and weights after a backward with those before it.

    See Marks, which counts the backward passes.
    """

    def __init__(self) -> None:
        self._fresh: weakref.WeakKeyDictionary[Clipper, Seen] = weakref.WeakKeyDictionary()
        self._said_edit = self._said_hook = False
        self._kept: weakref.WeakKeyDictionary[Clipper, Kept] = weakref.WeakKeyDictionary()
        self._steps: weakref.WeakKeyDictionary[Clipper, int] = weakref.WeakKeyDictionary()
        self._seen: weakref.WeakKeyDictionary[Clipper, Seen] = weakref.WeakKeyDictionary()

    def before_backward(self, clipper: Clipper) -> None:
        """Where parameters have hooks that run in backward, keep the smallest as it is."""
        self._kept.pop(clipper, None)
        if self._steps.get(clipper, 0) < STEPS and not self._said_hook:
            hooked = [p for p in clipper.view.watched() if getattr(p, "_post_accumulate_grad_hooks", None)]
            if hooked:
                smallest = min(hooked, key=Tensor.numel)
                self._kept[clipper] = Kept(len(hooked), smallest, local(smallest).clone())

    def look_at_weights(self, clipper: Clipper) -> None:
        """Say once that a weight changed in backward, as an optimizer in a hook changes it."""
        kept = self._kept.pop(clipper, None)
        if kept is not None and kept.has_changed():
            self._said_hook = True
            logger.warning(
                "clip: %d trainable parameters have hooks (register_post_accumulate_grad_hook), and weights change in "
                "them. What an optimizer does there comes before the clip and is not clipped, whatever is logged. Step "
                "it after backward.",
                kept.hooked,
            )

    def went_back(self, clipper: Clipper, backwards: int) -> None:
        """A backward is over. A loss scaler's edits are not looked for."""
        if self._steps.get(clipper, 0) < STEPS and not clipper.view.guarded:
            self._fresh[clipper] = seen_of(clipper, backwards)

    def expect_edit(self) -> None:
        """Gradients are about to be edited, as somebody was told."""
        self._fresh.clear()

    def before_clip(self, clipper: Clipper) -> None:
        """Say once that gradients were edited since the backward, as a clip of the loop's own does it."""
        if (fresh := self._fresh.pop(clipper, None)) is None or self._said_edit:
            return
        grads = [p.grad for p in clipper.view.watched()]
        if len(grads) != len(fresh.grads) or not fresh.changed(grads):
            return
        self._said_edit = True
        logger.warning(
            "clip: the gradients were changed in place after backward and before the clip. The strategy, and a record, "
            "see what that left. If it was torch.nn.utils.clip_grad_norm_, or another clip, leave it out."
        )

    def clipped(self, clipper: Clipper, backwards: int) -> None:
        """A clipper has clipped, after so many backward passes."""
        if self._steps.setdefault(clipper, 0) < STEPS:
            self._seen[clipper] = seen = seen_of(clipper, backwards)
            if not any(seen.grads) and not clipper.step_was_skipped and self._steps[clipper] == 0:
                logger.warning(
                    "clip: no trainable parameter has a gradient in the first step, so nothing is clipped. Clip after "
                    "backward; an optimizer that steps inside backward cannot be clipped at all."
                )

    def forget(self, clipper: Clipper) -> None:
        """What a clipper has clipped will not be stepped."""
        self._seen.pop(clipper, None)

    def stepped(self, clipper: Clipper, backwards: int) -> None:
        """An optimizer of its model is about to step.

        Raises:
            RuntimeError: if the gradients are not those that were clipped, with the reason.
        """
        seen = self._seen.pop(clipper, None)
        if seen is None:
            return
        self._steps[clipper] += 1
        grads = [p.grad for p in clipper.view.watched()]
        if len(grads) != len(seen.grads):
            return  # layers came or went, which the clipper says itself
        before, now = any(old is not None for old in seen.grads), any(grad is not None for grad in grads)
        why = ""
        if (now and not before) or (now and backwards != seen.backwards and seen.changed(grads)):
            why = "a backward came after the clip"
        elif before and not now:
            why = "they were zeroed after the clip"
        if why:
            raise RuntimeError(
                f"optimizer.step(): the gradients are not those that were clipped, {why}. The order of a step is "
                "backward, clip, optimizer.step(), zero_grad()."
            )

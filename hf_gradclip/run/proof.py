"""In the first steps: is what an optimizer steps what was clipped, and does nobody step in backward?

A loop that clips before backward, or zeroes gradients after the clip, does so in every step, so that a few of them show
it. Later steps cost nothing. An edit of a gradient between clip and step, such as a mask, is allowed
where the gradient was clipped in its memory; see optim/taken.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from hf_gradclip.clipper import Clipper
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


class Proof:
    """Compares the gradients at the step with those at the clip. See Marks, which counts the backward passes."""

    def __init__(self) -> None:
        self._fresh: weakref.WeakKeyDictionary[Clipper, Seen] = weakref.WeakKeyDictionary()
        self._said_edit = self._said_hook = False
        self._written: weakref.WeakKeyDictionary[Clipper, list[int]] = weakref.WeakKeyDictionary()
        self._steps: weakref.WeakKeyDictionary[Clipper, int] = weakref.WeakKeyDictionary()
        self._seen: weakref.WeakKeyDictionary[Clipper, Seen] = weakref.WeakKeyDictionary()

    def goes_back(self, clipper: Clipper) -> None:
        """A backward begins: note how often each weight was written to."""
        if self._steps.get(clipper, 0) < STEPS:
            self._written[clipper] = [p._version for p in clipper.view.watched()]

    def insist_on_weights(self, clipper: Clipper) -> None:
        """A backward is over: say once that weights were written to in it, as an optimizer in a hook does it."""
        before, watched = self._written.pop(clipper, None), clipper.view.watched()
        if self._said_hook or before is None or len(before) != len(watched):
            return
        if before != [p._version for p in watched]:
            self._said_hook = True
            logger.warning(
                "clip: weights were changed during backward, as by an optimizer that steps in a hook "
                "(register_post_accumulate_grad_hook). What it does is not clipped, whatever is logged. Step it after "
                "backward."
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

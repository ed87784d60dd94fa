"""Which steps are clipped: marks that a clip sets, a step takes, and a new backward makes void."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_gradclip.clipper import Clipper
from hf_gradclip.fingerprint import Fingerprint, fingerprint
from hf_gradclip.run.proof import Proof
from hf_gradclip.run.updates import are_same, stepped_by
from hf_gradclip.say import logger
from hf_gradclip.wrappers import innermost


class First(NamedTuple):
    """The first gradient of some parameters.

    Args:
        place: of its parameter among them.
        seen: to know it again.
    """

    place: int
    seen: Fingerprint

    def is_other(self, parameters: Sequence[Tensor], edited: bool) -> bool:
        """Whether there is another gradient in its place now, or where `edited` counts the same one was written to."""
        now = parameters[self.place].grad
        return now is not None and not self.seen.fits(now, edited=not edited)


def first_of(parameters: Sequence[Tensor]) -> First | None:
    """None where there is none."""
    seen = ((i, fingerprint(p.grad)) for i, p in enumerate(parameters))
    return next((First(i, grad) for i, grad in seen if grad is not None), None)


class Mark(NamedTuple):
    """What one clipper did for the coming step.

    Args:
        skips: whether it skips the step.
        taken: the `id` of each optimizer that has stepped with it.
        norm: before clipping, 0-d.
        backwards: how many backward passes there were by then.
        grad: the first gradient.
        apart: the first gradient of each of several optimizers, by their `id`.
    """

    skips: bool
    taken: set[int]
    norm: Tensor
    backwards: int
    grad: First | None
    apart: dict[int, First | None]


class Marks:
    """Of each clipper that has clipped, whether it skips the coming step of the optimizers of its model.

    One clip serves all optimizers of its model, each of them once. They may step in turn, so what is left over after
    one of them has stepped is of gradients that the next backward changes. A model that nobody has stepped since its
    clip may wait while another goes backward.

    Args:
        auto: whether a step that no clip call preceded is clipped.

    Attributes:
        proof: what is looked at in the first steps.
    """

    def __init__(self, auto: bool = False) -> None:
        self._auto = auto
        self._of: dict[Clipper, Mark] = {}
        self._backwards = 0
        self.proof = Proof()

    def clear(self) -> None:
        """Forget everything."""
        self._of.clear()

    def set(self, clipper: Clipper, norm: Tensor, optimizers: Sequence[Any]) -> None:
        """A clipper has clipped, and measured this norm; these optimizers, without wrappers, step what it clips."""
        self.proof.clipped(clipper, self._backwards)
        first = first_of(clipper.view.here.watched())
        apart = {id(o): first_of(stepped_by(o)) for o in optimizers} if len(optimizers) > 1 else {}
        skips = clipper.config.skip_sync and clipper.step_was_skipped  # else the optimizer reads that itself
        self._of[clipper] = Mark(skips, set(), norm, self._backwards, first, apart)

    def norm_of(self, clipper: Clipper) -> Tensor | None:
        """The norm of the clip of the coming step, if there was one and no backward since; None where one is due."""
        mark = self._of.get(clipper)
        if mark is None or mark.taken or mark.backwards != self._backwards:
            return None
        watched = clipper.view.watched()
        if mark.grad is None or mark.grad.place >= len(watched):
            return mark.norm if all(p.grad is None for p in watched) else None
        gone = watched[mark.grad.place].grad is None
        return None if gone or mark.grad.is_other(watched, edited=True) else mark.norm

    def prove(self, clippers: Sequence[Clipper]) -> None:
        """In the first steps, insist that what is stepped is what these have clipped; see `Proof.stepped`."""
        for clipper in clippers:
            self.proof.stepped(clipper, self._backwards)

    def void(self, clippers: Sequence[Clipper]) -> None:
        """What these have clipped counts no longer."""
        for clipper in clippers:
            self._of.pop(clipper, None)
            self.proof.forget(clipper)

    def missing(self, optimizer: Any, clippers: Sequence[Clipper]) -> list[Clipper]:
        """Which of an optimizer's clippers have not clipped for its coming step."""
        return [
            clipper
            for clipper in clippers
            if (mark := self._of.get(clipper)) is None
            or id(optimizer) in mark.taken
            or (self._is_stale_for(optimizer, mark) if mark.taken else self._is_stale(clipper))
        ]

    def _is_stale(self, clipper: Clipper) -> bool:
        """Whether a clip was of other gradients: its step was left out, and a backward has come since.

        An edit of a gradient in place is none. Where nobody counts the backward passes only another gradient tells, and
        where a step that is not clipped is clipped anyway an edit too.
        """
        mark, watched = self._of[clipper], clipper.view.here.watched()
        if 0 < self._backwards == mark.backwards:
            return False
        if mark.grad is None or mark.grad.place >= len(watched):
            return self._backwards > 0 and not mark.skips and any(p.grad is not None for p in watched)
        return mark.grad.is_other(watched, edited=self._auto or self._backwards > 0)

    def _is_stale_for(self, optimizer: Any, mark: Mark) -> bool:
        """Whether an optimizer has other gradients than those that were clipped, after another one has stepped.

        Where backward passes are counted, one of them has made the mark void.
        """
        stepped, seen = stepped_by(innermost(optimizer)), mark.apart.get(id(innermost(optimizer)))
        if self._backwards > 0:
            return False
        if seen is None or seen.place >= len(stepped):
            return any(p.grad is not None for p in stepped)
        return seen.is_other(stepped, edited=self._auto)

    def take(self, optimizer: Any, clippers: Sequence[Clipper]) -> bool:
        """Use up the marks of an optimizer's clippers for its step; whether one of them skips it."""
        marks = [mark for c in clippers if (mark := self._of.get(c)) is not None and id(optimizer) not in mark.taken]
        for mark in marks:
            mark.taken.add(id(optimizer))
        return any(mark.skips for mark in marks)

    def after_backward(self, clippers: Sequence[Clipper]) -> None:
        """Know the gradients again in the first steps; see `Proof.went_back`."""
        for clipper in clippers:
            self.proof.went_back(clipper, self._backwards)

    def look_at_weights(self, clippers: Sequence[Clipper]) -> None:
        """See whether an optimizer steps in backward; see `Proof.look_at_weights`."""
        for clipper in clippers:
            self.proof.look_at_weights(clipper)

    def before_backward(self, clippers: Sequence[Clipper]) -> None:
        """What was clipped for a model that has been stepped since counts no longer; these are all clippers."""
        self._backwards += 1
        for clipper in clippers:
            self.proof.before_backward(clipper)
        self._of = {clipper: mark for clipper, mark in self._of.items() if not mark.taken}


class Owners:
    """Of each optimizer the clippers of the models whose parameters it steps, as they were found last."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[Any, tuple[list[Tensor], list[Clipper]]] = weakref.WeakKeyDictionary()
        self._said_stranger = self._said_strays = False

    def clear(self) -> None:
        """Find all of them anew."""
        self._of.clear()

    def known(self, optimizer: Any) -> list[Clipper] | None:
        """The clippers of an optimizer; None where it has other parameters since, or nobody has looked."""
        stepped, clippers = self._of.get(optimizer, ((), None))
        return clippers if clippers is not None and are_same(stepped, stepped_by(optimizer)) else None

    def find(self, optimizer: Any, models: Sequence[tuple[nn.Module, Clipper]]) -> list[Clipper]:
        """The same, found among these models with their clippers."""
        stepped = stepped_by(optimizer)
        mine = {*map(id, stepped)}
        found = (clipper for model, clipper in models if any(id(p) in mine for p in model.parameters()))
        clippers = list(dict.fromkeys(found))  # one may be of several models
        self._of[optimizer] = stepped, clippers
        return clippers

    def strays(self, clipper: Clipper, optimizers: Iterable[Any]) -> list[str]:
        """The names of a clipper's parameters that none of these optimizers steps."""
        mine = {id(p) for optimizer in optimizers for p in stepped_by(innermost(optimizer))}
        watched, names = clipper.view.watched(), clipper.view.layout.names
        named = zip(names, watched, strict=True) if len(names) == len(watched) else (("a flat one", p) for p in watched)
        return [name for name, p in named if id(p) not in mine]

    def say_strays(self, strays: Sequence[str], needed: bool) -> None:
        """Name, once, parameters that no prepared optimizer steps.

        Args:
            strays: their names.
            needed: whether nothing is clipped for that reason.

        Raises:
            RuntimeError: if so.
        """
        if self._said_strays or not strays:
            return
        self._said_strays = True
        words = (
            f"{len(strays)} trainable parameters are in no prepared optimizer ({', '.join(strays[:5])}"
            f"{', ...' if len(strays) > 5 else ''}). Prepare their optimizer, or set requires_grad to False."
        )
        if needed:
            raise RuntimeError(f"attach(..., auto=True): nothing would be clipped. {words}")
        logger.warning("clip: %s Their gradients are measured, and nobody here sees them stepped.", words)

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

"""The steps of an accelerator's optimizers: each must be clipped before, and one that is skipped is not made."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.clippers import Clippers
from hf_gradclip.integrations.refusals import refuse_several_gradients
from hf_gradclip.optim.optimizer import ClippedOptimizer
from hf_gradclip.run.closure import once
from hf_gradclip.run.marks import Marks, Owners, is_idle
from hf_gradclip.run.unscaling import kept_unscaled
from hf_gradclip.run.updates import stepped_by
from hf_gradclip.run.wrapping import wrap, wrap_step
from hf_gradclip.wrappers import innermost


class Steps:
    """Guards the steps of the optimizers that were prepared.

    Args:
        configs: of the models.
        clippers: of the models.
        clip: clips what no clip call preceded; None where a call is insisted on.
        look: called where an optimizer is new, or has other parameters.
        missing: the error for a step that no clip call preceded; None lets it pass, since somebody else clips it.
        zeroed: called where an optimizer's gradients are taken away.

    Attributes:
        ended: whether the run is over, so that somebody else may have the optimizers.
    """

    def __init__(
        self,
        configs: Sequence[ClipConfig],
        clippers: Clippers,
        clip: Callable[[Clipper], Any] | None,
        look: Callable[[], None],
        missing: str | None,
        zeroed: Callable[[], None],
    ) -> None:
        self.marks = Marks(auto=clip is not None)
        self.owners = Owners()
        self._configs = configs
        self._clippers = clippers
        self._clip = clip
        self._look = look
        self._missing = missing
        self.zeroed = zeroed
        self._paused = False
        self._making = 0
        self._takers: dict[Clipper, weakref.ref[ClippedOptimizer]] = {}
        self.ended = False
        self._released = False

    def release(self) -> None:
        """Let every step pass as it is from now on: somebody else has the optimizers."""
        self._released = True

    def watch(self, optimizers: Iterable[Any]) -> None:
        """Wrap the step of every optimizer once.

        Raises:
            UnsupportedBackendError: by name, for one that takes several gradients for a step.
        """
        for optimizer in optimizers:
            refuse_several_gradients(innermost(optimizer), self._configs)
            if not hasattr(optimizer, "_gradclip_steps"):
                wrap_step(optimizer, _step)
                wrap(optimizer, "zero_grad", before=functools.partial(_zero_grad, weakref.ref(optimizer)))
            self._hear(innermost(optimizer))
            optimizer._gradclip_steps = self

    def _hear(self, optimizer: Any) -> None:
        """Guard the optimizer inside too, where somebody steps it in the place of the one that `prepare` returned."""
        if (self._missing is None and self._clip is None) or not hasattr(optimizer, "register_step_pre_hook"):
            return
        if optimizer not in _guards:
            optimizer.register_step_pre_hook(_before_raw)
        _guards[optimizer] = weakref.ref(self)

    def before_raw(self, optimizer: Any) -> None:
        """Insist that somebody has clipped; what is skipped loses its gradients, since the step will be made."""
        if self._making or self._paused or self.ended or self._released:
            return
        clippers = self.owners.known(optimizer) or self.owners.find(optimizer, self._clippers.models)
        if any(not is_idle(clipper) for clipper in self.marks.missing(optimizer, clippers)):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step(): this is the optimizer as it was before accelerator.prepare(), and "
                "no clip call came before its step, so that nothing of it would be clipped. Step the one that "
                "prepare() returned."
            )
        if self.marks.take(optimizer, clippers):
            for clipper in clippers:
                clipper.view.drop_()

    def cover(self, optimizers: Iterable[Any]) -> list[str]:
        """Find the parameters that are clipped and that none of these optimizers steps.

        A clipper that has none of them keeps the gradients of a skipped step, since nobody will step with them.
        """
        optimizers, found = list(optimizers), []
        self._takers.clear()
        for clipper in self._clippers.made:
            strays = self.owners.strays(clipper, optimizers)
            clipper.withheld = not strays and not clipper.view.guarded
            found += strays
            if clipper.withheld and (taker := taker_of(clipper, self.stepping(clipper, optimizers))) is not None:
                self._takers[clipper] = weakref.ref(taker)
        if len({*self._takers.values()}) < len(self._takers):
            self._takers.clear()  # one optimizer takes one plan
        return found

    def norm_of(self, clipper: Clipper) -> Tensor | None:
        """The norm of the clip of the coming step; None where one is due, as after an edit of what a plan is for."""
        norm, taker = self.marks.norm_of(clipper), self.taker(clipper)
        edited = norm is not None and taker is not None and taker.taken is not None and taker.taken.changed()
        return None if edited else norm

    def taker(self, clipper: Clipper) -> ClippedOptimizer | None:
        """The optimizer that clips as it reads what a clipper has decided on; None where gradients are written."""
        ref = self._takers.get(clipper)
        return None if ref is None else ref()

    def say_strays(self, optimizers: Iterable[Any], needed: bool = False) -> None:
        """Name those, once; see `Owners.say_strays`."""
        self.owners.say_strays(self.cover(optimizers), needed)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While optimizer state is saved or loaded: torch may step once with zero gradients to make the state."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def stepping(self, clipper: Clipper, optimizers: Iterable[Any]) -> list[Any]:
        """Those that step what a clipper clips, without wrappers."""
        models = self._clippers.models
        if len(self._clippers.made) > 1:
            optimizers = [o for o in optimizers if clipper in (self.owners.known(o) or self.owners.find(o, models))]
        return [innermost(optimizer) for optimizer in optimizers]

    def rate_of(self, clipper: Clipper, optimizers: Iterable[Any]) -> Any:
        """The learning rate of the first that steps what a clipper clips; NaN where none does."""
        groups = [group for optimizer in self.stepping(clipper, optimizers)[:1] for group in optimizer.param_groups]
        return groups[0]["lr"] if groups else float("nan")

    def configs_of(self, optimizer: Any) -> list[ClipConfig]:
        """The configurations of the models whose parameters an optimizer steps; under DeepSpeed all."""
        if self._clippers.seams is not None:
            return list(self._configs)
        clippers = self.owners.known(optimizer) or self.owners.find(optimizer, self._clippers.models)
        return [clipper.config for clipper in clippers]

    def _of(self, optimizer: Any) -> list[Clipper]:
        """The clippers of an optimizer; found anew where it is new, or has other parameters."""
        if known := self.owners.known(optimizer):
            return known
        self._look()
        return self.owners.find(optimizer, self._clippers.models)

    def _before(self, optimizer: Any) -> list[Clipper]:
        """Clip what was not yet clipped, or insist that somebody did; the clippers of the optimizer."""
        clippers = self._of(optimizer)
        if not clippers and any(p.grad is not None for p in stepped_by(innermost(optimizer))):
            self.owners.say_stranger(type(innermost(optimizer)).__name__)
        if self._clip is None:
            self.marks.prove(clippers)
        for clipper in self.marks.missing(optimizer, clippers):
            if len(clippers) > 1 and is_idle(clipper):
                continue
            if self._clip is not None:
                self._clip(clipper)
            elif self._missing is not None:
                raise RuntimeError(self._missing)
        self.marks.prove(clippers)
        return clippers

    def make(self, optimizer: Any, inner: Callable[..., Any], closure: Callable[[], Any] | None) -> Any:
        """A step of an optimizer, clipped before and reported after.

        A closure is called first, and the optimizer is given one that repeats its loss. A step that is skipped is not
        made; one with a loss scaler is left to the scaler, which must count it.
        """
        if self._paused or self._released or not optimizer.gradient_state.sync_gradients:
            return inner(closure)
        if closure is not None:
            self.marks.void(self._of(optimizer))
            closure = once(innermost(optimizer), closure)
        skips = self.marks.take(optimizer, self._before(optimizer))
        self._making += 1
        try:
            with kept_unscaled(optimizer.scaler, innermost(optimizer)):
                result = None if skips and optimizer.scaler is None else inner(closure)
        finally:
            self._making -= 1
        if skips or optimizer.scaler is None:
            optimizer._is_overflow = skips  # which Accelerate, and so its schedulers, ask for
        return result


def _step(optimizer: Any, inner: Callable[..., Any], closure: Any) -> Any:
    steps: Steps = optimizer._gradclip_steps
    return steps.make(optimizer, inner, closure)


def _zero_grad(optimizer: weakref.ref[Any], *_: Any, **__: Any) -> None:
    found = optimizer()
    if found is not None and found.gradient_state.sync_gradients:  # else nothing happens in the middle of a step
        found._gradclip_steps.zeroed()


def taker_of(clipper: Clipper, optimizers: Sequence[Any]) -> ClippedOptimizer | None:
    """The one of hf_gradclip.optim that alone steps what a clipper clips, where its kernels take the plan.

    What is clipped by unit is faster written, and flat shards of FSDP1 are written as ever.
    """
    if len(optimizers) != 1 or not isinstance(optimizers[0], ClippedOptimizer) or clipper.view.whole_only:
        return None
    places = clipper.view.places()
    taken = all(id(p) in places and places[id(p)][1] is None for p in clipper.view.watched())
    return optimizers[0] if taken else None


_guards: weakref.WeakKeyDictionary[Any, weakref.ref[Steps]] = weakref.WeakKeyDictionary()
"""Of the optimizers inside those that were prepared, who guards their steps now."""


def _before_raw(optimizer: Any, *_: Any) -> None:
    guard = _guards.get(optimizer)
    if guard is not None and (steps := guard()) is not None:
        steps.before_raw(optimizer)

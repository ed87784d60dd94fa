"""The steps of one optimizer under Lightning: each is clipped before it is made, and one that is skipped is not made.

Lightning gives `optimizer.step` a closure that runs forward, backward and its hooks. That closure is called first, then
its gradients are clipped, then the optimizer steps with a closure that only repeats the loss. So what hooks see before
the optimizer's step are the gradients before clipping, as with Lightning's own clipping.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hf_gradclip.clipper import Clipper
from hf_gradclip.run.closure import once
from hf_gradclip.run.environment import note_step
from hf_gradclip.run.marks import is_idle
from hf_gradclip.run.recording import Recording
from hf_gradclip.run.replicas import Replicas
from hf_gradclip.run.updates import are_same, stepped_by
from hf_gradclip.run.wrapping import weakly, wrap_step
from hf_gradclip.say import logger
from hf_gradclip.views.trainable import named_parameters


class Stepped:
    """An optimizer whose steps are clipped until `release`.

    Args:
        optimizer: without wrappers.
        make: a clipper of the parameters that it has now; given the one that it had before, that one goes on.
        loss: gives the loss of the step, for a strategy that judges it.
        replicas: of the run.
        recording: where every step is kept; None for nowhere.

    Attributes:
        clipper: of its gradients; the same one where it has other parameters since.
        due: a loss scaler is about to make or drop a step.
        stepped: whether a step was made, skipped or dropped since somebody set this to False.
    """

    def __init__(
        self,
        optimizer: Any,
        make: Callable[[Any, Clipper | None], Clipper],
        loss: Callable[[], Tensor | None],
        replicas: Replicas,
        recording: Recording | None,
    ) -> None:
        self.recording = recording
        self.due = self.stepped = False
        self._make = make
        self._loss = loss
        self._replicas = replicas
        self._optimizer = weakref.ref(optimizer)
        self._before = vars(optimizer).get("step")
        self._begin(optimizer, None)
        wrap_step(optimizer, weakly(self._step))

    def _begin(self, optimizer: Any, before: Clipper | None) -> None:
        self._parameters = stepped_by(optimizer)
        self.clipper = self._make(optimizer, before)
        self.clipper.withheld = True  # the step of all that it clips is ours to leave out

    def is_of(self, optimizer: Any) -> bool:
        """Whether this is the optimizer."""
        return self._optimizer() is optimizer

    def release(self) -> None:
        """Give the optimizer its own step back, and lower its rate no longer."""
        self.clipper.let_go()
        optimizer = self._optimizer()
        if optimizer is None or "step" not in vars(optimizer):
            return
        if self._before is None:
            del optimizer.step
        else:
            optimizer.step = self._before

    def settle_due(self) -> None:
        """Count a step that the loss scaler has dropped, if one was due and did not come."""
        if self.due:
            self.due, self.stepped = False, True
            self.clipper.count_overflow()

    def _step(self, optimizer: Any, inner: Callable[..., Any], closure: Callable[[], Any] | None) -> Any:
        if closure is not None:
            closure = once(optimizer, closure)
        self.due = False
        if not are_same(self._parameters, stepped_by(optimizer)):
            logger.warning(
                "%s has other parameters now, so the statistics of its clip start anew.", type(optimizer).__name__
            )
            self._begin(optimizer, self.clipper)
        if is_idle(self.clipper):
            return inner(closure)  # no backward came, as where training_step returns None
        if self.recording is not None:
            self.recording.before_step()
        loss = self._loss()
        self.clipper.step(loss)
        if self.clipper.steps == 1:
            note_step()
        self.stepped = True
        if self.recording is not None:
            self.recording.note(optimizer.param_groups[0]["lr"], loss)
        self._replicas.compare(self.clipper.view, self.clipper.steps)
        if self.clipper.config.skip_sync and self.clipper.step_was_skipped:
            return None if closure is None else closure()
        return inner(closure)


def strays(pl_module: Any, optimizers: Sequence[Any]) -> str:
    """Words for trainable parameters that no optimizer steps; "" where there are none."""
    mine = {id(p) for optimizer in optimizers for p in stepped_by(optimizer)}
    strays = [name for name, p in named_parameters(pl_module) if p.requires_grad and id(p) not in mine]
    if not strays:
        return ""
    return (
        f"clip: {len(strays)} trainable parameters are in no optimizer ({', '.join(strays[:5])}"
        f"{', ...' if len(strays) > 5 else ''}), so that their gradients are neither measured nor clipped."
    )

"""The events of a Trainer's run, told to those of its callbacks that define `on_spike`, `on_skip` or `on_nonfinite`."""

from __future__ import annotations

import weakref
from typing import Any

from hf_gradclip.events import KINDS, Event, Handler
from hf_gradclip.run.hearing import Hearing

FLAGS = {
    "stop": "should_training_stop",
    "save": "should_save",
    "evaluate": "should_evaluate",
    "log": "should_log",
}
"""What may be asked for, and the attribute of the Trainer's control that says so."""
PASSED = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
"""What callbacks are given by name, as for the Trainer's own events."""


def hearing_of(trainer: Any) -> Hearing:
    """Tells the callbacks of a Trainer of the events of its clipper."""
    events = _CallbackEvents(trainer)
    return Hearing(events.handlers, events.obey, together=True)


class _CallbackEvents:
    """Between a Trainer's clipper and its callbacks.

    A callback is called as for the Trainer's own events, `on_spike(args, state, control, event=..., **kwargs)`. What it
    sets in `control` holds on every process; `event.skip_step()` leaves the step out.

    Args:
        trainer: with `callback_handler`, `args`, `state` and `control`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = weakref.ref(trainer)

    def handlers(self) -> dict[str, Handler]:
        """By kind of event what tells the callbacks, where one of them wants to hear of it now."""
        trainer = self._trainer()
        callbacks = [] if trainer is None else trainer.callback_handler.callbacks
        return {kind: self.tell for kind in KINDS if any(hasattr(callback, kind) for callback in callbacks)}

    def tell(self, event: Event) -> None:
        """Call the callbacks; what they set in `control` is asked for."""
        trainer = self._trainer()
        if trainer is None:
            return
        given = {word: getattr(trainer.callback_handler, word, None) for word in PASSED}
        for callback in list(trainer.callback_handler.callbacks):
            if (method := getattr(callback, event.kind, None)) is not None:
                changed = method(trainer.args, trainer.state, trainer.control, event=event, **given)
                if changed is not None:
                    trainer.control = changed
        event.asked.update(word for word, flag in FLAGS.items() if getattr(trainer.control, flag))

    def obey(self, event: Event) -> None:
        """Set in `control` what was asked for on any process."""
        trainer = self._trainer()
        if trainer is not None:
            for word in event.asked & FLAGS.keys():
                setattr(trainer.control, FLAGS[word], True)

"""Accelerate: the clip call of a plain loop, the models that come and go, and the state in its checkpoints."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from operator import is_
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.attachment import Attachment
from hf_gradclip.integrations.refusals import refuse_replaced
from hf_gradclip.run.recording import Recording
from hf_gradclip.run.state import STATE_NAME, load_state, load_updates, numbered, save_state, save_updates
from hf_gradclip.run.wrapping import wrap
from hf_gradclip.say import announce
from hf_gradclip.strategy import SpecError, name_of


def attach(
    accelerator: Accelerator,
    clip: Any = "adaptive",
    *,
    auto: bool = False,
    nonfinite: str | None = None,
    max_consecutive_skips: int | None = None,
    check_every: int | None = None,
    record: str | os.PathLike[str] | None = None,
) -> LoopAttachment:
    """Let `accelerator.clip_grad_norm_` clip by a strategy. Before or after `prepare`.

    `accelerator.clip_grad_norm_(model.parameters(), max_norm)` then runs the strategy; its `max_norm` is not used,
    which is said once. A step without that call is an error, or with `auto=True` is clipped without it. State is
    saved by `save_state` and taken back by `load_state`.

    Args:
        accelerator: of this process.
        clip: see hf_gradclip.config.
        auto: clip before every optimizer step, so that the loop needs no clip call.
        nonfinite: "skip", "raise" or "pass"; wins over the spec.
        max_consecutive_skips: wins over the spec.
        check_every: wins over the spec; 0 where replicas shall differ, as under LocalSGD.
        record: a folder; every step's norms and scales go into `gradclip` in it. The record is written in
            `attachment.scalars()`, in `save_state` and in `end_training`.

    Returns:
        The attachment: `attachment.clipper` for the state, `attachment.scalars()` for the logs. The accelerator holds
        it, and what is prepared; the attachment does not hold the accelerator.

    Raises:
        SpecError: for a wrong spec.
        UnsupportedBackendError: by name, with what to use instead.
    """
    config = ClipConfig.parse(
        clip, nonfinite=nonfinite, max_consecutive_skips=max_consecutive_skips, check_every=check_every
    )
    refuse_replaced(accelerator)
    if config.record and record is None:
        raise SpecError("attach(accelerator, {'record': ...}): there is no output_dir here. Give record='a/folder'.")
    recording = None if record is None else Recording(record, accelerator.process_index, together=False)
    missing = (
        f"attach(accelerator, {name_of(config.gradient)!r}): optimizer.step() was called without "
        "accelerator.clip_grad_norm_(model.parameters(), max_norm) before it, for every model that it steps, so "
        "something would not be clipped. Add that call between backward and step (in a closure at its end), or use "
        "attach(..., auto=True)."
    )
    return LoopAttachment(accelerator, config, auto=auto, recording=recording, missing=missing)


class LoopAttachment(Attachment):
    """For a loop that a person writes: `clip_grad_norm_`, `prepare`, `free_memory`, `save_state` and `load_state`.

    Made by `attach`, with the arguments of Attachment.
    """

    def __init__(self, accelerator: Accelerator, *args: Any, **kwargs: Any) -> None:
        self._frozen: list[weakref.ref[nn.Module]] = []
        self._said_max_norm = False
        super().__init__(accelerator, *args, **kwargs)
        accelerator.clip_grad_norm_ = self._clip_call
        self._hook_checkpoints()
        self._start()

    def scalars(self) -> dict[str, float]:
        """The `clip/` values since the last call, for `accelerator.log`. One host read.

        With `histogram_every` the trackers of the accelerator get a histogram too.

        Raises:
            RuntimeError: if the replicas have come apart.
        """
        accelerator = self._accelerator()
        trackers = {} if accelerator is None else {tracker.name: tracker for tracker in accelerator.trackers}
        boards = [trackers["tensorboard"].writer] if "tensorboard" in trackers else []
        runs = [trackers["wandb"].run] if "wandb" in trackers else []
        if self._is_main:
            self.histograms.send(self.clipper, self._steps, boards, runs)
        return self.scalars_of(self.clipper)

    def _clip_call(self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor | None:
        """In the place of `accelerator.clip_grad_norm_`."""
        model = self._model_of([parameters] if isinstance(parameters, Tensor) else parameters)
        if not self._said_max_norm and self._is_main:
            self._said_max_norm = True
            announce(f"clip_grad_norm_(max_norm={max_norm}): the strategy decides, this number is not used.")
        if self._clippers.seams is None and not self.accelerator.sync_gradients:
            return self.clipper_of(model).view.measure(self.config.gradient.needs).total
        return self.clip(model)

    def _model_of(self, parameters: Iterable[Tensor]) -> nn.Module:
        """The prepared model whose trainable parameters these are.

        Raises:
            ValueError: if they are not all those of one model.
        """
        in_order = [p for p in parameters if p.requires_grad]
        for model, clipper in self._clippers.models:
            watched = clipper.view.watched()
            if watched and len(watched) == len(in_order) and all(map(is_, watched, in_order)):
                return model
        given, sizes = {*map(id, in_order)}, []
        for model in self.accelerator._models:  # in another order, or not known to the view
            trainable = {id(p) for p in model.parameters() if p.requires_grad}
            if given == trainable:
                return model
            sizes.append(len(trainable))
        raise ValueError(
            f"accelerator.clip_grad_norm_({len(given)} trainable parameters): must be all trainable parameters of one "
            f"prepared model, which have {sizes or 'none been prepared'}. Pass model.parameters()."
        )

    def _follow(self, accelerator: Accelerator) -> None:
        """Make the clippers for what is prepared now, and for what `prepare` brings later."""
        wrap(accelerator, "prepare", before=self._before_prepare, result_to=self._replicas.meet, then=self._start)
        wrap(accelerator, "backward", before=self._before_backward, then=self._after_backward)
        wrap(accelerator, "free_memory", before=self._let_go)

    def _let_go(self, *_: Any) -> None:
        """Before Accelerate drops its models: write and say what there is of them, and hold them no longer."""
        if self._clippers.made and not self._finished:
            self.finish()
        if self.recording is not None:
            self.recording.let_go()
        self.forget()

    def _start(self) -> None:
        """Make the missing clippers and watch the new optimizers."""
        self._frozen = []
        for model in self.accelerator._models:
            if any(p.requires_grad for p in model.parameters()):
                self.clipper_of(model)
            else:
                self._frozen.append(weakref.ref(model))
        self.watch_optimizers()

    def _after_backward(self) -> None:
        """Start what was prepared by hand, or unfrozen; note what DeepSpeed did in backward."""
        frozen = (model for ref in self._frozen if (model := ref()) is not None)
        if self._is_behind() or any(p.requires_grad for model in frozen for p in model.parameters()):
            self._start()
        if self._clippers.seams is not None:
            self._norm_of_engine()
        elif self.auto and self._steps == 0 and not self.accelerator._optimizers:
            self._steps_of.say_strays([], needed=True)

    def _hook_checkpoints(self) -> None:
        """State goes with `save_state` and `load_state`, through their pre-hooks: other checkpoints still load."""
        for name in ("save_state", "load_state"):
            wrap(self.accelerator, name, inside=self.paused)
        wrap(self.accelerator, "end_training", before=self.finish)

        def save(models: list[nn.Module], weights: Any, output_dir: str) -> None:
            if self.recording is not None:
                self.recording.save_step(output_dir)
            if self._is_main:
                for i, model in enumerate(self.accelerator._models):
                    if (clipper := self._clippers.known(model)) is not None:
                        save_state(clipper, os.path.join(output_dir, numbered(STATE_NAME, i)))
                save_updates(self.updates.clippers, output_dir)

        def load(models: list[nn.Module], input_dir: str) -> None:
            for i, model in enumerate(self.accelerator._models):
                if (clipper := self._clippers.known(model)) is not None:
                    path = os.path.join(input_dir, numbered(STATE_NAME, i))
                    load_state(clipper, path, say=self._is_main)
            load_updates(self.updates.clippers, input_dir, say=self._is_main)
            if self.recording is not None:
                self.recording.load_step(input_dir)

        self.accelerator.register_save_state_pre_hook(save)
        self.accelerator.register_load_state_pre_hook(load)

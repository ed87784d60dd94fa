"""Accelerate: the clip call of a plain loop, the models that come and go, and the state in its checkpoints."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import Clip
from hf_gradclip.events import Handler
from hf_gradclip.integrations.arguments import insist_on_accelerator, insist_on_switches, record_folder
from hf_gradclip.integrations.attachment import Attachment
from hf_gradclip.integrations.calls import model_of, norm_of
from hf_gradclip.integrations.models import Models
from hf_gradclip.integrations.refusals import refuse_replaced
from hf_gradclip.misuse import listed
from hf_gradclip.run.hearing import Hearing
from hf_gradclip.run.recording import Recording
from hf_gradclip.run.state import STATE_NAME, load_state, load_updates, numbered, save_state, save_updates
from hf_gradclip.run.wrapping import wrap
from hf_gradclip.say import announce, logger
from hf_gradclip.strategy import name_of


def attach(
    accelerator: Accelerator,
    clip: Clip = "adaptive",
    *,
    auto: bool = False,
    joint: bool = False,
    nonfinite: str | None = None,
    max_consecutive_skips: int | None = None,
    check_every: int | None = None,
    record: str | os.PathLike[str] | None = None,
    after_spike: str | None = None,
    on_spike: Handler | None = None,
    on_skip: Handler | None = None,
    on_nonfinite: Handler | None = None,
) -> LoopAttachment:
    """Let `accelerator.clip_grad_norm_` clip by a strategy. Before or after `prepare`.

    `accelerator.clip_grad_norm_(model.parameters(), max_norm)` then runs the strategy; its `max_norm` is not used,
    which is said once. A step without that call is an error, or with `auto=True` is clipped without it. State is
    saved by `save_state` and taken back by `load_state`.

    Args:
        accelerator: of this process.
        clip: see hf_gradclip.config. With several models also {model: spec, ...}, by the model as it was before
            `prepare` or as that returned it; every model that is prepared and has trainable parameters must be named,
            so that after `free_memory` other models need an Accelerator of their own.
        auto: clip before every optimizer step, so that the loop needs no clip call.
        joint: clip all prepared models by one norm; a clip call is given the parameters of all of them.
        nonfinite: "skip", "raise" or "pass"; wins over the spec.
        max_consecutive_skips: wins over the spec.
        check_every: wins over the spec; 0 where replicas shall differ, as under LocalSGD.
        record: a folder; every step's norms and scales go into `gradclip` in it, and where {model: spec, ...} names
            several models, of each into a folder in it that is called as its class. The record is written in
            `attachment.scalars()`, in `save_state` and in `end_training`.
        after_spike: wins over the spec.
        on_spike: called with an Event of hf_gradclip.events in a step whose norm stands out, before it is clipped.
        on_skip: the same in a step that is left out.
        on_nonfinite: the same in one whose norm is NaN or inf.

    Returns:
        The attachment: `attachment.clipper` for the state, `attachment.scalars()` for the logs. The accelerator holds
        it, and what is prepared; the attachment does not hold the accelerator.

    Raises:
        TypeError: for something else than an Accelerator.
        SpecError: for a wrong spec.
        UnsupportedBackendError: by name, with what to use instead.
    """
    insist_on_accelerator(accelerator)
    insist_on_switches(auto=auto, joint=joint)
    models = Models.parse(
        clip,
        joint,
        nonfinite=nonfinite,
        max_consecutive_skips=max_consecutive_skips,
        check_every=check_every,
        after_spike=after_spike,
    )
    refuse_replaced(accelerator)
    folder = record_folder(record, models.config)
    missing = (
        f"attach(accelerator, {name_of(models.config.gradient)!r}): optimizer.step() was called without "
        "accelerator.clip_grad_norm_(model.parameters(), max_norm) before it, for every model that it steps, so "
        "something would not be clipped. Add that call between backward and step (in a closure at its end), or use "
        "attach(..., auto=True)."
    )
    handlers = {"on_spike": on_spike, "on_skip": on_skip, "on_nonfinite": on_nonfinite}
    hearing = Hearing(lambda: handlers)
    return LoopAttachment(folder, accelerator, models, auto=auto, missing=missing, hearing=hearing)


class LoopAttachment(Attachment):
    """For a loop that a person writes: `clip_grad_norm_`, `prepare`, `free_memory`, `save_state` and `load_state`.

    Made by `attach`, with the arguments of Attachment after the folder of the record.
    """

    def __init__(
        self, record: str | os.PathLike[str] | None, accelerator: Accelerator, *args: Any, **kwargs: Any
    ) -> None:
        self._folder = record
        self._by_name: dict[str, Recording] = {}
        self._frozen: list[weakref.ref[nn.Module]] = []
        self._said_max_norm = self._said_value = self._said_others = False
        super().__init__(accelerator, *args, **kwargs)
        accelerator.clip_grad_norm_ = self._clip_call
        wrap(accelerator, "clip_grad_value_", before=self._before_clip_value)
        self._hook_checkpoints()
        self._start()

    def _micro_batches(self) -> int:
        return self.accelerator.gradient_accumulation_steps

    def scalars(self) -> dict[str, float]:
        """The `clip/` values since the last call, for `accelerator.log`. One host read per model.

        Where there are several models, and no `joint`, the values of each begin with `clip_` and the name of its class.
        With `histogram_every` the trackers of the accelerator get a histogram too. Events that come late are told here,
        where the processes agree on what is asked for, so that all of them must call this.

        Raises:
            RuntimeError: if the replicas have come apart.
        """
        accelerator = self._accelerator()
        if not self._clippers.made:
            return self.scalars_of(self.clipper)  # which says that nothing was prepared
        trackers = {} if accelerator is None else {tracker.name: tracker for tracker in accelerator.trackers}
        boards = [trackers["tensorboard"].writer] if "tensorboard" in trackers else []
        runs = [trackers["wandb"].run] if "wandb" in trackers else []
        if self._is_main:
            self.histograms.send(self._clippers.made, boards, runs)
        found: dict[str, float] = {}
        for clipper in self._clippers.made:
            found |= self.scalars_of(clipper)
        return found

    def end(self) -> None:
        """`finish`, where a loop is over and did not call `end_training`; no rank waits for another."""
        if self._clippers.made and not self._finished:
            self.finish(alone=True)

    @property
    def _records(self) -> bool:
        return self._folder is not None

    def _recording_for(self, model: nn.Module) -> Recording | None:
        """The one of this folder; where models are named and several, each has a folder in it."""
        if self._folder is None:
            return None
        folder = os.path.join(self._folder, self.models.name(model) if self.models.several else "")
        if folder not in self._by_name:
            self._by_name[folder] = Recording(folder, self.accelerator.process_index, together=False)
        return self._by_name[folder]

    def _clip_call(self, parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Tensor | None:
        """In the place of `accelerator.clip_grad_norm_`."""
        given = listed(parameters, "accelerator.clip_grad_norm_")
        try:
            model = model_of(given, self._clippers.models, self.accelerator._models, self.models.joint)
        except ValueError:
            if not self.auto or self._clippers.seams is not None or self.accelerator.scaler is not None:
                raise
            if not self._said_others and self._is_main:
                self._said_others = True
                announce(
                    "clip_grad_norm_ of other parameters than those of one model clips nothing: with auto=True every "
                    "step is clipped when it is made. attach(..., joint=True) takes one norm over all models."
                )
            return norm_of(given)
        if not self._said_max_norm and self._is_main:
            self._said_max_norm = True
            announce(f"clip_grad_norm_(max_norm={max_norm}): the strategy decides, this number is not used.")
        if self._clippers.seams is None and not self.accelerator.sync_gradients:
            clipper = self.clipper_of(model)
            return clipper.view.measure(clipper.config.gradient.needs).total
        return self.clip(model)

    def _before_clip_value(self, parameters: Any, clip_value: float) -> None:
        """Say once that a loop clips elements itself, before a strategy or after it."""
        self._steps_of.marks.proof.expect_edit()
        if not self._said_value and self._is_main:
            self._said_value = True
            logger.warning(
                "accelerator.clip_grad_value_(clip_value=%s): it clips beside the strategy. Called before it, it hides "
                "from the strategy, and from the record, how large the gradients were. Leave it out, or put it at the "
                "end of the spec: +value:max_value=%s.",
                clip_value,
                clip_value,
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
        for recording in self._recordings.values():
            recording.let_go()
        self.forget()

    def _start(self) -> None:
        """Make the missing clippers and watch the new optimizers."""
        self._frozen = []
        trained = []
        for model in self.accelerator._models:
            if any(p.requires_grad for p in model.parameters()):
                trained.append(model)
            else:
                self._frozen.append(weakref.ref(model))
        if self.models.joint and trained:
            if (clipper := self._clippers.join(trained, self.accelerator)) is not None:
                self._begin(clipper, trained[0])
        else:
            for model in trained:
                self.clipper_of(model)
        self.watch_optimizers()

    def _watch_updates(self) -> None:
        self._start_late()
        super()._watch_updates()

    def _start_late(self) -> None:
        """Start what was prepared by hand, or unfrozen."""
        frozen, self._frozen = self._frozen, []
        if any(p.requires_grad for ref in frozen if (model := ref()) is not None for p in model.parameters()):
            self._start()
        else:
            self._frozen = frozen

    def _after_backward(self) -> None:
        """Start what was prepared by hand, or unfrozen; note what DeepSpeed did in backward."""
        super()._after_backward()
        if self._is_behind():
            self._start()
        self._start_late()
        if self._clippers.seams is not None:
            self._norm_of_engine()
            return
        self._steps_of.marks.after_backward(self._clippers.made)
        if self.auto and self._steps == 0 and not self.accelerator._optimizers:
            self._steps_of.say_strays([], needed=True)

    def _numbered(self) -> list[tuple[int, Clipper]]:
        """Each clipper once, with the place among the prepared models of the first that it is of."""
        found: dict[Clipper, int] = {}
        for i, model in enumerate(self.accelerator._models):
            if (clipper := self._clippers.known(model)) is not None:
                found.setdefault(clipper, i)
        return [(i, clipper) for clipper, i in found.items()]

    def _hook_checkpoints(self) -> None:
        """State goes with `save_state` and `load_state`, through their pre-hooks: other checkpoints still load."""
        for name in ("save_state", "load_state"):
            wrap(self.accelerator, name, inside=self.paused)
        wrap(self.accelerator, "end_training", before=self.finish)

        def save(models: list[nn.Module], weights: Any, output_dir: str) -> None:
            for i, clipper in self._numbered():
                clipper.events.look()
                if (recording := self._recordings.get(clipper)) is not None:
                    recording.save_step(output_dir, i)
                if self._is_main:
                    save_state(clipper, os.path.join(output_dir, numbered(STATE_NAME, i)))
            if self._is_main:
                save_updates(self.updates.clippers, output_dir)

        def load(models: list[nn.Module], input_dir: str) -> None:
            for i, clipper in self._numbered():
                load_state(clipper, os.path.join(input_dir, numbered(STATE_NAME, i)), say=self._is_main)
            load_updates(self.updates.clippers, input_dir, say=self._is_main)
            for i, clipper in self._numbered():
                if (recording := self._recordings.get(clipper)) is not None:
                    recording.load_step(input_dir, i)

        self.accelerator.register_save_state_pre_hook(save)
        self.accelerator.register_load_state_pre_hook(load)

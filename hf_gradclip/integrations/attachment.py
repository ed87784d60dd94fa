"""The clippers of an accelerator, and the optimizer steps they guard; what a Trainer and a plain loop have in common.

What a step needs to know of models and optimizers is found when they are prepared; a step itself only compares how
many there are. A skipped step and the loss scale are handled here, in one place.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.clippers import Clippers
from hf_gradclip.integrations.models import Models
from hf_gradclip.integrations.refusals import refuse_release, refuse_second_record, refuse_swap, refuse_unsupported
from hf_gradclip.integrations.steps import Steps
from hf_gradclip.logged import pick
from hf_gradclip.run.advice import Advice
from hf_gradclip.run.environment import note_step
from hf_gradclip.run.hearing import Hearing
from hf_gradclip.run.histogram import Histograms
from hf_gradclip.run.loss import StepLoss
from hf_gradclip.run.recording import Recording
from hf_gradclip.run.replicas import Replicas
from hf_gradclip.run.startup import in_force, substitute_for
from hf_gradclip.run.tested import insist_on_hooks
from hf_gradclip.run.unscaling import forget_unscaled
from hf_gradclip.run.updates import Updates
from hf_gradclip.run.wrapping import weakly, wrap
from hf_gradclip.say import announce, logger
from hf_gradclip.wrappers import innermost


class Attachment:
    """The clippers of an accelerator: one per prepared model, each with its own state, or one for all of them.

    Args:
        accelerator: of this process.
        models: what is done to which.
        auto: clip before every optimizer step that no clip call preceded.
        recording: where every step of the one model is kept; see `_recording_for`.
        missing: the error for a step that no clip call preceded; None lets it pass, since somebody else clips it.
        hearing: who is told of events; None for nobody.

    Raises:
        UnsupportedBackendError: see `refuse_unsupported`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        models: Models,
        auto: bool = False,
        recording: Recording | None = None,
        missing: str | None = None,
        hearing: Hearing | None = None,
    ) -> None:
        insist_on_hooks("torch", torch.__version__, torch.optim.Optimizer)
        insist_on_hooks("accelerate", accelerate.__version__, Accelerator)
        refuse_unsupported(accelerator)
        self._is_main = accelerator.is_main_process
        if self._is_main and (words := substitute_for(accelerator)):
            logger.warning(words)
        self._accelerator = weakref.ref(accelerator)
        self.models = models
        self.auto = auto
        config = models.config
        self.updates = Updates(config, self._is_main, models.name)
        self.recording = recording
        self._recordings: dict[Clipper, Recording] = {}
        self.histograms = Histograms(config.histogram_every)
        self._hears_loss = models.hears_loss or self._records
        loss = weakly(self._judged_loss) if self._hears_loss else lambda: None
        self._clippers = Clippers(models, self.updates, loss, hearing or Hearing(), accelerator.device)
        clip, look = weakly(self._clip), weakly(self._watch_updates)
        self._replicas, self._loss, self._advice = Replicas(config.check_every), StepLoss(), Advice()
        self._steps_of = Steps(models.configs, self._clippers, clip if auto else None, look, missing, self._loss.drop)
        self._prepared: tuple[int, int] | None = None
        self._loss_of_step: Tensor | None = None
        self._steps, self._finished = 0, False
        self._follow(accelerator)

    def __repr__(self) -> str:
        made = ", ".join(f"{clipper!r} after {clipper.report.steps} steps" for clipper in self._clippers.made)
        return f"{type(self).__name__}({made or f'{self.models.config}, no model is prepared'})"

    def paused(self) -> AbstractContextManager[None]:
        """While optimizer state is saved or loaded: torch may step once with zero gradients to make the state."""
        return self._steps_of.paused()

    @property
    def _records(self) -> bool:
        """Whether every step is kept."""
        return self.recording is not None

    def _recording_for(self, model: nn.Module) -> Recording | None:
        """Where the steps of a model are kept that comes now."""
        return self.recording

    @property
    def accelerator(self) -> Accelerator:
        """Of this process; it holds the attachment, and not the other way round."""
        accelerator = self._accelerator()
        if accelerator is None:
            raise ReferenceError(
                "the Accelerator of this attachment is gone: keep it as long as you use the attachment."
            )
        return accelerator

    @property
    def clipper(self) -> Clipper:
        """The clipper of the one prepared model.

        Raises:
            ValueError: if no model, or more than one, was prepared.
        """
        made = self._clippers.made
        if len(made) != 1:
            raise ValueError(
                f"attachment.clipper: there are {len(made)} prepared models with trainable parameters. "
                "Use attachment.clipper_of(model)."
            )
        return made[0]

    def scalars_of(self, clipper: Clipper) -> dict[str, float]:
        """The values of one clipper and of the updates since the last call.

        Raises:
            RuntimeError: if the replicas have come apart.
            NonFiniteError: with `skip_sync=False`, after too many skipped steps in a row.
        """
        self._replicas.insist()
        clipper.check_skips()
        if (recording := self._recordings.get(clipper)) is not None:
            recording.flush()
        scalars = clipper.report.scalars()
        if self._is_main:
            self._advice.at_log(clipper, scalars, self._steps_of.stepping(clipper, self.accelerator._optimizers))
        return pick(scalars | self.updates.scalars(), clipper.config.log)

    def clipper_of(self, model: nn.Module) -> Clipper:
        """The clipper of a model, made at the first call. The model may be wrapped or not."""
        known = self._clippers.known(model)
        if known is not None:
            return known
        refuse_second_record(self._records and bool(self._clippers.made) and not self.models.by_model)
        return self._begin(self._clippers.make(model, self.accelerator), model)

    def _begin(self, clipper: Clipper, model: nn.Module) -> Clipper:
        """A clipper is new: record it, and say what is in force."""
        if (recording := self._recording_for(model)) is not None:
            self._recordings[clipper] = recording
            clipper.events.examples = weakly(recording.examples)
        self._steps_of.owners.clear()
        self._prepared = None
        self._record()
        if self._is_main:
            accelerator = self.accelerator
            announce(in_force(clipper, accelerator.num_processes, accelerator.distributed_type.value))
        return clipper

    def finish(self, alone: bool = False) -> None:
        """At the end of a run, on every rank or `alone`: write the rest of the record; rank 0 says what was done."""
        self._finished = self._steps_of.ended = True
        for recording in self._recordings.values():
            recording.finish()
        if not alone:
            self._replicas.finish(clipper.view for clipper in self._clippers.made)
        if self._is_main:
            for clipper in (*self._clippers.made, *self.updates.clippers):
                announce(clipper.report.closing_line())

    def start_after(self, step: int) -> None:
        """Events count on from a step of the run."""
        for clipper in self._clippers.made:
            clipper.events.start_after(step)

    def hear(self) -> None:
        """Tell of events to those who want to hear of them now; on every rank."""
        self._clippers.hear()

    def forget(self) -> None:
        """Drop all clippers: the next call makes new ones."""
        self._clippers.forget()
        self._recordings.clear()
        self._steps_of.owners.clear()
        self._prepared = None
        self._steps_of.marks.clear()
        self.updates.forget()
        self._loss.forget()
        self._finished = False

    def release(self) -> None:
        """Clip no longer, and leave the optimizers as they would be; under DeepSpeed UnsupportedBackendError."""
        refuse_release(self._clippers.seams is not None)
        self.forget()
        self._steps_of.release()
        self._hears_loss = False

    def adopt(self, config: ClipConfig) -> None:
        """Go on with another configuration, see `Clipper.adopt`; not under DeepSpeed."""
        self._clippers.adopt(config)

    def clip(self, model: nn.Module) -> Tensor | None:
        """Clip the gradients of one model; the norm before clipping, 0-d, on the device.

        Under DeepSpeed the step is done by now, and this is the norm that was decided on in it.
        """
        known = self._clippers.of_model.get(model)
        return self._clip(self.clipper_of(model) if known is None else known)

    def _clip(self, clipper: Clipper) -> Tensor | None:
        if self._clippers.seams is not None:
            return self._norm_of_engine()  # decided and applied inside backward
        if self._is_behind():
            self.watch_optimizers()
        if (norm := self._steps_of.norm_of(clipper)) is not None:
            return norm  # a second call for one step
        self._steps_of.marks.proof.before_clip(clipper)
        self._replicas.refuse_join(self.models.hears_loss, clipper.events)
        if (recording := self._recordings.get(clipper)) is not None:
            recording.begin()
            recording.before_step()
        self._steps += 1
        norm = clipper.step(self._judged_loss(clipper) if self._hears_loss else None, self._steps_of.taker(clipper))
        if recording is not None:
            self._note(clipper, recording)
        if self._steps == 1:
            note_step()
            self._steps_of.say_strays(self.accelerator._optimizers)
            if self._is_main and (words := self.models.absent(model for model, _ in self._clippers.models)):
                logger.warning(words)
        self._replicas.compare(clipper.view, clipper.steps)
        self._steps_of.marks.set(clipper, norm, self._steps_of.stepping(clipper, self.accelerator._optimizers))
        return norm

    def _norm_of_engine(self) -> Tensor | None:
        """The norm of DeepSpeed's last step, taken inside backward; the step is noted once."""
        seams = self._clippers.seams
        if seams.stepped:
            seams.stepped = False
            self._steps += 1
            if self._steps == 1:
                note_step()
            if (recording := self._recordings.get(seams.clipper)) is not None:
                self._note(seams.clipper, recording)
        return seams.norm

    def _judged_loss(self, clipper: Clipper | None = None) -> Tensor | None:
        """The loss of the step, reduced over ranks, where the strategy judges it; else it is for the record only.

        Where one of several models is judged by it, it is reduced at whichever clip comes first.
        """
        self._loss_of_step = self._loss.reduced(clipper) if self.models.hears_loss else self._loss.local(clipper)
        judged = (self.models.config if clipper is None else clipper.config).gradient.needs.loss
        return self._loss_of_step if judged else None

    def _note(self, clipper: Clipper, recording: Recording) -> None:
        """Tell a record what it cannot see of the step that was decided on last."""
        recording.note(self._steps_of.rate_of(clipper, self.accelerator._optimizers), self._loss_of_step)

    def _record(self) -> None:
        several = len(self._recordings) > 1
        for clipper, recording in self._recordings.items():
            recording.watch(clipper, self.updates.of(clipper) if several else self.updates.clippers)

    def _is_behind(self) -> bool:
        """Whether something was prepared since, or an optimizer could not be watched yet."""
        accelerator = self.accelerator
        now = len(accelerator._models), len(accelerator._optimizers)
        return now != self._prepared or not self.updates.settled

    def watch_optimizers(self) -> None:
        """Wrap the step of every prepared optimizer once: a step must be clipped, and a skip must be seen."""
        accelerator = self.accelerator
        self._prepared = len(accelerator._models), len(accelerator._optimizers)
        if self._is_main:
            for optimizer in accelerator._optimizers:
                self._advice.at_start(innermost(optimizer), self._steps_of.configs_of(optimizer))
        for clipper in self._clippers.made:
            clipper.events.hold(self._steps_of.stepping(clipper, accelerator._optimizers))
        if self._clippers.seams is not None:  # DeepSpeed steps inside backward; the optimizer's own step does nothing
            for optimizer in accelerator._optimizers:
                if hasattr(optimizer.optimizer, "overflow"):  # without ZeRO it was not there when Accelerate looked
                    optimizer.__has_overflow__ = True
            return
        self._steps_of.watch(accelerator._optimizers)
        self._watch_updates()
        if self.models.config.fold or not self.models.config.skip_sync:
            self._fold()

    def _watch_updates(self) -> None:
        self._steps_of.cover(self.accelerator._optimizers)
        self.updates.watch(self.accelerator._optimizers, [model for model, _ in self._clippers.models])
        self._record()

    def _fold(self) -> None:
        """Tell every clipper of the one optimizer that takes its numbers."""
        models, optimizers = self._clippers.models, self.accelerator._optimizers
        for clipper in self._clippers.made:
            mine = [o for o in optimizers if clipper in self._steps_of.owners.find(o, models)]
            if mine and not clipper.folds:
                clipper.fold_into(innermost(mine[0]))

    def _follow(self, accelerator: Accelerator) -> None:
        """Look at what is prepared before it is, and, where there is something to see, at every backward."""
        wrap(accelerator, "prepare", before=self._before_prepare, result_to=self._replicas.meet)
        if self._hears_loss or accelerator.distributed_type != DistributedType.DEEPSPEED:
            wrap(accelerator, "backward", before=self._before_backward, then=self._after_backward)

    def _micro_batches(self) -> int:
        """Of a step, where `backward` is given the loss of each; 1 of a Trainer, which has divided it."""
        return 1

    def _before_prepare(self, *objects: Any, **_: Any) -> None:
        refuse_swap(self.accelerator, *objects)

    def _before_backward(self, loss: Tensor, **_: Any) -> None:
        self._steps_of.ended = False
        if self._clippers.seams is None:
            self._steps_of.marks.before_backward(self._clippers.made)
            forget_unscaled(self.accelerator.scaler)
        if self._hears_loss:
            self._loss.add(loss, self._micro_batches())
        for recording in self._recordings.values():
            recording.begin()

    def _after_backward(self) -> None:
        if self._clippers.seams is None:
            self._steps_of.marks.look_at_weights(self._clippers.made)

"""Lightning: a callback that clips by strategy, for `lightning.pytorch` and `pytorch_lightning` alike.

`Trainer(callbacks=[GradClip("adaptive")])`
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.events import KINDS, Event, Handler
from hf_gradclip.integrations.lightning_bases import bases
from hf_gradclip.integrations.lightning_refusals import insist_on_spec, refuse_clips, refuse_optimizers, refuse_run
from hf_gradclip.integrations.lightning_state import kept, take
from hf_gradclip.integrations.lightning_steps import Stepped, strays
from hf_gradclip.logged import pick
from hf_gradclip.run.advice import Advice
from hf_gradclip.run.hearing import Hearing
from hf_gradclip.run.histogram import Histograms
from hf_gradclip.run.loss import StepLoss
from hf_gradclip.run.recording import Recording
from hf_gradclip.run.replicas import Replicas
from hf_gradclip.run.startup import check_run, in_force, insist_on_one_layout
from hf_gradclip.run.updates import Updates, stepped_by
from hf_gradclip.say import announce, logger
from hf_gradclip.views import view_of
from hf_gradclip.views.trainable import Part, named_parameters
from hf_gradclip.watching import Events


class GradClip(*bases()):  # type: ignore[misc]
    """Clips before every optimizer step of a Lightning run, in automatic and in manual optimization.

    What it did is logged with the module's own values, every `log_every_n_steps`. Its state is in the checkpoints. A
    step that is skipped is not made: no weight, moment, decay or counter of the optimizer moves; the loop and its
    schedulers go on, as they do when a loss scaler drops a step.

    Args:
        clip: see hf_gradclip.config. With several optimizers (manual optimization) each has a state of its own, and
            from the second on its keys begin with `clip_1/`, `clip_2/`, ...
        on_spike: called with an Event of hf_gradclip.events in a step whose norm stands out, before it is clipped.
        on_skip: the same in a step that is left out.
        on_nonfinite: the same in one whose norm is NaN or inf.

    Raises:
        SpecError: for a wrong spec.
        TypeError: for a handler that is no function.
        UnsupportedBackendError: by `trainer.fit`, see lightning_refusals.py.
    """

    def __init__(
        self,
        clip: str | float | dict[str, Any] | ClipConfig = "adaptive",
        *,
        on_spike: Handler | None = None,
        on_skip: Handler | None = None,
        on_nonfinite: Handler | None = None,
    ) -> None:
        super().__init__()
        self.config = ClipConfig.parse(clip)
        insist_on_spec(self.config)
        self._handlers = dict(zip(KINDS, (on_spike, on_skip, on_nonfinite), strict=True))
        Events(self.config).hear(self._handlers)  # which says at once what cannot be called
        self._loaded: dict[str, Any] = {}
        self._resumes = False
        self._steps: list[Stepped] = []
        self._undo: Callable[[], None] | None = None
        self._updates = Updates(self.config, say=False)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, as for processes that are spawned, is of no run yet; it has the state that a checkpoint keeps."""
        alone = {"_steps": [], "_loaded": self.state_dict(), "_resumes": False}
        return {"config": self.config, "_handlers": self._handlers, **alone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._undo = None
        self._updates = Updates(self.config, say=False)

    @property
    def clippers(self) -> list[Clipper]:
        """Of the optimizers, in their order; empty before `fit`."""
        return [steps.clipper for steps in self._steps]

    @property
    def clipper(self) -> Clipper:
        """The clipper of the one optimizer.

        Raises:
            ValueError: if there is none yet, or more than one.
        """
        if len(self._steps) != 1:
            raise ValueError(f"GradClip.clipper: there are {len(self._steps)} optimizers now. Use GradClip.clippers.")
        return self._steps[0].clipper

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what would not be clipped, before a checkpoint is read."""
        self._loaded, self._resumes = {}, False
        if stage == "fit":
            refuse_run(trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take over the steps of the optimizers, which are there now; the state of a checkpoint has come before."""
        self._release()
        config = self.config
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._replicas, self._loss, self._advice = Replicas(config.check_every), StepLoss(), Advice()
        self._replicas.meet(trainer.strategy.model)
        self._updates = Updates(config, trainer.is_global_zero)
        self._histograms = Histograms(config.histogram_every)
        self._hears = Hearing(lambda: self._handlers, lambda event: _obey(trainer, event))
        self._recording = None
        if config.record:
            self._recording = Recording(trainer.default_root_dir, trainer.global_rank, together=True)
        self._steps = []
        self._begin(trainer, pl_module)
        self._undo = refuse_clips(trainer.precision_plugin)
        if self._resumes or self._loaded:
            for words in take(self._loaded, self.clippers, self._updates.clippers):
                if trainer.is_global_zero:
                    logger.warning("the checkpoint: %s", words)
        self._loaded, self._resumes = {}, False

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        """Take over the steps of the optimizers that are there now, in the place of earlier ones."""
        optimizers = trainer.optimizers
        refuse_optimizers(optimizers, self.config, self._scaler)
        before, self._steps = self._steps, []
        for steps in before:
            steps.release()
        self._updates.forget()
        for i, optimizer in enumerate(optimizers):
            make = functools.partial(self._clipper_for, trainer, pl_module, i)
            self._steps.append(Stepped(optimizer, make, self._loss_of_step, self._replicas, self._recording))
            if trainer.is_global_zero:
                self._advice.at_start(optimizer, [self.config])
        if trainer.is_global_zero and (words := strays(pl_module, optimizers)):
            logger.warning(words)

    def _clipper_for(
        self, trainer: Any, pl_module: Any, i: int, optimizer: Any, before: Clipper | None = None
    ) -> Clipper:
        """A clipper of the parameters that an optimizer has now, the same on all ranks; `before` goes on with them."""
        device, mine = trainer.strategy.root_device, {*map(id, stepped_by(optimizer))}
        named = [(name, p) for name, p in named_parameters(pl_module) if id(p) in mine]
        view = view_of(Part(pl_module, named))
        clipper = before or Clipper(self.config, view, f"clip_{i}" if i else "clip")
        if before is not None:
            clipper.turn_to(view)
        insist_on_one_layout(clipper, device)
        self._hears.begin(clipper, f"optimizer {i}" if len(trainer.optimizers) > 1 else "", device)
        clipper.events.hold([optimizer])
        if self.config.fold or not self.config.skip_sync:
            clipper.fold_into(optimizer)
        self._updates.watch([optimizer], [pl_module])
        if self._recording is not None:
            self._recording.watch(clipper, self._updates.clippers)
        if trainer.is_global_zero:
            announce(in_force(clipper, trainer.world_size, "DDP"))
        return clipper

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The step is known now, that of a checkpoint or 0."""
        if self._recording is not None:
            self._recording.start_after(trainer.global_step)
        self._count_on(trainer)
        steps = trainer.estimated_stepping_batches
        if trainer.is_global_zero and self._steps:
            for words in check_run(self._steps[0].clipper, int(steps) if steps != float("inf") else None):
                logger.warning(words)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Somebody may have brought other optimizers."""
        optimizers = trainer.optimizers
        if len(optimizers) != len(self._steps) or not all(map(Stepped.is_of, self._steps, optimizers)):
            logger.warning("The optimizers are other ones now, so the clip state starts anew.")
            self._begin(trainer, pl_module)
            self._count_on(trainer)
        for steps in self._steps:
            steps.stepped = False

    def _count_on(self, trainer: Any) -> None:
        """Events count on from the step of the run. Of several each counts its own; the run adds them up."""
        if len(self._steps) == 1:
            self.clipper.events.start_after(trainer.global_step)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Hear the loss, which Lightning has divided by `accumulate_grad_batches`, and multiplied by a loss scale.

        With a loop of one's own it has not divided it. The last step of an epoch may be of fewer batches.
        """
        if self.config.gradient.needs.loss or self._recording is not None:
            loss = loss.detach().float()
            if self._scaler is not None:
                loss = loss / self._scaler.scale(torch.ones((), device=loss.device))
            batches = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._loss.add(loss * batches, batches)

    def _loss_of_step(self) -> Tensor | None:
        if self.config.gradient.needs.loss:
            return self._loss.reduced()
        return None if self._recording is None else self._loss.local()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Insist that the step is ours to clip. Under a loss scaler it is due now, and may be dropped.

        Raises:
            RuntimeError: for an optimizer that came after `on_train_batch_start`.
        """
        steps = next((steps for steps in self._steps if steps.is_of(optimizer)), None)
        if steps is None:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step(): this optimizer is not one of trainer.optimizers as they were when "
                "the batch began, so that nothing of its step would be clipped. Change them before, in a callback that "
                "stands before GradClip or in on_train_epoch_start."
            )
        steps.settle_due()
        steps.due = self._scaler is not None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what was done since the last log, where Lightning logs."""
        for steps in self._steps:
            steps.settle_due()
        logs = trainer._logger_connector.should_update_logs or trainer.fast_dev_run
        if not logs or not any(steps.stepped for steps in self._steps):
            return
        found: dict[str, float] = {}
        self._replicas.insist()
        for steps, optimizer in zip(self._steps, trainer.optimizers, strict=True):
            steps.clipper.check_skips()
            scalars = steps.clipper.report.scalars()
            if trainer.is_global_zero:
                self._advice.at_log(steps.clipper, scalars, [optimizer])
            found |= scalars
        if self._recording is not None:
            self._recording.flush()
        found = pick(found | self._updates.scalars(), self.config.log)
        pl_module.log_dict(found, on_step=True, on_epoch=False, batch_size=1)
        if trainer.is_global_zero:
            trackers = [(type(tracker).__name__, tracker) for tracker in trainer.loggers]
            boards = [tracker.experiment for name, tracker in trackers if name == "TensorBoardLogger"]
            runs = [tracker.experiment for name, tracker in trackers if name == "WandbLogger"]
            self._histograms.send(self.clippers, boards, runs, trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the rest of the record, say what clipping did, and leave the optimizers as they would be."""
        self._release()
        if self._recording is not None:
            self._recording.finish()
        self._replicas.finish(clipper.view for clipper in self.clippers)
        if trainer.is_global_zero:
            for clipper in (*self.clippers, *self._updates.clippers):
                announce(clipper.report.closing_line())

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write what there is of the record, and leave the optimizers as they would be."""
        self._release()
        if self._steps and self._recording is not None:
            self._recording.flush(force=True, alone=True)

    def _release(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None
        for steps in self._steps:
            steps.release()
        self._updates.release()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: of each optimizer the state of its clippers."""
        if not self._steps:
            return self._loaded
        if self._recording is not None:
            self._recording.flush(force=True)  # a checkpoint never holds a step that the record lacks
        return kept(self.clippers, self._updates.clippers)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """There is a checkpoint, with a state of this callback or without one."""
        self._resumes = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint for `on_fit_start`, when there are optimizers."""
        self._loaded = state_dict


def _obey(trainer: Any, event: Event) -> None:
    if "stop" in event.asked:
        trainer.should_stop = True

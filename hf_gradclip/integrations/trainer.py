"""transformers.Trainer: the same loop, with clipping by strategy in the seam where `max_grad_norm` acts."""

from __future__ import annotations

import os
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import transformers
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import is_sagemaker_mp_enabled

from hf_gradclip.clipper import Clipper
from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.arguments import insist_on_order, limit_of, refuse_settings
from hf_gradclip.integrations.attachment import Attachment
from hf_gradclip.integrations.models import Models
from hf_gradclip.integrations.refusals import refuse_optimizer, refuse_unsupported
from hf_gradclip.integrations.signature import signature_of
from hf_gradclip.integrations.trainer_events import hearing_of
from hf_gradclip.integrations.trainer_recording import RecordCallback, RecordingMixin
from hf_gradclip.run.examples import take_indices
from hf_gradclip.run.startup import check_run
from hf_gradclip.run.state import STATE_NAME, load_state, load_updates, save_state, save_updates
from hf_gradclip.run.tested import insist_on_hooks
from hf_gradclip.say import announce, logger
from hf_gradclip.views.view import UnsupportedBackendError
from hf_gradclip.wrappers import innermost

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import EvalPrediction, PreTrainedModel, TrainerCallback, TrainingArguments

    from hf_gradclip.config import Clip


class GradClipMixin(RecordingMixin):
    """Clips by strategy in any Trainer subclass: `class MySFTTrainer(GradClipMixin, SFTTrainer)`.

    Everything else is the Trainer's: accumulation, mixed precision, callbacks, logging, checkpoints. `grad_norm` in
    the logs stays the norm before clipping; the keys of `ClipReport` come beside it. A skipped step is reported
    through `accelerator.optimizer_step_was_skipped`, so the scheduler waits.

    Args:
        *args: the Trainer's.
        clip: see hf_gradclip.config. None means what `TrainingArguments.max_grad_norm` says; anything else wins
            over that number, and `max_grad_norm` is no ceiling above it.
        **kwargs: the Trainer's.

    Raises:
        SpecError: for a wrong spec.
        UnsupportedBackendError: where a strategy would be inactive, by name. With `clip=None` such a backend clips as
            the stock Trainer does.
    """

    # What the Trainer beside us provides.
    accelerator: Any
    optimizer: Any
    state: Any
    model_wrapped: nn.Module
    callback_handler: Any
    is_world_process_zero: Any
    is_deepspeed_enabled: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        insist_on_order(cls, GradClipMixin, Trainer)
        cls.__signature__ = signature_of(cls, GradClipMixin)  # type: ignore[attr-defined]

    _clip_spec: Any = None
    _clip_config: ClipConfig | None = None
    _clip_attachment: Attachment | None = None
    _clip_started: tuple[Any, ...] | None = None
    _clip_limit: Any = None
    _clip_untold = False

    def __init__(self, *args: Any, clip: Clip = None, **kwargs: Any) -> None:
        if clip is not None:
            insist_on_hooks("transformers", transformers.__version__, Trainer)
        refuse_settings(type(self), clip, kwargs)
        self._clip_spec = clip
        super().__init__(*args, **kwargs)

    @property
    def clipper(self) -> Clipper | None:
        """The clipper of this run: its state and its report. None before `train()`, or where the backend clips.

        None too after `hyperparameter_search`, which drops the model.
        """
        if self._clip_attachment is None or self._clip_started is None or self.model_wrapped is None:
            return None
        return self._clip_attachment.clipper_of(self.model_wrapped)

    @property
    def update_clipper(self) -> Clipper | None:
        """The clipper of the updates; None before `train()`, or where updates are not clipped."""
        clippers = self._clip_attachment.updates.clippers if self._clip_attachment is not None else []
        return clippers[0] if clippers else None

    def create_accelerator_and_postprocess(self) -> None:
        """Check the spec and the backend as soon as there is an accelerator."""
        config = self._parse_clip()
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self._admit(config)

    def _admit(self, config: ClipConfig) -> None:
        """Clip by this configuration from the next start of training on, if optimizer and backend let us."""
        self._clip_config = self._clip_attachment = self._clip_started = None
        try:
            refuse_optimizer(str(getattr(self.args.optim, "value", self.args.optim)), is_sagemaker_mp_enabled())
            refuse_unsupported(self.accelerator)
        except UnsupportedBackendError:
            if self._clip_spec is not None:
                raise
            return
        if self._clip_spec is None and self.is_deepspeed_enabled:
            config = replace(config, nonfinite="skip")  # what ZeRO does itself, and so the stock Trainer under it
        self._clip_config = config

    def _attach(self) -> None:
        """Take over the accelerator where training starts; until then a Trainer can be pickled, as for Ray."""
        config = self._clip_config
        if config is None or self._clip_attachment is not None:
            return
        recording = self._make_recording(config)
        self._clip_attachment = Attachment(
            self.accelerator,
            Models(config),
            recording=recording,
            missing=self._clip_missing(),
            hearing=hearing_of(self),
        )
        self.pop_callback(RecordCallback)  # type: ignore[attr-defined]
        self.add_callback(RecordCallback(self))  # type: ignore[attr-defined]

    def _parse_clip(self) -> ClipConfig:
        self._clip_limit = self.args.max_grad_norm
        limit = limit_of(self._clip_limit, overruled=self._clip_spec is not None)
        return ClipConfig.parse(self._clip_spec, max_grad_norm=limit)

    def _clip_missing(self) -> str | None:
        if self._clip_spec is None:
            return None  # a Trainer whose own _clip_grad_norm clips, as beside the stock one
        return (
            f"{type(self).__name__}(clip={self._clip_spec!r}): optimizer.step() came without _clip_grad_norm or "
            "_get_grad_norm of GradClipMixin before it, so nothing would be clipped. Put the mixin first among the "
            "bases, and call super() where a subclass overrides them; or leave clip out."
        )

    def _clip_now(self, model: nn.Module) -> Tensor | None:
        """Clip; without `clip` by the number that TrainingArguments hold now, which a callback may have changed."""
        attachment = self._clip_attachment
        assert attachment is not None
        if self._clip_untold:
            self._tell()
        if self._clip_spec is None and self.args.max_grad_norm != self._clip_limit and not self.is_deepspeed_enabled:
            attachment.adopt(self._parse_clip())
        return attachment.clip(model)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._attach()
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        self._start_clipping()
        return prepared

    def _start_clipping(self) -> None:
        """Make the clipper, or go on with it: its state lives as long as the optimizer's, at one batch size."""
        attachment = self._clip_attachment
        if attachment is None:
            return
        started = (weakref.ref(innermost(self.optimizer)), getattr(self, "_train_batch_size", None))
        if self._clip_started == started:
            attachment.hear()
            attachment.watch_optimizers()
            return
        if self._clip_started is not None:
            announce("The optimizer or the batch size is a new one, so the clip state starts anew.")
        attachment.forget()
        try:
            attachment.clipper_of(self.model_wrapped)
        except UnsupportedBackendError:
            if self._clip_spec is not None:
                raise
            self._clip_config = self._clip_attachment = None  # the stock seams serve
            return
        self._clip_started = started
        attachment.watch_optimizers()
        self._clip_untold = self.accelerator.is_main_process

    def _tell(self) -> None:
        """Warn of what a person can change; at the first step, which a try of `auto_find_batch_size` may not reach."""
        self._clip_untold = False
        if self.clipper is None:
            return
        for warning in check_run(self.clipper, self.state.max_steps):
            logger.warning(warning)
        if self._clip_spec is not None and self.args.max_grad_norm not in (0, 1):
            logger.warning(
                "max_grad_norm=%s is set and overruled by clip=%s.",
                self.args.max_grad_norm,
                self._clip_spec if isinstance(self._clip_spec, ClipConfig) else repr(self._clip_spec),
            )

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's; the record keeps the loss, and which examples the batch holds."""
        attachment = self._clip_attachment
        recording = None if attachment is None else attachment.recording
        if recording is None:
            return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        examples = take_indices(inputs)
        recording.expect(examples)
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        recording.add_batch(loss, examples)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        if self._clip_attachment is None:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        return self._clip_now(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self._clip_attachment is None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        return self._clip_now(model) if grad_norm is None else grad_norm

    def _clip_paused(self) -> AbstractContextManager[None]:
        return nullcontext() if self._clip_attachment is None else self._clip_attachment.paused()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._clip_paused():
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.clipper is not None:
            self.clipper.events.look()  # on every rank, so that the state has every step
        if self._clip_attachment is not None and self.clipper is not None and self.args.should_save:
            save_state(self.clipper, os.path.join(output_dir, STATE_NAME))
            save_updates(self._clip_attachment.updates.clippers, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._clip_paused():
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None or self._clip_attachment is None:
            return
        self._start_clipping()
        if self.clipper is not None:
            say = self.accelerator.is_main_process
            load_state(self.clipper, os.path.join(checkpoint, STATE_NAME), say)
            load_updates(self._clip_attachment.updates.clippers, checkpoint, say)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what clipping did since the last log to the training logs."""
        if "loss" in logs and self.clipper is not None:
            assert self._clip_attachment is not None
            logs |= self._clip_attachment.scalars_of(self.clipper)
            if self.is_world_process_zero():
                callbacks = self.callback_handler.callbacks
                boards = [b for callback in callbacks if (b := getattr(callback, "tb_writer", None)) is not None]
                runs = [w for callback in callbacks if (w := getattr(callback, "_wandb", None)) is not None]
                self._clip_attachment.histograms.send([self.clipper], boards, runs, int(self.state.global_step))
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class GradClipTrainer(GradClipMixin, Trainer):
    """`transformers.Trainer` with `clip=`: see GradClipMixin."""

    if TYPE_CHECKING:  # the Trainer's arguments, so that a wrong one is an error in an editor

        def __init__(
            self,
            model: PreTrainedModel | nn.Module | None = None,
            args: TrainingArguments | None = None,
            data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
            train_dataset: Any = None,
            eval_dataset: Any = None,
            processing_class: Any = None,
            model_init: Callable[..., PreTrainedModel] | None = None,
            compute_loss_func: Callable[..., Any] | None = None,
            compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
            callbacks: list[TrainerCallback] | None = None,
            optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
            optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
            preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
            *,
            clip: Clip = None,
        ) -> None: ...

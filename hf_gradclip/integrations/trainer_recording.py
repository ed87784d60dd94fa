"""The recording half of GradClipMixin: which examples a batch holds, and when the record goes to disk."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback

from hf_gradclip.analysis.inline import RunReport, report_of
from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.attachment import Attachment
from hf_gradclip.integrations.console import shorten
from hf_gradclip.integrations.pushing import without_record
from hf_gradclip.integrations.trackers import tell_trackers
from hf_gradclip.record.files import FOLDER
from hf_gradclip.record.options import read_record_options
from hf_gradclip.run.examples import Collate, Indexed, has_indices, text_of
from hf_gradclip.run.recording import Recording
from hf_gradclip.run.startup import world_size
from hf_gradclip.say import announce, logger


class RecordingMixin:
    """What a Trainer does for the record of its run, where the spec asks for one; else nothing."""

    # What GradClipMixin and the Trainer beside us provide.
    _clip_attachment: Attachment | None
    _clip_config: ClipConfig | None
    _clip_said_kept = False
    _attach: Any
    clipper: Any
    update_clipper: Any
    callback_handler: Any
    accelerator: Any
    args: Any
    data_collator: Any
    processing_class: Any
    _clip_examples: Any = None
    _remove_unused_columns: Any
    _get_collator_with_removed_columns: Any

    @property
    def _clip_recording(self) -> Recording | None:
        return None if self._clip_attachment is None else self._clip_attachment.recording

    def _make_recording(self, config: ClipConfig) -> Recording | None:
        options = read_record_options(config.record)
        if options is None:
            return None
        words = self._words_of if options.text else None
        return Recording(self.args.output_dir, self.args.process_index, together=True, text_of=words)

    def _words_of(self, example: int) -> str:
        return text_of(self._clip_examples, self.processing_class, example)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        make = super()._get_dataloader  # type: ignore[misc]
        if description.lower() == "training" and has_indices(dataset):
            self._attach()
            if self._clip_recording is not None:
                loader = self._with_indices(make, dataset, description, *args, **kwargs)
                if loader is not None:
                    return loader
        return make(dataset, description, *args, **kwargs)

    def _with_indices(self, make: Any, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's dataloader over examples that come with their index; the columns are removed as it would.

        None where this Trainer's own way to make one does not take them: with another collator than `data_collator`,
        or with a dataset of one kind only. An error that has another cause rises from its next try.
        """
        prepared = len(self.accelerator._dataloaders)
        self._clip_examples = dataset
        collator = self.data_collator
        if hasattr(dataset, "column_names"):
            inner, collate = self._remove_unused_columns(dataset, description=description), collator
        else:
            inner, collate = dataset, self._get_collator_with_removed_columns(collator, description=description)
        sample = kwargs.get("sampler_fn")
        if sample is not None:
            kwargs["sampler_fn"] = lambda given: sample(given.dataset if isinstance(given, Indexed) else given)
        self.data_collator = Collate(collate)
        try:
            loader = make(Indexed(inner), description, *args, **kwargs)
            if _takes_indices(loader):
                return loader
            why = "it has a collator of its own"
        except Exception as error:  # of a subclass that is not ours
            why = " ".join(f"{type(error).__name__}: {error}".split())
        finally:
            self.data_collator = collator
        del self.accelerator._dataloaders[prepared:]
        if self.args.process_index == 0:
            lost = f"{type(self).__name__}._get_dataloader lost them ({why})"
            logger.warning("record: the examples of a spike are not known: %s.", lost)
        return None

    def clip_report(self) -> RunReport:
        """What clipping has done in this run, in sentences, in a notebook with a picture; of this process.

        Of a recorded run it has what `hf-gradclip report` says, of any other the numbers of `clipper.report.summary()`.

        Raises:
            RuntimeError: before the first step, or where the backend clips.
        """
        if self.clipper is None or not self.clipper.report.steps:
            raise RuntimeError(f"{type(self).__name__}.clip_report(): no step was clipped yet. Call train() first.")
        clippers = [self.clipper, *([self.update_clipper] if self.update_clipper is not None else [])]
        recording = self._clip_recording
        if recording is not None and world_size() == 1:
            recording.flush(force=True)
        return report_of(clippers, None if recording is None else recording.folder)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; what was not yet recorded is written however it ends."""
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self._clip_recording is not None:
                self._clip_recording.flush(force=True, alone=True)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        if self._clip_recording is not None:
            self._clip_recording.flush(force=True)  # a checkpoint never holds a step that the record lacks
        return super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _pushing(self) -> AbstractContextManager[None]:
        """Around an upload of the output_dir, from which a record is left out unless it was asked for."""
        options = None if self._clip_config is None else read_record_options(self._clip_config.record)
        if options is not None and options.push:
            return nullcontext()
        if not self._clip_said_kept and self.args.process_index == 0 and Path(self.args.output_dir, FOLDER).exists():
            self._clip_said_kept = True
            announce(f"record: {FOLDER}/ is not uploaded. record={{'push': true}} lets it go along.")
        return without_record(transformers.trainer)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, without the record unless `record={"push": true}`."""
        with self._pushing():
            return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]

    def _push_from_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        with self._pushing():
            return super()._push_from_checkpoint(*args, **kwargs)  # type: ignore[misc]


def _takes_indices(loader: Any) -> bool:
    """Whether a dataloader collates by a Collate, alone or inside the Trainer's collator that removes columns."""
    collate = getattr(loader, "collate_fn", None)
    while collate is not None and not isinstance(collate, Collate):
        collate = getattr(collate, "data_collator", None)
    return collate is not None


class RecordCallback(TrainerCallback):
    """Tells record, trackers and console where training starts, and the attachment where it ends.

    Args:
        trainer: whose record it is.
    """

    def __init__(self, trainer: RecordingMixin) -> None:
        self._trainer = weakref.ref(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is known now, that of a checkpoint or 0, and the trackers have begun."""
        trainer = self._trainer()
        if trainer is not None and trainer._clip_config is not None and state.is_world_process_zero:
            config, callbacks = trainer._clip_config, trainer.callback_handler.callbacks
            tell_trackers(callbacks, config)
            if config.console is not None:
                shorten(callbacks, config.log[: config.console])
        if trainer is not None and trainer._clip_recording is not None:
            trainer._clip_recording.start_after(state.global_step)
        if trainer is not None and trainer._clip_attachment is not None:
            trainer._clip_attachment.start_after(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every rank is here, so that losses can be averaged."""
        trainer = self._trainer()
        if trainer is not None and trainer._clip_attachment is not None:
            trainer._clip_attachment.finish()

"""The recording half of GradClipMixin: which examples a batch holds, and when the record goes to disk."""

from __future__ import annotations

import weakref
from typing import Any

from transformers import TrainerCallback

from hf_gradclip.config import ClipConfig
from hf_gradclip.integrations.attachment import Attachment
from hf_gradclip.run.examples import Collate, Indexed, has_indices, text_of
from hf_gradclip.run.recording import Recording


class RecordingMixin:
    """What a Trainer does for the record of its run, where the spec asks for one; else nothing."""

    # What GradClipMixin and the Trainer beside us provide.
    _clip_attachment: Attachment | None
    _attach: Any
    args: Any
    data_collator: Any
    train_dataset: Any
    processing_class: Any
    _remove_unused_columns: Any
    _get_collator_with_removed_columns: Any

    @property
    def _clip_recording(self) -> Recording | None:
        return None if self._clip_attachment is None else self._clip_attachment.recording

    def _make_recording(self, config: ClipConfig) -> Recording | None:
        if not config.record:
            return None
        words = self._words_of if config.record == "text" else None
        return Recording(self.args.output_dir, self.args.process_index, together=True, text_of=words)

    def _words_of(self, example: int) -> str:
        return text_of(self.train_dataset, self.processing_class, example)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        if description.lower() == "training" and has_indices(dataset):
            self._attach()
            if self._clip_recording is not None:
                return self._with_indices(dataset, description, *args, **kwargs)
        return super()._get_dataloader(dataset, description, *args, **kwargs)  # type: ignore[misc]

    def _with_indices(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's dataloader over examples that come with their index; the columns are removed as it would."""
        collator = self.data_collator
        if hasattr(dataset, "column_names"):
            inner, collate = self._remove_unused_columns(dataset, description=description), collator
        else:
            inner, collate = dataset, self._get_collator_with_removed_columns(collator, description=description)
        sample = kwargs.get("sampler_fn")
        if sample is not None:
            kwargs["sampler_fn"] = lambda indexed: sample(indexed.dataset)
        self.data_collator = Collate(collate)
        try:
            return super()._get_dataloader(Indexed(inner), description, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.data_collator = collator

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


class RecordCallback(TrainerCallback):
    """Tells the record where training starts, and the attachment where it ends.

    Args:
        trainer: whose record it is.
    """

    def __init__(self, trainer: RecordingMixin) -> None:
        self._trainer = weakref.ref(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is known now, that of a checkpoint or 0."""
        trainer = self._trainer()
        if trainer is not None and trainer._clip_recording is not None:
            trainer._clip_recording.start_after(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every rank is here, so that losses can be averaged."""
        trainer = self._trainer()
        if trainer is not None and trainer._clip_attachment is not None:
            trainer._clip_attachment.finish()
